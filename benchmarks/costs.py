"""Counts what `lora(model)` costs, relative to the same model with hand-written LoRA.

    python benchmarks/costs.py [--json FILE]

FLOPs, temporary bytes and HLO instructions come from XLA's analysis of the compiled programs: they
are exact, and the same on every run. Trace time is a ratio of paired runs. At the end each kind of
adapter is compared with LoRA, as `python benchmarks/kinds.py --rounds 0` does.
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

import costs_table
import kinds
import lorax
import models
from adapted import adapt
from counts import compiled, count, paired, trace_seconds
from layer_ops import LoraOps

RANK = 8
DEPTHS = (12, 24, 48)


def cases() -> Iterator[tuple[str, models.Model]]:
    """Yields one model at a time, so that only one is in memory."""
    for remat, suffix in ((False, ""), (True, ", remat")):
        yield f"12 blocks{suffix}", models.blocks(remat=remat)
        yield f"12 blocks scanned{suffix}", models.blocks(scan=True, remat=remat)
    yield "MLP", models.mlp()
    yield "convnet", models.convnet()
    yield "embedding, tied head", models.tied()


class Pair(NamedTuple):
    """A program, ours and hand-written, each as a function followed by its arguments."""

    name: str
    ours: tuple[Any, ...]
    hand_written: tuple[Any, ...]


def programs(model: models.Model) -> list[Pair]:
    """Forward and gradient of the factors."""
    adapted = adapt(model, RANK)
    ours = adapted.apply, adapted.tunable, adapted.frozen, model.batch
    hand_written = model.with_ops(LoraOps()), adapted.factors, model.params, model.batch
    return [
        Pair("forward", ours, hand_written),
        Pair(
            "gradient",
            (gradient(ours[0]), *ours[1:]),
            (gradient(hand_written[0]), *hand_written[1:]),
        ),
    ]


def gradient(fn: Callable[..., jax.Array]) -> Callable[..., Any]:
    return jax.grad(lambda *args: jnp.mean(fn(*args) ** 2))


def assert_same(ours: Any, hand_written: Any) -> None:
    """Fails unless both compute the same: otherwise their counts cannot be compared."""
    for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(hand_written), strict=True):
        error, largest = jnp.max(jnp.abs(x - y)), jnp.max(jnp.abs(y))
        assert x.shape == y.shape and largest > 0 and error < 1e-4 * largest, (error, largest)


def measure(pairs: int) -> Iterator[costs_table.Row]:
    for name, model in cases():
        for program, ours, hand_written in programs(model):
            assert_same(jax.jit(ours[0])(*ours[1:]), jax.jit(hand_written[0])(*hand_written[1:]))
            counts = (count(compiled(*side)) for side in (ours, hand_written))
            yield costs_table.Row(name, program, *counts, traces(ours, hand_written, pairs).ratio)


class Traces(NamedTuple):
    """Trace times: medians over pairs of runs."""

    seconds: float  # of ours
    ratio: float  # to hand-written


def traces(ours: tuple[Any, ...], hand_written: tuple[Any, ...], pairs: int) -> Traces:
    sides = {
        "ours": partial(trace_seconds, *ours),
        "hand-written": partial(trace_seconds, *hand_written),
    }
    seconds = paired(sides, pairs)
    ratios = [x / y for x, y in zip(seconds["ours"], seconds["hand-written"], strict=True)]
    return Traces(statistics.median(seconds["ours"]), statistics.median(ratios))


class Depth(NamedTuple):
    """Trace times of the gradient of an unrolled model with this number of blocks."""

    layers: int
    milliseconds_per_layer: float
    trace: float  # ratio to hand-written


def depths(pairs: int) -> Iterator[Depth]:
    for layers in DEPTHS:
        _, (_, ours, hand_written) = programs(models.blocks(layers))
        traced = traces(ours, hand_written, pairs)
        yield Depth(layers, 1e3 * traced.seconds / layers, traced.ratio)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="also write a file")
    parser.add_argument("--pairs", type=int, default=7, help="of runs for the trace time")
    options = parser.parse_args()

    # No hand-written model here materializes a weight.
    warnings.simplefilter("error", lorax.MaterializeWarning)
    warnings.simplefilter("error", lorax.UnusedAdapterWarning)
    print(f"JAX {jax.__version__} on {jax.devices()[0].device_kind}, rank {RANK}, float32")
    print(costs_table.HEADER)
    rows = []
    for row in measure(options.pairs):
        print(costs_table.line(row), flush=True)
        rows.append(row)
    print(costs_table.summary(rows))
    print("\nTracing the gradient of unrolled blocks:")
    by_depth = []
    for depth in depths(options.pairs):
        print(
            f"{depth.layers} blocks: {depth.milliseconds_per_layer:.1f} ms per block, "
            f"{depth.trace:.2f} of hand-written",
            flush=True,
        )
        by_depth.append(depth._asdict())
    kinds.show()
    if options.json:
        about = {"jax": jax.__version__, "device": jax.devices()[0].device_kind, "rank": RANK}
        as_dicts = [costs_table.as_dict(row) for row in rows]
        results = {"about": about, "rows": as_dicts, "depths": by_depth}
        options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
