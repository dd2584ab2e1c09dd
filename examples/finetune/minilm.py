"""Fine-tune a sentence encoder to classify movie reviews: LoRA, compared with a frozen probe.

The PyTorch checkpoint of all-MiniLM-L6-v2 is loaded into a FlaxBertModel, without PyTorch. The
probe is a logistic regression on the mean of its outputs. LoRA starts from the probe: it trains the
same head on the same sentences, together with an adapter in the encoder.
"""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tokenizers
import transformers
from flax.traverse_util import flatten_dict
from safetensors.flax import save_file
from safetensors.numpy import load_file

import lorax_hf
from arguments import parse_args
from data import CALIBRATION, batches, choose, encode, labels, read_reviews
from display import console, download, plot_curve, show_adapter, show_scores, show_seconds, timed
from download import MINILM, REVIEWS, DownloadError
from lorax import count_params, init_lora, merge_params
from lorax_io import load_peft, save_peft
from metrics import difference, score
from training import EVAL_BATCH, TRAIN_BATCH, predict, train

BASE = "sentence-transformers/all-MiniLM-L6-v2"  # the base model in the adapter's config
UNUSED = ["pooler.dense"]  # the mean of the outputs does not use it
TOLERANCE = 1e-4  # between the forms of the adapter, relative to the largest embedding


class LoadError(Exception):
    """The weights in a file do not match the model's parameters."""


def main(arguments=None):
    """Run the program; the exit code is 1 if a download, the load or the final check fails."""
    args = parse_args(__doc__, arguments, out="minilm-output", steps=160)
    args.out.mkdir(parents=True, exist_ok=True)
    seconds = {}

    try:
        with timed(seconds, "download"):
            config, *_ = download(MINILM, args.cache / "all-MiniLM-L6-v2")
            [sentences] = download([REVIEWS], args.cache)
        with timed(seconds, "load"), console.status("Reading the weights"):
            model, tokenizer = load(config.parent)
    except (DownloadError, LoadError) as error:
        console.print(f"Error: {error}", markup=False, soft_wrap=True)
        return 1

    prompts_of = functools.partial(encode, tokenizer=tokenizer, prompt="{}")
    training, calibration, held_out = choose(
        read_reviews(sentences), prompts_of, args.steps * TRAIN_BATCH, args.seed
    )
    evaluation = held_out[: args.limit_eval] + calibration

    spec = lorax_hf.spec(
        model, rank=args.rank, alpha=args.alpha, targets="all-linear", exclude=UNUSED
    )
    frozen, adapter = init_lora(model.params, spec, jax.random.key(args.seed))
    adapted = mean_embedding(lorax_hf.lora(model))
    console.print(f"Base: {count_params(model.params):,} parameters")
    console.print(f"Adapter in every layer: {count_params(adapter):,} parameters")
    console.print(f"Probe and LoRA learn from the same {len(training):,} sentences")

    @jax.jit
    def embed(adapter, frozen, tokens, last):
        return adapted((frozen, adapter), tokens, last)

    def margin(tunable, frozen, tokens, last):
        return linear(tunable["head"], embed(tunable["adapter"], frozen, tokens, last))

    prompts, positive = prompts_of(training), labels(training)
    with timed(seconds, "probe"):
        # b is initially zero, so these embeddings are bit-identical to those of the frozen model.
        embeddings = predict(embed, adapter, frozen, prompts + prompts_of(evaluation), "Embed")
        head = fit_probe(embeddings[: len(prompts)], positive)
    probe = linear(head, embeddings[len(prompts) :])

    with timed(seconds, "train"):
        tunable = {"adapter": adapter, "head": head}
        tunable, curve = train(
            margin, tunable, frozen, prompts, positive, args.learning_rate, args.seed
        )
    adapter, head = tunable["adapter"], tunable["head"]
    with timed(seconds, "evaluate"):
        embeddings = predict(embed, adapter, frozen, prompts_of(evaluation), "Evaluate")
    trained = linear(head, embeddings)

    with timed(seconds, "save and check"), console.status("Saving and checking the adapter"):
        held_out = {
            name: score(margins, labels(evaluation), CALIBRATION).accuracy
            for name, margins in (("frozen probe", probe), ("LoRA", trained))
        }
        plot_curve(curve, args.plot or args.out / "curve.svg", held_out)
        folder, names = args.out / "adapter", lorax_hf.peft_names(model)
        save_peft(folder, adapter, names, base_model=BASE, task_type="FEATURE_EXTRACTION")
        save_file(dict(head), args.out / "head.safetensors")
        _, *batch = batches(prompts_of(evaluation), EVAL_BATCH)[0]
        split_embeddings = embed(adapter, frozen, *batch)
        frozen_again, adapter_again = load_peft(folder, model.params, names)
        reloaded = difference(embed(adapter_again, frozen_again, *batch), split_embeddings)
        plain = jax.jit(mean_embedding(model))
        merged = difference(plain(merge_params(frozen, adapter), *batch), split_embeddings)
        base = difference(plain(model.params, *batch), split_embeddings)

    show_scores(
        f"On {len(evaluation) - CALIBRATION} held-out sentences",
        {
            "frozen probe": score(probe, labels(evaluation), CALIBRATION),
            "LoRA": score(trained, labels(evaluation), CALIBRATION),
        },
    )
    show_seconds(seconds)
    checks = {"reloaded": reloaded, "merged": merged}
    agree = show_adapter(folder, "embeddings", checks, base, TOLERANCE)
    return 0 if agree else 1


def load(folder):
    """The model and tokenizer in a folder of the Hub's layout."""
    transformers.logging.set_verbosity_error()  # `check_weights` raises instead of its warnings
    model = transformers.FlaxBertModel.from_pretrained(folder)
    check_weights(model, folder / "model.safetensors")
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    # By default, it pads and truncates every sentence to 128 tokens.
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return model, tokenizer


def check_weights(model, path):
    """Raise unless the parameters of the model are exactly the tensors of PyTorch's file.

    transformers initializes a parameter randomly if the file does not have a tensor for it.
    """
    tensors = load_file(path)
    tensors.pop("embeddings.position_ids", None)  # 0, 1, 2, …, not a parameter in Flax
    params = flatten_dict(model.params, sep="/")
    expected = {}
    for name, row in lorax_hf.peft_names(model).items():
        transposed = row["type"] == "Linear"  # (out, in) in PyTorch
        tensor = params[name].T if transposed else params[name]
        expected[f"{row['module']}.{row.get('parameter', 'weight')}"] = np.asarray(tensor)
    mismatches = {
        "does not contain": expected.keys() - tensors.keys(),
        "contains the unknown": tensors.keys() - expected.keys(),
        "differs from the model in": {
            name
            for name in expected.keys() & tensors.keys()
            if not np.array_equal(expected[name], tensors[name])
        },
    }
    for problem, names in mismatches.items():
        if names:
            raise LoadError(
                f"{path} {problem} {', '.join(sorted(names))}. "
                f"It must contain exactly the weights of {type(model).__name__}."
            )


def mean_embedding(model):
    """A function `embed(params, tokens, last)`: the mean of the model's outputs up to `last`."""

    def embed(params, tokens, last):
        mask = jnp.arange(tokens.shape[1]) <= last[:, None]
        outputs = model(tokens, mask.astype(jnp.int32), params=params).last_hidden_state
        return jnp.mean(outputs, axis=1, where=mask[:, :, None])

    return embed


def linear(head, embeddings):
    """The margin, larger for positive sentences."""
    return embeddings @ head["weight"] + head["bias"]


def fit_probe(embeddings, positive, decay=3e-3, steps=60):
    """A logistic regression by L-BFGS, with `decay` times the squared weights in the loss."""
    sign = jnp.where(positive, 1.0, -1.0)

    def loss(head):
        losses = jax.nn.softplus(-sign * linear(head, embeddings))
        return jnp.mean(losses) + decay * jnp.sum(head["weight"] ** 2)

    optimizer = optax.lbfgs()
    value_and_grad = optax.value_and_grad_from_state(loss)

    @jax.jit
    def step(head, state):
        value, grad = value_and_grad(head, state=state)
        updates, state = optimizer.update(grad, state, head, value=value, grad=grad, value_fn=loss)
        return optax.apply_updates(head, updates), state

    head = {"weight": jnp.zeros(embeddings.shape[1]), "bias": jnp.zeros(())}
    state = optimizer.init(head)
    for _ in range(steps):
        head, state = step(head, state)
    return head


if __name__ == "__main__":
    sys.exit(main())
