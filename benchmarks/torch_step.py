"""Times a training step of transformers' Llama in JAX, PEFT on PyTorch, and a hand-written Llama.

    python benchmarks/torch_step.py [--layers N] [--vocabulary N] [--rounds N] [--json FILE]

The shape is SmolLM2-135M's, with random weights, LoRA of rank 8 on q_proj and v_proj, Adam, and 4
sequences of 128 tokens. All start from the same weights and factors, and must compute the same
losses. Every round runs each variant once, in random order. A ratio is of two times of one round.
"""

import argparse
import functools
import json
import os
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peft
import torch
import transformers

import lorax
import lorax_hf
import lorax_io
from counts import count, paired
from lorax import testing

sys.path.append(str(pathlib.Path(__file__).parents[1] / "examples" / "finetune"))
import model as hand_written  # noqa: E402

BATCH, TIME, RANK, ALPHA = 4, 128, 8, 16
LEARNING_RATE = 1e-4
TARGETS = ["self_attn.q_proj", "self_attn.v_proj"]
OURS, SCANNED = "lorax on torchax", "lorax on torchax, scan_layers"
HAND_WRITTEN, PEFT = "hand-written Llama under lorax", "PEFT on torch"


class Variant(NamedTuple):
    """A step that returns its loss and continues from the previous state."""

    run: Callable[[], float]
    flops: float | None  # XLA's count, in which the body of a loop counts once


def config(layers: int, vocabulary: int) -> Any:
    """The shape of SmolLM2-135M."""
    return transformers.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
    )


def next_token_loss(logits: jax.Array, ids: jax.Array) -> jax.Array:
    """The mean cross-entropy of each token, given those before it."""
    return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], ids[:, 1:]).mean()


def in_jax(apply: Callable[..., Any], frozen: Any, tunable: Any, ids: Any) -> Variant:
    """A compiled step of `apply((frozen, tunable), ids) -> logits`."""
    optimizer = optax.adam(LEARNING_RATE)

    def step(tunable: Any, state: Any, frozen: Any, ids: Any) -> Any:
        loss = lambda tunable: next_token_loss(apply((frozen, tunable), ids), ids)  # noqa: E731
        value, gradient = jax.value_and_grad(loss)(tunable)
        updates, state = optimizer.update(gradient, state)
        return value, optax.apply_updates(tunable, updates), state

    # Copied, since the variants share arrays and a step donates its own.
    state = jax.tree.map(jnp.copy, (tunable, optimizer.init(tunable)))
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(*state, frozen, ids).compile()
    current = list(state)

    def run() -> float:
        value, *current[:] = compiled(*current, frozen, ids)
        return float(jax.block_until_ready(value))

    return Variant(run, count(compiled).flops)


def on_torch(module: Any, folder: str, ids: Any) -> Variant:
    """A step of the module with the adapter in a folder."""
    torch.set_num_threads(os.cpu_count() or 1)
    net = peft.PeftModel.from_pretrained(module, folder, is_trainable=True)
    trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=LEARNING_RATE)
    tokens = torch.from_numpy(np.array(ids)).long()

    def run() -> float:
        optimizer.zero_grad()
        logits = net(tokens, use_cache=False).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(
            logits.reshape(-1, logits.shape[-1]), tokens[:, 1:].reshape(-1)
        )
        loss.backward()
        optimizer.step()
        return loss.item()

    return Variant(run, None)


def hand_logits(params: Any, ids: Any, config: Any) -> jax.Array:
    """The logits of the example's Llama at every position."""
    tree = params["model"]
    x = tree["embed_tokens"]["embedding"][ids]
    for k in range(config.layers):
        x = hand_written.layer(tree["layers"][str(k)], x, config)
    x = hand_written.rms_norm(x, tree["norm"]["weight"], config.norm_eps)
    return x @ tree["embed_tokens"]["embedding"].T


def as_hand_written(params: dict[str, Any]) -> dict[str, Any]:
    """The parameters of a module in the tree of the example's Llama."""
    tree: dict[str, Any] = {}
    for name, array in params.items():
        *path, leaf = name.split(".")
        if path[-1] == "embed_tokens":
            leaf = "embedding"
        elif leaf == "weight" and array.ndim == 2:
            leaf, array = "kernel", array.T
        functools.reduce(lambda node, key: node.setdefault(key, {}), path, tree)[leaf] = array
    return tree


def variants(layers: int, vocabulary: int) -> dict[str, Variant]:
    """Every variant, with the same initial weights and factors."""
    torch.manual_seed(0)
    module = transformers.LlamaForCausalLM(config(layers, vocabulary)).eval()
    ids = jax.random.randint(jax.random.key(0), (BATCH, TIME), 0, vocabulary)
    by_name: dict[str, Variant] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, scan in ((OURS, False), (SCANNED, True)):
            fn, params = lorax_hf.from_torch(module, scan_layers=scan)
            spec = lorax_hf.spec(fn, rank=RANK, alpha=ALPHA, targets=TARGETS)
            names = lorax_hf.peft_names(fn)
            if scan:
                pair = lorax_io.load_peft(folder, params, names)
            else:
                frozen, tunable = lorax.init_lora(params, spec, jax.random.key(1))
                factors = testing.random_factors(tunable, jax.random.key(2))
                pair = frozen, jax.tree.map(lambda x: 0.1 * x, factors)
                lorax_io.save_peft(folder, pair[1], names, task_type="CAUSAL_LM")
                tree = as_hand_written(params)
            apply = lorax.lora(fn, on_materialize="error", on_unused="error")
            logits = lambda pair, ids, apply=apply: apply(pair, ids).logits  # noqa: E731
            by_name[name] = in_jax(logits, *pair, ids)
        names = lorax_io.flax_names(tree)
        shape = hand_written.Config(layers, 9, 3, 100_000.0, 1e-5)
        logits = functools.partial(hand_logits, config=shape)
        hand = lorax.lora(logits, on_materialize="error", on_unused="error")
        by_name[HAND_WRITTEN] = in_jax(hand, *lorax_io.load_peft(folder, tree, names), ids)
        by_name[PEFT] = on_torch(module, folder, ids)
    return by_name


def check_same(by_name: dict[str, Variant]) -> None:
    """Raises unless all compute the same losses for two steps."""
    losses = {name: [variant.run() for _ in range(2)] for name, variant in by_name.items()}
    for name, values in losses.items():
        if not np.allclose(values, losses[OURS], rtol=1e-5, atol=0):
            raise AssertionError(f"{name} has the losses {values}, and {OURS} {losses[OURS]}")


def milliseconds(variant: Variant) -> float:
    """The time of one step."""
    start = time.perf_counter()
    variant.run()
    return 1e3 * (time.perf_counter() - start)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=30, metavar="N")
    parser.add_argument("--vocabulary", type=int, default=49152, metavar="N")
    parser.add_argument("--rounds", type=int, default=15, metavar="N")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="also write a file")
    options = parser.parse_args(arguments)
    by_name = variants(options.layers, options.vocabulary)
    check_same(by_name)
    times = paired(
        {name: functools.partial(milliseconds, variant) for name, variant in by_name.items()},
        options.rounds,
    )
    rows: dict[str, Any] = {}
    print(f"| | GFLOPs by XLA | step | {OURS} / this | quartiles |\n|---|---|---|---|---|")
    for name, variant in by_name.items():
        ratios = np.array(times[OURS]) / np.array(times[name])
        rows[name] = {"flops": variant.flops, "step_ms": times[name]}
        flops = "–" if variant.flops is None else f"{variant.flops / 1e9:.2f}"
        low, middle, high = np.percentile(ratios, [25, 50, 75])
        print(
            f"| {name} | {flops} | {np.median(times[name]):.0f} ms | "
            f"{middle:.3f} | {low:.3f} to {high:.3f} |"
        )
    if options.json:
        options.json.write_text(json.dumps({"load": os.getloadavg()[0], "rows": rows}, indent=2))
    return rows


if __name__ == "__main__":
    main()
