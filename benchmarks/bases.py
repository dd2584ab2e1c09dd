"""Counts a training step on each format of a quantized base, beside the same step on floats.

    python benchmarks/bases.py [--rounds N] [--works NAME ...]

Bits, bytes and FLOPs are exact: JAX's and XLA's own. The error is that of the format on these
weights, `‖decoded − weight‖ / ‖weight‖`. Trace and step times are median ratios of paired runs.
One row is the same step on NF4 as an expert would write it, and the last line is ours beside it.
"""

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import lorax
import models
from adapted import adapt
from coded_by_hand import CodedByHand
from counts import paired, trace_seconds
from lorax.bases import Format
from models import Model
from steps import start, train
from variants import Variant, step_milliseconds, variant
from works import Program, gpt

RANK = 16

FORMATS: dict[str, Format | None] = {
    "float32": None,
    "Int8()": lorax.Int8(),
    "Int8(64)": lorax.Int8(64),
    "Int8(64, symmetric=False)": lorax.Int8(64, symmetric=False),
    "Int4(32)": lorax.Int4(32),
    "Int4(32, symmetric=False)": lorax.Int4(32, symmetric=False),
    "NF4(64)": lorax.NF4(64),
    "NF4(64, double=False)": lorax.NF4(64, double=False),
    "FP8()": lorax.FP8(),
    'FP8("e5m2")': lorax.FP8("e5m2"),
    "FP8(block=128, square=True)": lorax.FP8(block=128, square=True),
    "MXFP4()": lorax.MXFP4(),
}

WRITTEN = "NF4(64)"  # the one that is written by hand as well
BY_HAND = f"{WRITTEN}, hand-written"

WORKS: dict[str, Callable[[], Model]] = {
    "GPT, scan + remat": lambda: gpt(scan=True, remat=True),
    "MLP": lambda: models.mlp(),
}

HEADER = (
    "| format | bits per weight | error | FLOPs | arguments, MiB | temporary, MiB | kept, MiB "
    "| trace | step |\n|---|---:|---:|---:|---:|---:|---:|---:|---:|"
)
MIB = 2**20


class Step(NamedTuple):
    """A training step on one format."""

    variant: Variant
    bits: float
    error: float
    traced: Callable[[], float]


def steps(model: Model) -> dict[str, Step]:
    """A training step of LoRA on every format."""
    adapted = adapt(model, RANK)
    found: dict[str, Step] = {}

    def add(name, apply, factors, frozen, bits, error):
        trained = train(apply)
        call = (start(factors), frozen, model.batch)
        made = variant(Program(trained.step, [call], trained.loss))
        found[name] = Step(made, bits, error, partial(trace_seconds, trained.step, *call))
        return trained.loss(factors, frozen, model.batch)

    for name, format in FORMATS.items():
        frozen, bits, error = adapted.frozen, 32.0, 0.0
        if format is not None:
            frozen = lorax.quantize(
                adapted.frozen, format, fn=model.apply, args=(model.batch,), where=model.where
            )
            bits, error = _quality(adapted.frozen, frozen)
        ours = add(name, adapted.ours, adapted.tunable, frozen, bits, error)
        if name == WRITTEN and format is not None:
            written = model.written(CodedByHand(format))
            theirs = add(BY_HAND, written, adapted.factors, frozen, bits, error)
            np.testing.assert_allclose(ours, theirs, rtol=1e-4)
    return found


def _quality(floats: Any, coded: Any) -> tuple[float, float]:
    """Bits of an entry, and the error, over all quantized weights."""
    is_held = lambda node: isinstance(node, lorax.QuantizedWeight)  # noqa: E731
    held = [x for x in jax.tree.leaves(coded, is_leaf=is_held)]
    pairs = [(x, y) for x, y in zip(held, jax.tree.leaves(floats), strict=True) if is_held(x)]
    bits = sum(8 * x.nbytes for x, _ in pairs) / sum(x.size for x, _ in pairs)
    squares = [(jnp.sum((x.array() - y) ** 2), jnp.sum(jnp.asarray(y) ** 2)) for x, y in pairs]
    lost, whole = (sum(map(float, column)) for column in zip(*squares, strict=True))
    return bits, (lost / whole) ** 0.5


def table(model: Model, rounds: int) -> str:
    """Each format beside floats."""
    made = steps(model)
    times: dict[str, list[float]] = {}
    traces: dict[str, list[float]] = {}
    if rounds:
        runs = {name: lambda v=step.variant: step_milliseconds(v) for name, step in made.items()}
        times = paired(runs, rounds)
        traces = paired({name: step.traced for name, step in made.items()}, max(rounds // 3, 1))
    lines = [HEADER]
    plain = made["float32"].variant.counts
    for name, step in made.items():
        counts = step.variant.counts
        cells = [f"{step.bits:.2f}", f"{step.error:.4f}", f"{counts['flops'] / plain['flops']:.3f}"]
        for count in ("argument_bytes", "temp_bytes", "residual_bytes"):
            cells.append(f"{counts[count] / MIB:.1f}")
        for taken in (traces, times):
            if not taken:
                cells.append("–")
                continue
            ratios = [x / y for x, y in zip(taken[name], taken["float32"], strict=True)]
            cells.append(f"{statistics.median(ratios):.2f}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", _beside_by_hand(made, times)])


def _beside_by_hand(made: dict[str, Step], times: dict[str, list[float]]) -> str:
    """Ours on one format, over the hand-written step on it."""
    ours, theirs = (made[name].variant.counts for name in (WRITTEN, BY_HAND))
    counts = {"FLOPs": "flops", "temporary": "temp_bytes", "kept": "residual_bytes"}
    cells = [f"{label} {ours[key] / theirs[key]:.3f}" for label, key in counts.items()]
    if times:
        ratios = [x / y for x, y in zip(times[WRITTEN], times[BY_HAND], strict=True)]
        cells.append(f"step {statistics.median(ratios):.2f}")
    return f"{WRITTEN} / hand-written: {', '.join(cells)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=11, help="of paired runs; 0 only counts")
    parser.add_argument("--works", nargs="+", choices=WORKS, default=list(WORKS))
    options = parser.parse_args()
    print(f"JAX {jax.__version__} on {jax.devices()[0].device_kind}, LoRA of rank {RANK}")
    for name in options.works:
        print(f"\n{name}\n\n{table(WORKS[name](), options.rounds)}", flush=True)


if __name__ == "__main__":
    main()
