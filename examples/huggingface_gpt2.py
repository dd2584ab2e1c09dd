"""Fine-tune a GPT-2 of transformers on a text, and save the adapter as a PEFT folder.

The model is loaded from a local folder or the Hub (`--model gpt2`). By default it is a tiny random
model, so that the program runs anywhere. The text is the Zen of Python.
"""

import argparse
import codecs
import contextlib
import io
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import transformers

import lorax
import lorax_hf
from lorax_io import load_peft, save_peft


def text():
    """The Zen of Python, which the standard library contains in rot13."""
    with contextlib.redirect_stdout(io.StringIO()):
        import this
    return codecs.decode(this.s, "rot13")


def load(name):
    """The model, and the text as tokens in rows of equal length."""
    if name is None:
        config = transformers.GPT2Config(
            n_layer=2, n_embd=64, n_head=4, vocab_size=256, n_positions=64, bos_token_id=0,
            eos_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        )  # fmt: skip
        model, ids = transformers.FlaxGPT2LMHeadModel(config), list(text().encode())
    else:
        model = transformers.FlaxGPT2LMHeadModel.from_pretrained(name)
        ids = transformers.AutoTokenizer.from_pretrained(name)(text())["input_ids"]
    length = 32
    rows = len(ids) // length
    return model, jnp.array(ids[: rows * length]).reshape(rows, length)


def loss_of(logits, ids):
    """The mean loss of each token given those before it."""
    losses = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], ids[:, 1:])
    return losses.mean()


def main(arguments=None):
    """Train, save, load, and compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--model", help="folder, or name on the Hub; by default, a tiny random model"
    )
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("gpt2-adapter"))
    args = parser.parse_args(arguments)

    model, ids = load(args.model)
    targets = "default" if args.model else "all-linear"  # a random model has more to learn
    spec = lorax_hf.spec(model, rank=8, alpha=16, targets=targets)
    frozen, tunable = lorax.init_lora(model.params, spec, jax.random.key(0))
    adapted = lorax_hf.lora(model)
    print(f"{lorax.count_params(tunable):,} of {lorax.count_params(model.params):,} are trained")

    optimizer = optax.adam(1e-2)

    @jax.jit
    def step(tunable, state, frozen, ids):
        def loss(tunable):
            return loss_of(adapted(ids, params=(frozen, tunable)).logits, ids)

        value, gradient = jax.value_and_grad(loss)(tunable)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(tunable, updates), state, value

    state, losses = optimizer.init(tunable), []
    for _ in range(args.steps):
        tunable, state, value = step(tunable, state, frozen, ids)
        losses.append(float(value))
    print(f"loss {losses[0]:.3f} → {losses[-1]:.3f}")

    names = lorax_hf.peft_names(model)
    save_peft(args.out, tunable, names, base_model=args.model, task_type="CAUSAL_LM")
    reloaded = load_peft(args.out, model.params, names)
    logits = adapted(ids[:1], params=(frozen, tunable)).logits
    difference = np.abs(adapted(ids[:1], params=reloaded).logits - logits).max()
    print(f"{args.out}: after reloading, the logits differ by {difference:g}")
    return losses, difference


if __name__ == "__main__":
    main()
