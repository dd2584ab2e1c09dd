"""Counts what `lora(model)` costs against the same model with LoRA written in by hand.

    python benchmarks/run.py [--json FILE]

FLOPs, temporary bytes and HLO instructions are XLA's own analysis of the compiled programs: they
are exact, and the same on every run. Trace time is a ratio of paired runs.
"""

import argparse
import json
import pathlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import by_hand
import lorax
import models
import table
from counts import count, trace_ratio
from lorax.testing import random_factors

RANK = 8


class Case(NamedTuple):
    """A plain model, and its hand-written twin."""

    name: str
    model: models.Model
    by_hand: Callable[..., jax.Array]


def cases() -> Iterator[Case]:
    """Made one by one, so that only one model is in memory."""
    for remat, suffix in ((False, ""), (True, ", remat")):
        yield Case(f"12 blocks{suffix}", models.unrolled(remat), by_hand.unrolled(remat))
        yield Case(f"12 blocks scanned{suffix}", models.scanned(remat), by_hand.scanned(remat))
    yield Case("MLP", models.mlp(), by_hand.mlp)
    yield Case("convnet", models.convnet(), by_hand.convnet)
    yield Case("embedding, tied head", models.tied(), by_hand.tied)


def programs(case: Case) -> Iterator[tuple[str, Callable[..., Any], Any, Callable[..., Any], Any]]:
    """Forward and gradient of the factors, each as ours and theirs with their arguments."""
    apply, params, batch = case.model
    spec = lorax.infer_spec(apply, params, batch, rank=RANK)
    frozen, tunable = lorax.init_lora(params, spec, jax.random.key(2))
    # Random, since fresh factors have `b = 0`; small, so that twelve layers stay tame.
    tunable = jax.tree.map(lambda leaf: leaf / 8, random_factors(tunable, jax.random.key(3)))
    factors = jax.tree.map(
        lambda weight: {"a": weight.a, "b": weight.b},
        tunable,
        is_leaf=lambda node: isinstance(node, lorax.LoraWeight),
    )
    adapted = lorax.lora(apply)

    def ours(tunable, frozen, batch):
        return adapted((frozen, tunable), batch)

    def gradient(fn):
        return jax.grad(lambda *args: jnp.mean(fn(*args) ** 2))

    arguments = (tunable, frozen, batch), (factors, params, batch)
    yield "forward", ours, arguments[0], case.by_hand, arguments[1]
    yield "gradient", gradient(ours), arguments[0], gradient(case.by_hand), arguments[1]


def assert_equal(ours: Any, theirs: Any) -> None:
    """Counts of two programs mean nothing unless both compute the same."""
    for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        error, largest = jnp.max(jnp.abs(x - y)), jnp.max(jnp.abs(y))
        assert x.shape == y.shape and largest > 0 and error < 1e-4 * largest, (error, largest)


def measure(pairs: int) -> Iterator[table.Row]:
    for case in cases():
        for what, ours, our_args, theirs, their_args in programs(case):
            assert_equal(jax.jit(ours)(*our_args), jax.jit(theirs)(*their_args))
            yield table.Row(
                case.name,
                what,
                count(ours, *our_args),
                count(theirs, *their_args),
                trace_ratio(ours, our_args, theirs, their_args, pairs),
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="also write a file")
    parser.add_argument("--pairs", type=int, default=7, help="of runs for the trace time")
    options = parser.parse_args()

    # What is built in full has no twin to be compared with.
    warnings.simplefilter("error", lorax.MaterializeWarning)
    warnings.simplefilter("error", lorax.UnusedAdapterWarning)
    print(f"JAX {jax.__version__} on {jax.devices()[0].device_kind}, rank {RANK}, float32")
    print(table.HEADER)
    rows = []
    for row in measure(options.pairs):
        print(table.line(row), flush=True)
        rows.append(row)
    print(table.summary(rows))
    if options.json:
        about = {"jax": jax.__version__, "device": jax.devices()[0].device_kind, "rank": RANK}
        found = {"about": about, "rows": [table.as_dict(row) for row in rows]}
        options.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
