"""Programs do not move more between devices than with hand-written LoRA, and do not move more base
weights than the plain model.

The tests read the compiled programs. They run with `jax_disable_most_optimizations`, which only
disables LLVM optimizations; the passes that place, join and remove collectives still run.
"""

import collections
import math
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from sharded import (
    EQUATIONS,
    LABELS,
    LAYOUTS,
    RANK,
    SETTINGS,
    SIZES,
    adapt,
    hand_written,
    loss_of,
    plain,
    setting,
)

import lorax

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# An asynchronous collective has a `-start` and a `-done`. The result of `-start` includes operands.
COLLECTIVE = re.compile(rf" = (.*?) ({'|'.join(KINDS)})(?:-done)?\(")
ARRAY = re.compile(r"\b[a-z]+(\d+)\[([\d,]*)\]")


class Moved(NamedTuple):
    """One result array of a collective."""

    kind: str
    entries: int
    bytes: int


def collectives(compiled):
    """The result arrays of each collective in a program. The body of a loop counts once."""
    moved = []
    for line in compiled.as_text().splitlines():
        if match := COLLECTIVE.search(line):
            result, kind = match.groups()
            arrays = [
                (int(bits), math.prod(map(int, filter(None, sizes.split(",")))))
                for bits, sizes in ARRAY.findall(result)
            ]
            assert arrays, line
            moved.append([Moved(kind, entries, entries * bits // 8) for bits, entries in arrays])
    return moved


def compiled(function, *args):
    return collectives(jax.jit(function).lower(*args).compile())


def counts(found):
    """The number of collectives of each kind, and the bytes of their results."""
    total = collections.Counter()
    for arrays in found:
        total[arrays[0].kind] += 1
        total[f"{arrays[0].kind} bytes"] += sum(moved.bytes for moved in arrays)
    return total


def weight_sizes(where):
    """The numbers of entries of weights, of their stacks, and of their shards."""
    weights = [math.prod(SIZES[label] for label in LABELS[name]) for name in EQUATIONS]
    return {
        weight * stack // shards
        for weight in weights
        for stack in (1, SIZES["l"])
        for shards in shard_counts(where)
    }


def shard_counts(where):
    return {1, *where.layout.mesh.values(), where.mesh.size}


def weights_among(found, where):
    moved = [moved for arrays in found for moved in arrays]
    sizes = weight_sizes(where)
    return collections.Counter(moved[:2] for moved in moved if moved.entries in sizes)


def test_counter_detects_every_collective():
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))

    @jax.shard_map(mesh=mesh, in_specs=P("d"), out_specs=(P(), P("d"), P("d"), P("d"), P("d")))
    def move(x):  # [5, 8] on each device
        return (
            jax.lax.psum(x, "d"),
            jax.lax.all_gather(x[:3], "d"),
            jax.lax.psum_scatter(x, "d", scatter_dimension=1, tiled=True),
            jax.lax.all_to_all(x[:4], "d", 1, 0, tiled=True),
            jax.lax.ppermute(x[:2], "d", [(k, (k + 1) % 8) for k in range(8)]),
        )

    counted = counts(compiled(move, np.ones((40, 8), np.float32)))
    assert counted == {
        **dict.fromkeys(KINDS, 1),
        "all-reduce bytes": 4 * 5 * 8,
        "all-gather bytes": 4 * 8 * 3 * 8,
        "reduce-scatter bytes": 4 * 5,
        "all-to-all bytes": 4 * 4 * 8,
        "collective-permute bytes": 4 * 2 * 8,
    }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weight_sizes_differ_from_other_arrays(layout):
    where = setting(layout, explicit=False, stacked=False)
    adapters = [LABELS[name] for name in EQUATIONS]
    sides = {
        math.prod(SIZES[label] for label in axes) for w in adapters for axes in ("d", w.strip("d"))
    }
    factors = {RANK * side * stack for side in sides for stack in (1, SIZES["l"])}
    rows = SIZES["b"] * SIZES["t"]
    activations = {rows * size for size in (SIZES["d"], RANK, *sides)}
    others = {size // shards for size in factors | activations for shards in shard_counts(where)}
    assert others.isdisjoint(weight_sizes(where))


# A list and a stack of layers move the same arrays, so for lists one layout suffices.
CHOSEN = {
    name: kind
    for name, kind in SETTINGS.items()
    if kind["stacked"] or kind["layout"] == "fully sharded and tensor"
}


@pytest.mark.parametrize("kind", CHOSEN.values(), ids=CHOSEN)
def test_collectives_do_not_exceed_hand_written_lora(kind):
    where = setting(**kind)
    with where.context():
        adapted = adapt(where)
        pair, (x, y) = (adapted.frozen, adapted.tunable), adapted.batch
        model, written = plain(where), hand_written(where)
        ours = lorax.lora(model, on_materialize="error")

        forward = compiled(ours, pair, x)
        assert counts(forward) <= counts(compiled(written, pair, x))
        assert weights_among(forward, where) <= weights_among(
            compiled(model, adapted.params, x), where
        )

        gradient = compiled(jax.value_and_grad(loss_of(ours)), *pair[::-1], x, y)
        expected = compiled(jax.value_and_grad(loss_of(written)), *pair[::-1], x, y)
        assert counts(gradient) <= counts(expected)
        # The gradient of the plain model with respect to its input, but not to a weight.
        to_input = compiled(jax.value_and_grad(plain_loss(model)), x, adapted.params, y)
        assert weights_among(gradient, where) <= weights_among(to_input, where)


def plain_loss(model):
    return lambda x, params, y: jnp.mean((model(params, x) - y) ** 2)


def test_merging_in_the_step_is_detected():
    where = setting("fully sharded and tensor", explicit=True, stacked=False)
    with where.context():
        adapted = adapt(where)
        x, y = adapted.batch
        merged = lambda pair, x: plain(where)(lorax.merge_params(*pair), x)  # noqa: E731
        step = jax.value_and_grad(loss_of(merged))
        gradient = compiled(step, adapted.tunable, adapted.frozen, x, y)
        to_input = compiled(jax.value_and_grad(plain_loss(plain(where))), x, adapted.params, y)
        assert not weights_among(gradient, where) <= weights_among(to_input, where)
