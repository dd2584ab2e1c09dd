"""Counts a training step on each format of a quantized base, and compares it with floats.

    python benchmarks/bases.py [--rounds N] [--workloads NAME ...]

Bits, bytes and FLOPs are exact, as JAX and XLA report them. The error is that of the format on
these weights, `‖decoded − weight‖ / ‖weight‖`. Trace and step times are median ratios of paired
runs. One row is the same step on NF4 as an expert would write it. The last line compares ours with
it.
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
from counts import paired, trace_seconds
from hand_written_quantized import QuantizedLoraOps
from lorax.bases import Format
from models import Model
from steps import start, train
from variants import Variant, step_milliseconds, variant
from workloads import Program, gpt

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

COMPARED = "NF4(64)"  # the format that also has a hand-written step
HAND_WRITTEN = f"{COMPARED}, hand-written"

WORKLOADS: dict[str, Callable[[], Model]] = {
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
    steps_by_format: dict[str, Step] = {}

    def add(name, apply, factors, frozen, bits, error):
        trained = train(apply)
        call = (start(factors), frozen, model.batch)
        measured = variant(Program(trained.step, [call], trained.loss))
        steps_by_format[name] = Step(
            measured, bits, error, partial(trace_seconds, trained.step, *call)
        )
        return trained.loss(factors, frozen, model.batch)

    for name, format in FORMATS.items():
        frozen, bits, error = adapted.frozen, 32.0, 0.0
        if format is not None:
            frozen = lorax.quantize(
                adapted.frozen, format, fn=model.apply, args=(model.batch,), where=model.where
            )
            bits, error = _quality(adapted.frozen, frozen)
        ours = add(name, adapted.apply, adapted.tunable, frozen, bits, error)
        if name == COMPARED and format is not None:
            hand_written = model.with_ops(QuantizedLoraOps(format))
            expected = add(HAND_WRITTEN, hand_written, adapted.factors, frozen, bits, error)
            np.testing.assert_allclose(ours, expected, rtol=1e-4)
    return steps_by_format


def _quality(floats: Any, coded: Any) -> tuple[float, float]:
    """Bits per entry, and the relative error, over all quantized weights."""
    is_quantized = lambda node: isinstance(node, lorax.QuantizedWeight)  # noqa: E731
    leaves = jax.tree.leaves(coded, is_leaf=is_quantized)
    pairs = [
        (x, y) for x, y in zip(leaves, jax.tree.leaves(floats), strict=True) if is_quantized(x)
    ]
    bits = sum(8 * x.nbytes for x, _ in pairs) / sum(x.size for x, _ in pairs)
    squares = [(jnp.sum((x.array() - y) ** 2), jnp.sum(jnp.asarray(y) ** 2)) for x, y in pairs]
    lost, total = (sum(map(float, column)) for column in zip(*squares, strict=True))
    return bits, (lost / total) ** 0.5


def table(model: Model, rounds: int) -> str:
    """One row for each format, relative to floats."""
    measured = steps(model)
    times: dict[str, list[float]] = {}
    traces: dict[str, list[float]] = {}
    if rounds:
        runs = {
            name: lambda v=step.variant: step_milliseconds(v) for name, step in measured.items()
        }
        times = paired(runs, rounds)
        traces = paired({name: step.traced for name, step in measured.items()}, max(rounds // 3, 1))
    lines = [HEADER]
    plain = measured["float32"].variant.counts
    for name, step in measured.items():
        counts = step.variant.counts
        cells = [f"{step.bits:.2f}", f"{step.error:.4f}", f"{counts['flops'] / plain['flops']:.3f}"]
        for count in ("argument_bytes", "temp_bytes", "residual_bytes"):
            cells.append(f"{counts[count] / MIB:.1f}")
        for seconds in (traces, times):
            if not seconds:
                cells.append("–")
                continue
            ratios = [x / y for x, y in zip(seconds[name], seconds["float32"], strict=True)]
            cells.append(f"{statistics.median(ratios):.2f}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", _over_hand_written(measured, times)])


def _over_hand_written(measured: dict[str, Step], times: dict[str, list[float]]) -> str:
    """Ours on one format, relative to the hand-written step on it."""
    ours, hand_written = (measured[name].variant.counts for name in (COMPARED, HAND_WRITTEN))
    counts = {"FLOPs": "flops", "temporary": "temp_bytes", "kept": "residual_bytes"}
    cells = [f"{label} {ours[key] / hand_written[key]:.3f}" for label, key in counts.items()]
    if times:
        ratios = [x / y for x, y in zip(times[COMPARED], times[HAND_WRITTEN], strict=True)]
        cells.append(f"step {statistics.median(ratios):.2f}")
    return f"{COMPARED} / hand-written: {', '.join(cells)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=11, help="of paired runs; 0 only counts")
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    options = parser.parse_args()
    print(f"JAX {jax.__version__} on {jax.devices()[0].device_kind}, LoRA of rank {RANK}")
    for name in options.workloads:
        print(f"\n{name}\n\n{table(WORKLOADS[name](), options.rounds)}", flush=True)


if __name__ == "__main__":
    main()
