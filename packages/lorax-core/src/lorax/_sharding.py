"""Where factors live: each axis of a factor is sharded as the weight's axis it runs over."""

from collections.abc import Hashable, Sequence

from jax.sharding import NamedSharding, PartitionSpec, Sharding


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
