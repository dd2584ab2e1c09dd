"""Moving arrays between devices and host memory, and coordinating processes."""

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from .._errors import AdapterError
from .._tree import FrozenFactors, all_arrays, rows_of, with_leaves


def to_host(array: Any) -> np.ndarray[Any, Any]:
    """The whole array in this process's memory; each shard is copied once.

    If other processes hold a part of it, all processes must call this for the same arrays in the
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
        # `shard.data` is a separate array: its copy is not kept with the array, as that of
        # `np.asarray(array)` would be.
        return np.asarray(array.addressable_shards[0].data)
    whole = np.empty(array.shape, array.dtype)
    for shard in shards:
        whole[shard.index] = shard.data
    return whole


@contextmanager
def one_writer() -> Generator[bool]:
    """Yields True in the process that writes; the others wait for it at the end of the block.

    An error in one process is raised in all of them, so that none continues without the file.
    """
    with _together("could not write the adapter"):
        yield jax.process_index() == 0


@contextmanager
def all_read(*places: Any) -> Generator[None]:
    """Inside this block, if one process cannot read, all of them raise.

    Args:
        places: trees of arrays, shapes or shardings. Processes wait for each other only if one of
            the shardings spans several processes.
    """
    leaves = [getattr(leaf, "sharding", leaf) for leaf in jax.tree.leaves(places)]
    if all(leaf.is_fully_addressable for leaf in leaves if isinstance(leaf, Sharding)):
        yield
        return
    with _together("could not read its part of the adapter"):
        yield


@contextmanager
def _together(failure: str) -> Generator[None]:
    """An error of one process inside this block is raised in all processes."""
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
    """The processes in which `here` is true; every process waits for all others."""
    devices = np.array(jax.devices())
    mesh = jax.sharding.Mesh(devices, ("device",))
    votes = jax.make_array_from_callback(
        devices.shape,
        NamedSharding(mesh, PartitionSpec("device")),
        lambda index: np.full(devices[index].shape, here),
    )
    # Copied, not summed: a computation would have to use the mesh that the user may have set.
    return sorted({device.process_index for device in devices[to_host(votes)]})


def place(
    shape: tuple[int, ...],
    dtype: Any,
    read: Callable[[Any], np.ndarray[Any, Any]],
    sharding: Sharding | None,
) -> jax.Array:
    """An array on the devices of a sharding; `read(index)` returns the part that one holds."""
    if sharding is None:
        array = jnp.asarray(read(tuple(slice(None) for _ in shape)))
    else:
        array = jax.make_array_from_callback(shape, sharding, read, dtype=dtype)
    # Until the transfer ends, the host copy is kept alive; without waiting, copies would pile up.
    jax.block_until_ready(array)
    jax.device_put(np.int8(0))  # JAX lets go of the copies of finished transfers in its next call
    return array


def sharding_of(array: Any) -> Sharding | None:
    """The sharding of an array or shape; None if it is not committed to devices."""
    return getattr(array, "sharding", None) if getattr(array, "committed", True) else None


def sharding_like_base(base: Any, axes: Sequence[int | None]) -> Sharding | None:
    """The sharding of a factor of a base: axis k is sharded like the base's axis `axes[k]`.

    An axis k for which `axes[k]` is None is not sharded.
    """
    sharding = sharding_of(base)
    if not isinstance(sharding, NamedSharding):
        return sharding
    spec = [*sharding.spec, *[None] * (len(base.shape) - len(sharding.spec))]
    parts = (None if d is None else spec[d] for d in axes)
    return NamedSharding(sharding.mesh, PartitionSpec(*parts), memory_kind=sharding.memory_kind)


def shape_of(array: Any) -> jax.ShapeDtypeStruct:
    """The shape, dtype and sharding of an array."""
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding_of(array))


def placements(
    rows: Mapping[str, Any], frozen: FrozenFactors, structure: Any, paths: Any, sharding: Any
) -> dict[str, Sharding | None]:
    """The sharding of each array of the rows, by name.

    Args:
        rows: rows of shapes with their default shardings.
        frozen: frozen factors of the bases; a tree of shardings does not cover these.
        structure: the structure of the tree.
        paths: the paths of its leaves.
        sharding: the user's choice: one sharding, a tree of them, or None for the default.
    """
    own = {name: array.sharding for name, array in all_arrays(rows, frozen).items()}
    if sharding is None:
        return own
    if isinstance(sharding, Sharding):
        return dict.fromkeys(own, sharding)
    spread = jax.tree.broadcast(sharding, with_leaves(structure, paths, rows))
    return own | all_arrays(dict(rows_of(spread)))
