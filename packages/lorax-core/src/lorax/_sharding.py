"""Where factors live: each axis of a factor is sharded as the weight's axis it runs over."""

from collections.abc import Hashable, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec, Sharding


def factor_spec(
    spec: PartitionSpec, out: Sequence[Sequence[Hashable]], labels: Sequence[Hashable]
) -> PartitionSpec:
    """The partition of a factor, for the partition of the weight.

    Args:
        spec: the weight's partition.
        out: the labels of each of the weight's axes.
        labels: the label of each of the factor's axes; one that the weight does not show, such
            as the rank, is replicated.
    """
    entries = {axis[0]: entry for axis, entry in zip(out, spec, strict=False) if len(axis) == 1}
    return PartitionSpec(*(entries.get(label) for label in labels))


def factor_sharding(
    sharding: Sharding, out: Sequence[Sequence[Hashable]], labels: Sequence[Hashable]
) -> Sharding:
    """The sharding of a factor, for the sharding of the weight."""
    if not isinstance(sharding, NamedSharding):
        return sharding
    return NamedSharding(
        sharding.mesh,
        factor_spec(sharding.spec, out, labels),
        memory_kind=sharding.memory_kind,
    )


def sharded_like(array: jax.Array, other: jax.Array) -> jax.Array:
    """The array with the sharding of one that it meets entry by entry, on a mesh of explicit axes.

    Axes of size one are broadcast there.
    """
    sharding = jax.typeof(other).sharding
    if AxisType.Explicit not in sharding.mesh.axis_types:
        return array
    sizes = zip(sharding.spec, array.shape, strict=True)
    spec = PartitionSpec(*(entry if size != 1 else None for entry, size in sizes))
    return jax.sharding.reshard(array, NamedSharding(sharding.mesh, spec))


def placement(array: Any) -> Sharding | None:
    """Where the user put an array; None for one that JAX may move: uncommitted, or NumPy's."""
    return array.sharding if getattr(array, "committed", False) else None


def devices_of(array: Any) -> set[Any]:
    """The devices that hold an array; none for NumPy's."""
    return array.sharding.device_set if isinstance(array, jax.Array) else set()


def in_device_memory(array: Any) -> Any:
    """The array itself, or its copy on the device where it is offloaded to the host.

    XLA adds no arrays of different memories.
    """
    sharding = placement(array)
    if sharding is None:
        return array
    kind = next(iter(sharding.device_set)).default_memory().kind
    if sharding.memory_kind in (None, kind):
        return array
    return jax.device_put(array, sharding.with_memory_kind(kind))
