"""Arrays between devices and this process's memory, and processes that agree."""

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from .._errors import AdapterError
from .._tree import Held, all_arrays, rows_of, with_leaves


def to_host(array: Any) -> np.ndarray[Any, Any]:
    """The whole array in this process's memory, each of its shards copied once.

    Where other processes hold a part of it, all of them must call this for the same arrays in the
    same order.
    """
    if not isinstance(array, jax.Array):
        return np.asarray(array)
    if not array.is_fully_addressable and not array.is_fully_replicated:
        assert isinstance(array.sharding, NamedSharding), array.sharding
        everywhere = NamedSharding(array.sharding.mesh, PartitionSpec())
        array = jax.jit(lambda x: x, out_shardings=everywhere)(array)
    shards = [shard for shard in array.addressable_shards if shard.replica_id == 0]
    if array.is_fully_replicated or len(shards) == 1:
        # `shard.data` is a separate array: its copy is not kept beside the array, as that of
        # `np.asarray(array)` would be.
        return np.asarray(array.addressable_shards[0].data)
    whole = np.empty(array.shape, array.dtype)
    for shard in shards:
        whole[shard.index] = shard.data
    return whole


@contextmanager
def one_writer() -> Generator[bool]:
    """True in the process that writes; the others wait for it at the end of the block.

    An error of the writer is raised in every process, so that none continues without a file.
    """
    with _together("could not write the adapter"):
        yield jax.process_index() == 0


@contextmanager
def all_read(*places: Any) -> Generator[None]:
    """If one process cannot read, all of them raise.

    Args:
        places: trees of arrays, shapes or shardings. Processes wait for each other only where one
            of them says that an array is in several.
    """
    leaves = [getattr(leaf, "sharding", leaf) for leaf in jax.tree.leaves(places)]
    if all(leaf.is_fully_addressable for leaf in leaves if isinstance(leaf, Sharding)):
        yield
        return
    with _together("could not read its part of the adapter"):
        yield


@contextmanager
def _together(failure: str) -> Generator[None]:
    """Every process ends the block, or none: the error of one is an error in all of them."""
    if jax.process_count() == 1:
        yield
        return
    error: Exception | None = None
    try:
        yield
    except Exception as raised:
        error = raised
    failed = _where(error is not None)
    if error is not None:
        raise error
    if failed:
        raise AdapterError(f"{failure}; its own message says why.", f"process {failed[0]}")


def _where(here: bool) -> list[int]:
    """The processes that say so; each waits for the others."""
    devices = np.array(jax.devices())
    mesh = jax.sharding.Mesh(devices, ("device",))
    votes = jax.make_array_from_callback(
        devices.shape,
        NamedSharding(mesh, PartitionSpec("device")),
        lambda index: np.full(devices[index].shape, here),
    )
    # Copied, not summed: an operation would have to be of the mesh that the user has set.
    return sorted({device.process_index for device in devices[to_host(votes)]})


def place(
    shape: tuple[int, ...],
    dtype: Any,
    read: Callable[[Any], np.ndarray[Any, Any]],
    sharding: Sharding | None,
) -> jax.Array:
    """An array on the devices of a sharding; `read(index)` is asked for the parts they hold."""
    if sharding is None:
        array = jnp.asarray(read(tuple(slice(None) for _ in shape)))
    else:
        array = jax.make_array_from_callback(shape, sharding, read, dtype=dtype)
    # Until it is there, what was read is held, and more would be read meanwhile.
    return jax.block_until_ready(array)


def sharding_of(array: Any) -> Sharding | None:
    """Where an array was put; None where it was not placed."""
    return getattr(array, "sharding", None) if getattr(array, "committed", True) else None


def sharding_beside(base: Any, axes: Sequence[int | None]) -> Sharding | None:
    """Where an array goes whose axis k is the base's `axes[k]`, or none of its: as the base."""
    sharding = sharding_of(base)
    if not isinstance(sharding, NamedSharding):
        return sharding
    spec = [*sharding.spec, *[None] * (len(base.shape) - len(sharding.spec))]
    parts = (None if d is None else spec[d] for d in axes)
    return NamedSharding(sharding.mesh, PartitionSpec(*parts), memory_kind=sharding.memory_kind)


def shape_of(array: Any) -> jax.ShapeDtypeStruct:
    """The shape of an array, and where it is."""
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding_of(array))


def placements(
    rows: Mapping[str, Any], held: Held, structure: Any, paths: Any, sharding: Any
) -> dict[str, Sharding | None]:
    """Where to put the arrays of the rows, by name.

    Args:
        rows: of shapes, which have their own shardings.
        held: the frozen factors beside the bases, which a tree of shardings has no place for.
        structure: of the tree.
        paths: of its leaves.
        sharding: what the user says instead: a sharding, or a tree of them, or None.
    """
    own = {name: array.sharding for name, array in all_arrays(rows, held).items()}
    if sharding is None:
        return own
    if isinstance(sharding, Sharding):
        return dict.fromkeys(own, sharding)
    spread = jax.tree.broadcast(sharding, with_leaves(structure, paths, rows))
    return own | all_arrays(dict(rows_of(spread)))
