"""Placement of factors: each axis is sharded like the axis of the weight that it runs along."""

from collections.abc import Hashable, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec, Sharding


def factor_spec(
    spec: PartitionSpec, out: Sequence[Sequence[Hashable]], labels: Sequence[Hashable]
) -> PartitionSpec:
    """Returns the partition of a factor, given the partition of the weight.

    Args:
        spec: the partition of the weight.
        out: the labels of each axis of the weight.
        labels: the label of each axis of the factor. A label that the weight does not show, such as
            the rank, is replicated.
    """
    entries = {axis[0]: entry for axis, entry in zip(out, spec, strict=False) if len(axis) == 1}
    return PartitionSpec(*(entries.get(label) for label in labels))


def factor_sharding(
    sharding: Sharding, out: Sequence[Sequence[Hashable]], labels: Sequence[Hashable]
) -> Sharding:
    """Returns the sharding of a factor, given the sharding of the weight."""
    if not isinstance(sharding, NamedSharding):
        return sharding
    return NamedSharding(
        sharding.mesh,
        factor_spec(sharding.spec, out, labels),
        memory_kind=sharding.memory_kind,
    )


def sharded_like(array: jax.Array, other: jax.Array) -> jax.Array:
    """Reshards an array like one that it meets entry by entry, on a mesh with explicit axes.

    Axes of size one are broadcast, so they are replicated.
    """
    sharding = jax.typeof(other).sharding
    if AxisType.Explicit not in sharding.mesh.axis_types:
        return array
    sizes = zip(sharding.spec, array.shape, strict=True)
    spec = PartitionSpec(*(entry if size != 1 else None for entry, size in sizes))
    return jax.sharding.reshard(array, NamedSharding(sharding.mesh, spec))


def placement(array: Any) -> Sharding | None:
    """Returns the sharding of a committed array; None for uncommitted and NumPy arrays."""
    return array.sharding if getattr(array, "committed", False) else None


def devices_of(array: Any) -> set[Any]:
    """Returns the devices that hold an array; an empty set for a NumPy array."""
    return array.sharding.device_set if isinstance(array, jax.Array) else set()


def in_device_memory(array: Any) -> Any:
    """Returns the array, or a copy in device memory if it is offloaded to the host.

    XLA does not add arrays in different memories.
    """
    sharding = placement(array)
    if sharding is None:
        return array
    kind = next(iter(sharding.device_set)).default_memory().kind
    if sharding.memory_kind in (None, kind):
        return array
    return jax.device_put(array, sharding.with_memory_kind(kind))
