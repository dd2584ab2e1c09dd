"""Counts what `lora(model)` costs against the same model with hand-written LoRA.

    python benchmarks/costs.py [--json FILE]

FLOPs, temporary bytes and HLO instructions are XLA's own analysis of the compiled programs: they
are exact, and the same on every run. Trace time is a ratio of paired runs. At the end each kind of
adapter is counted beside LoRA, as `python benchmarks/kinds.py --rounds 0` does.
"""

import argparse
import json
import pathlib
import statistics
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import kinds
import lorax
import models
import table
from adapted import adapt
from counts import compiled, count, paired, trace_seconds
from ways import ByHand

RANK = 8
DEPTHS = (12, 24, 48)


def cases() -> Iterator[tuple[str, models.Model]]:
    """Made one by one, so that only one model is in memory."""
    for remat, suffix in ((False, ""), (True, ", remat")):
        yield f"12 blocks{suffix}", models.blocks(remat=remat)
        yield f"12 blocks scanned{suffix}", models.blocks(scan=True, remat=remat)
    yield "MLP", models.mlp()
    yield "convnet", models.convnet()
    yield "embedding, tied head", models.tied()


class Pair(NamedTuple):
    """A program, ours and hand-written, each as a function and its arguments."""

    name: str
    ours: tuple[Any, ...]
    by_hand: tuple[Any, ...]


def programs(model: models.Model) -> list[Pair]:
    """Forward and gradient of the factors."""
    adapted = adapt(model, RANK)
    ours = adapted.ours, adapted.tunable, adapted.frozen, model.batch
    by_hand = model.written(ByHand()), adapted.factors, model.params, model.batch
    return [
        Pair("forward", ours, by_hand),
        Pair("gradient", (gradient(ours[0]), *ours[1:]), (gradient(by_hand[0]), *by_hand[1:])),
    ]


def gradient(fn: Callable[..., jax.Array]) -> Callable[..., Any]:
    return jax.grad(lambda *args: jnp.mean(fn(*args) ** 2))


def assert_equal(ours: Any, theirs: Any) -> None:
    """Counts of two programs mean nothing unless both compute the same."""
    for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        error, largest = jnp.max(jnp.abs(x - y)), jnp.max(jnp.abs(y))
        assert x.shape == y.shape and largest > 0 and error < 1e-4 * largest, (error, largest)


def measure(pairs: int) -> Iterator[table.Row]:
    for name, model in cases():
        for program, ours, by_hand in programs(model):
            assert_equal(jax.jit(ours[0])(*ours[1:]), jax.jit(by_hand[0])(*by_hand[1:]))
            counts = (count(compiled(*side)) for side in (ours, by_hand))
            yield table.Row(name, program, *counts, traces(ours, by_hand, pairs).ratio)


class Traces(NamedTuple):
    """How long tracing takes: medians over pairs of runs."""

    seconds: float  # of ours
    ratio: float  # to hand-written


def traces(ours: tuple[Any, ...], by_hand: tuple[Any, ...], pairs: int) -> Traces:
    sides = {
        "ours": partial(trace_seconds, *ours),
        "hand-written": partial(trace_seconds, *by_hand),
    }
    found = paired(sides, pairs)
    ratios = [x / y for x, y in zip(found["ours"], found["hand-written"], strict=True)]
    return Traces(statistics.median(found["ours"]), statistics.median(ratios))


class Depth(NamedTuple):
    """The gradient of an unrolled model of some blocks."""

    layers: int
    milliseconds_per_layer: float
    trace: float  # of hand-written


def depths(pairs: int) -> Iterator[Depth]:
    for layers in DEPTHS:
        _, (_, ours, by_hand) = programs(models.blocks(layers))
        found = traces(ours, by_hand, pairs)
        yield Depth(layers, 1e3 * found.seconds / layers, found.ratio)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="also write a file")
    parser.add_argument("--pairs", type=int, default=7, help="of runs for the trace time")
    options = parser.parse_args()

    # What is materialized has no twin to be compared with.
    warnings.simplefilter("error", lorax.MaterializeWarning)
    warnings.simplefilter("error", lorax.UnusedAdapterWarning)
    print(f"JAX {jax.__version__} on {jax.devices()[0].device_kind}, rank {RANK}, float32")
    print(table.HEADER)
    rows = []
    for row in measure(options.pairs):
        print(table.line(row), flush=True)
        rows.append(row)
    print(table.summary(rows))
    print("\nTracing the gradient of unrolled blocks:")
    by_depth = []
    for found in depths(options.pairs):
        print(
            f"{found.layers} blocks: {found.milliseconds_per_layer:.1f} ms a block, "
            f"{found.trace:.2f} of hand-written",
            flush=True,
        )
        by_depth.append(found._asdict())
    kinds.show()
    if options.json:
        about = {"jax": jax.__version__, "device": jax.devices()[0].device_kind, "rank": RANK}
        rows_found = [table.as_dict(row) for row in rows]
        found = {"about": about, "rows": rows_found, "depths": by_depth}
        options.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
