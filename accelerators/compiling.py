"""Compiles programs for a mesh, and reads the facts of their executables."""

import collections
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

# Instructions that do not allocate an array in memory: they only name one, or copy one to a place
# nearer to the processor.
NO_ARRAY = {"parameter", "get-tuple-element", "bitcast", "tuple", "copy-start", "copy-done"}
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?[\w.-]+ = (?:(\w+)\[([\d,]*)\]\S*|\(.*?\)) ([\w-]+)\(")
COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+) .*\{$")


class Facts(NamedTuple):
    """One executable: bytes of one device, and instructions by kind."""

    peak: int
    arguments: int
    temp: int
    flops: float | None  # None for a GPU
    collectives: collections.Counter[str]
    arrays: collections.Counter[int]  # number of arrays of each size
    floats: collections.Counter[int]  # those of floats of two bytes or more


def compiled(fn: Callable[..., Any], *shapes: Any, donated: Sequence[int] = ()) -> Facts:
    """Compiles `fn` for the devices in the shardings of `shapes`.

    `donated` are the positions of donated arguments.
    """
    executable = jax.jit(fn, donate_argnums=donated).lower(*shapes).compile()
    memory, cost = executable.memory_analysis(), executable.cost_analysis()
    kinds, arrays, floats = _instructions(executable.as_text())
    return Facts(
        memory.peak_memory_in_bytes,
        memory.argument_size_in_bytes,
        memory.temp_size_in_bytes,
        (cost or {}).get("flops"),
        collections.Counter({kind: kinds[kind] for kind in COLLECTIVES if kinds[kind]}),
        arrays,
        floats,
    )


def _instructions(
    text: str,
) -> tuple[collections.Counter[str], collections.Counter[int], collections.Counter[int]]:
    """Counts instructions by kind, their results by size, and results of floats by size.

    The instructions inside a fusion do not allocate arrays, and are left out.
    """
    kinds: collections.Counter[str] = collections.Counter()
    arrays: collections.Counter[int] = collections.Counter()
    floats: collections.Counter[int] = collections.Counter()
    fused = False
    for line in text.splitlines():
        if start := COMPUTATION.match(line):
            fused = "fused" in start[1]
        elif not fused and (instruction := INSTRUCTION.match(line)):
            dtype, dims, kind = instruction.groups()
            # A collective that overlaps with other work is two instructions.
            kinds[kind.removesuffix("-start")] += 1
            if kind not in NO_ARRAY:
                entries = math.prod(int(size) for size in (dims or "0").split(","))
                arrays[entries] += 1
                floats[entries] += dtype in ("bf16", "f16", "f32", "f64")
    return kinds, arrays, floats


def on_mesh(mesh: Mesh, tree: Any, partition: Callable[[Any], PartitionSpec]) -> Any:
    """Shapes of the leaves of `tree`, each with a sharding."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, partition(leaf))
        ),
        tree,
    )


def shapes_of(mesh: Mesh, fn: Callable[..., Any], *shapes: Any) -> Any:
    """The shapes and shardings of the results of `fn`; nothing is computed.

    Only a mesh with explicit axes carries shardings through a trace, so `fn` is traced on one.
    """
    explicit = jax.sharding.Mesh(
        mesh.devices, mesh.axis_names, axis_types=(AxisType.Explicit,) * mesh.devices.ndim
    )
    with jax.set_mesh(explicit):
        moved = on_mesh(explicit, shapes, lambda leaf: leaf.sharding.spec)
        traced = jax.eval_shape(fn, *moved)

    def partition(leaf: Any) -> PartitionSpec:
        return PartitionSpec() if leaf.sharding is None else leaf.sharding.spec

    return on_mesh(mesh, traced, partition)
