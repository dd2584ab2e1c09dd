"""A training step of a Llama with 7 or 8 billion parameters in few bits, compiled for one chip.

    python accelerators/quantized.py tpu|cuda [--programs 7b-nf4 7b-int8 8b-nf4 …]

32 layers of 4096, rank 16 on every linear, rematerialized, the layers in few bits, embedding and
head in bfloat16; one sequence of 1024 tokens, or with 8 billion parameters of 4096. Factors and the
state of Adam are donated. Prints the chip's peak memory, and compares it with the step that an
expert would write: a product whose custom derivative decodes again.
"""

import argparse
import sys
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, PartitionSpec

import llama
import lorax
from adapted import as_factors
from compiling import compiled, on_mesh
from hand_written_quantized import product
from lorax.bases import Format
from programs import OPTIMIZER, step_of
from targets import Target

CHIPS = {
    "tpu": Target(
        "tpu", "v5e:2x2"
    ),  # one chip is used, since not every libtpu describes a single one
    "cuda": Target("cuda", "1x1x1", "nvidia_h100_80gb.txtpb"),
}
RANK = 16
MIB, GIB = 2**20, 2**30


class Row(NamedTuple):
    """A program: a model, its tokens, a format, and a limit for the peak."""

    size: llama.Size
    batch: tuple[int, int]
    format: Format
    limit: int | None = None


SEVEN, EIGHT = (llama.SEVEN_BILLION, (1, 1024)), (llama.EIGHT_BILLION, (1, 4096))
ROWS = {
    "7b-nf4": Row(*SEVEN, lorax.NF4(64)),
    "7b-int8": Row(*SEVEN, lorax.Int8()),
    "8b-nf4": Row(*EIGHT, lorax.NF4(64), 8 * GIB),
}


def hand_written(size: llama.Size, format: Format):
    """`forward(factors, frozen, tokens)` on the arrays of the quantized weights of a layer."""

    coded = product(format)

    def dense(layer, name, x):
        params, factors = layer
        a, b = factors[name]["a"], factors[name]["b"]
        return coded(x, params[name].arrays) + (x @ a.astype(x.dtype)) @ b.astype(x.dtype)

    return lambda factors, params, tokens: llama.run(
        dense, size, params, (params["layers"], factors["layers"]), tokens
    )


def steps(mesh: Mesh, size: llama.Size, batch: tuple[int, int], format: Format):
    """The step, ours and hand-written, each as a function followed by its arguments' shapes."""
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
        (step_of(hand_written(size, format), llama.loss), factors, state_of_factors, frozen, data),
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("platform", choices=CHIPS)
    parser.add_argument("--programs", nargs="+", choices=ROWS, default=list(ROWS))
    options = parser.parse_args()
    devices = CHIPS[options.platform].devices()[:1]
    mesh = Mesh(np.array(devices), ("chip",), axis_types=(AxisType.Auto,))
    print(f"JAX {jax.__version__}, a training step for one {devices[0].device_kind}, MiB")
    print(f"{'':24} {'arguments':>10} {'peak':>8} {'temp':>8} {'compiled in':>12}")
    fits = True
    for name in options.programs:
        results = []
        row = ROWS[name]
        forms = steps(mesh, row.size, row.batch, row.format)
        for label, form in zip(("lorax", "hand-written"), forms, strict=True):
            start = time.perf_counter()
            facts = compiled(*form, donated=(0, 1))
            results.append(facts)
            sizes = (facts.arguments / MIB, facts.peak / MIB, facts.temp / MIB)
            seconds = time.perf_counter() - start
            print(f"{name + ', ' + label:24} {sizes[0]:10.0f} {sizes[1]:8.0f} {sizes[2]:8.0f} "
                  f"{seconds:10.0f} s", flush=True)  # fmt: skip
        ours, written = results
        print(f"{name + ', peak':24} {ours.peak / written.peak:.4f} of hand-written")
        if ours.flops:
            print(f"{name + ', FLOPs':24} {ours.flops / written.flops:.4f} of hand-written")
        size = row.size
        stack = {size.layers * size.width * n for n in (size.width, size.hidden)}
        # If a sequence is as long as a layer is wide, the inputs of all layers are as large as a
        # stack. The hand-written step keeps them, too, so only the difference counts.
        extra = {n: ours.floats[n] - written.floats[n] for n in stack}
        extra = {n: count for n, count in extra.items() if count > 0}
        print(f"{name + ', floats of a stack':24} {extra or 'none'}")
        limit = row.limit or 1.005 * written.peak
        print(f"{name + ', peak / limit':24} {ours.peak / limit:.4f}")
        fits &= not extra and ours.peak <= limit
    return int(not fits)


if __name__ == "__main__":
    sys.exit(main())
