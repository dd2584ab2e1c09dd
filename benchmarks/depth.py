"""Times tracing and compiling a PyTorch module by its number of layers, with and without a scan.

    python benchmarks/depth.py [--layers N …] [--rounds N]

The program is the gradient of the loss of a Llama with small layers, all of them with LoRA.
Equations are those of the traced program, including the bodies of its loops. Seconds are the
minimum over rounds, which alternate between the two.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import transformers

import lorax
import lorax_hf
from counts import paired

SIZES = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 160}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}


def program(layers: int, scan: bool) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """The gradient of a loss, and its arguments."""
    config = transformers.LlamaConfig(**SIZES, **HEADS, num_hidden_layers=layers)
    model = transformers.LlamaForCausalLM(config)
    fn, params = lorax_hf.from_torch(model, scan_layers=scan)
    spec = lorax_hf.spec(fn, rank=4, targets="all-linear")
    frozen, tunable = lorax.init_lora(params, spec, jax.random.key(0))
    adapted = lorax.lora(fn, on_materialize="error")

    def loss(tunable: Any, frozen: Any, ids: jax.Array) -> jax.Array:
        logits = adapted((frozen, tunable), ids).logits[:, :-1]
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), ids[:, 1:, None], axis=-1)
        return -chosen.mean()

    return jax.grad(loss), (tunable, frozen, jnp.arange(32).reshape(2, 16))


def seconds(fn: Callable[..., Any], args: tuple[Any, ...]) -> tuple[float, float, int]:
    """Trace time and compile time from empty caches, and the number of equations."""
    jax.clear_caches()
    start = time.perf_counter()
    traced = jax.jit(lambda *args: fn(*args)).trace(*args)
    middle = time.perf_counter()
    traced.lower().compile()
    return middle - start, time.perf_counter() - middle, sum(1 for _ in equations(traced.jaxpr))


def equations(jaxpr: Any) -> Iterator[Any]:
    """All equations, including those of inner programs."""
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        yield equation
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                    yield from equations(inner)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 8, 16, 32], metavar="N")
    parser.add_argument("--rounds", type=int, default=3, metavar="N")
    options = parser.parse_args()
    print("| layers | | equations | trace | compile |\n|---|---|---|---|---|")
    for layers in options.layers:
        programs = {"unrolled": program(layers, False), "scanned": program(layers, True)}
        runs = {row: (lambda made=made: seconds(*made)) for row, made in programs.items()}
        for row, results in paired(runs, options.rounds).items():
            trace, compiling, count = (min(column) for column in zip(*results, strict=True))
            print(
                f"| {layers} | {row} | {count:,} | {trace:.1f} s | {compiling:.1f} s |", flush=True
            )


if __name__ == "__main__":
    main()
