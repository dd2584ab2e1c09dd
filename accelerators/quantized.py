"""A training step of a Llama with 7 billion parameters in few bits, compiled for one chip.

    python accelerators/quantized.py tpu|cuda [--formats nf4 int8 …]

32 layers of 4096, rank 16 on every linear, one sequence of 1024 tokens, rematerialised, the layers
in few bits, embedding and head in bfloat16. Prints what the chip needs at once, beside the same
step as an expert would write it: a product with a custom derivative, which decodes again.
"""

import argparse
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, PartitionSpec

import llama
import lorax
from adapted import as_factors
from compiling import compiled, on_mesh
from lorax.bases import Format
from programs import OPTIMIZER, step_of
from targets import Target

CHIPS = {
    "tpu": Target("tpu", "v5e:1x1"),
    "cuda": Target("cuda", "1x1x1", "nvidia_h100_80gb.txtpb"),
}
BATCH, RANK = (1, 1024), 16
MIB = 2**20
FORMATS = {"nf4": lorax.NF4(64), "int8": lorax.Int8()}


def by_hand(size: llama.Size, format: Format):
    """`forward(factors, frozen, tokens)` on the arrays of the quantized weights of a layer."""

    def decoded(arrays):
        """From codes [blocks, block, out], scales [blocks, out], outer [out]; or without blocks."""
        codes = arrays["codes"]
        wide = {"codes": codes}
        for name in arrays.keys() - {"codes"}:
            *sizes, out = arrays[name].shape
            sizes += [1] * (codes.ndim - 1 - len(sizes))
            wide[name] = arrays[name].reshape(*sizes, out)
        return format.decode(wide).astype(jnp.bfloat16).reshape(-1, codes.shape[-1])

    @jax.custom_vjp
    def product(x, arrays):
        return x @ decoded(arrays)

    def forward(x, arrays):
        return product(x, arrays), arrays

    def backward(arrays, cotangent):
        none = jax.tree.map(lambda x: jnp.zeros(x.shape, _tangent(x.dtype)), arrays)
        return cotangent @ decoded(arrays).T, none

    product.defvjp(forward, backward)

    def dense(layer, name, x):
        params, factors = layer
        a, b = factors[name]["a"], factors[name]["b"]
        return product(x, params[name].arrays) + (x @ a.astype(x.dtype)) @ b.astype(x.dtype)

    return lambda factors, params, tokens: llama.run(
        dense, size.heads, params, (params["layers"], factors["layers"]), tokens
    )


def _tangent(dtype: Any) -> Any:
    return dtype if jnp.issubdtype(dtype, jnp.inexact) else jax.dtypes.float0


def steps(mesh: Mesh, size: llama.Size, format: Format, batch=BATCH):
    """The step, ours and hand-written, each as a function and the shapes of its arguments."""
    model = llama.model(size)
    tokens = jax.ShapeDtypeStruct(batch, jnp.int32)

    def start(params):
        frozen = lorax.quantize(params, format, fn=model, args=(tokens,), where="layers/*")
        spec = lorax.infer_spec(model, frozen, tokens, rank=RANK, where="layers/*")
        frozen, tunable = lorax.init_lora(frozen, spec, jax.random.key(0))
        return frozen, tunable, OPTIMIZER.init(tunable)

    everywhere = lambda tree: on_mesh(mesh, tree, lambda _: PartitionSpec())  # noqa: E731
    frozen, tunable, state = everywhere(jax.eval_shape(start, llama.shapes(size)))
    factors = as_factors(tunable)
    state_of_factors = everywhere(jax.eval_shape(OPTIMIZER.init, factors))
    adapted = lorax.lora(model, on_materialize="error", on_unused="error")
    ours = lambda tunable, frozen, batch: adapted((frozen, tunable), batch)  # noqa: E731
    data = everywhere(tokens)
    return (
        (step_of(ours, llama.loss), tunable, state, frozen, data),
        (step_of(by_hand(size, format), llama.loss), factors, state_of_factors, frozen, data),
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("platform", choices=CHIPS)
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    options = parser.parse_args()
    devices = CHIPS[options.platform].devices()[:1]
    mesh = Mesh(np.array(devices), ("chip",), axis_types=(AxisType.Auto,))
    print(f"JAX {jax.__version__}, a training step for one {devices[0].device_kind}, MiB")
    print(f"{'':24} {'arguments':>10} {'peak':>8} {'temp':>8} {'compiled in':>12}")
    fits = True
    for name in options.formats:
        found = []
        forms = steps(mesh, llama.SEVEN_BILLION, FORMATS[name])
        for who, form in zip(("lorax", "hand-written"), forms, strict=True):
            start = time.perf_counter()
            facts = compiled(*form)
            found.append(facts)
            sizes = (facts.arguments / MIB, facts.peak / MIB, facts.temp / MIB)
            seconds = time.perf_counter() - start
            print(f"{name + ', ' + who:24} {sizes[0]:10.0f} {sizes[1]:8.0f} {sizes[2]:8.0f} "
                  f"{seconds:10.0f} s", flush=True)  # fmt: skip
        ours, theirs = found
        print(f"{name + ', peak':24} {ours.peak / theirs.peak:.4f} of hand-written")
        if ours.flops:
            print(f"{name + ', FLOPs':24} {ours.flops / theirs.flops:.4f} of hand-written")
        size = llama.SEVEN_BILLION
        stack = {size.layers * size.width * n for n in (size.width, size.hidden)}
        made = {n: count for n, count in ours.floats.items() if n in stack and count}
        print(f"{name + ', floats of a stack':24} {made or 'none'}")
        fits &= not made and ours.peak <= 1.005 * theirs.peak
    return int(not fits)


if __name__ == "__main__":
    sys.exit(main())
