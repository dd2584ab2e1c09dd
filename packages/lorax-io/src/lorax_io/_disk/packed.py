"""Packs 4-bit integers, two to a byte, since safetensors has no 4-bit type."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from .._errors import AdapterFileError

DTYPES = {np.dtype(dtype).name: np.dtype(dtype) for dtype in (jnp.int4, jnp.uint4)}


class Packed(NamedTuple):
    """How a 4-bit array is packed into bytes.

    Two neighbors along `axis` share a byte; the first is in the low bits. If no axis has an even
    size, `axis` is None and each entry takes one byte.
    """

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    axis: int | None

    @classmethod
    def of(cls, array: Any) -> Self:
        """The packing of an array: along the last even axis before the last one, else the last.

        The last axis but one is within the blocks of a quantized weight.
        """
        axes = [*range(array.ndim - 2, -1, -1), array.ndim - 1]
        even = [d for d in axes if d >= 0 and array.shape[d] % 2 == 0]
        return cls(np.dtype(array.dtype), tuple(array.shape), even[0] if even else None)

    @property
    def bytes_shape(self) -> tuple[int, ...]:
        """The shape of the bytes."""
        sizes = list(self.shape)
        if self.axis is not None:
            sizes[self.axis] //= 2
        return tuple(sizes)

    def settings(self) -> dict[str, Any]:
        """This packing as JSON data."""
        return {"dtype": self.dtype.name, "shape": list(self.shape), "axis": self.axis}

    @classmethod
    def from_settings(cls, name: str, settings: Any) -> Self:
        """The packing that `settings` describes; raises if they are invalid."""
        if isinstance(settings, dict) and settings.keys() == {"dtype", "shape", "axis"}:
            shape, axis = settings["shape"], settings["axis"]
            is_shape = isinstance(shape, list) and all(type(n) is int and n >= 0 for n in shape)
            is_axis = axis is None or (
                type(axis) is int and is_shape and 0 <= axis < len(shape) and shape[axis] % 2 == 0
            )
            if is_shape and is_axis and settings["dtype"] in [*DTYPES]:
                return cls(DTYPES[settings["dtype"]], tuple(shape), axis)
        raise AdapterFileError(f"its header does not say how `{name}` is packed.")

    def pack(self, array: Any) -> jax.Array:
        """Packs an array on its devices."""
        return _pack(jnp.asarray(array), self.axis)

    def pack_host(self, codes: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Packs codes of one byte each, on the host; signed ones as two's complement."""
        codes = codes.view(np.uint8)
        if self.axis is None:
            return codes & 15
        first: list[Any] = [slice(None)] * codes.ndim
        second = list(first)
        first[self.axis], second[self.axis] = slice(0, None, 2), slice(1, None, 2)
        packed = codes[tuple(second)] << 4
        packed |= codes[tuple(first)] & 15
        return packed

    def unpack(self, data: jax.Array, sharding: Sharding | None) -> jax.Array:
        """Unpacks bytes on their devices, to an array with this sharding."""
        # Until it is computed, the bytes are kept alive; without waiting, they would pile up.
        return jax.block_until_ready(_unpacking(self.axis, self.dtype.name, sharding)(data))

    def bytes_sharding(self, sharding: Sharding | None) -> Sharding | None:
        """The sharding of the bytes, given the array's: the packed axis is not sharded."""
        if not isinstance(sharding, NamedSharding) or self.axis is None:
            return sharding
        spec: Sequence[Any] = [*sharding.spec, *[None] * (len(self.shape) - len(sharding.spec))]
        parts = (None if d == self.axis else part for d, part in enumerate(spec))
        return NamedSharding(sharding.mesh, PartitionSpec(*parts), memory_kind=sharding.memory_kind)


@functools.partial(jax.jit, static_argnums=1)
def _pack(array: jax.Array, axis: int | None) -> jax.Array:
    codes = jax.lax.bitcast_convert_type(array, jnp.uint4).astype(jnp.uint8)
    if axis is None:
        return codes
    low = jax.lax.slice_in_dim(codes, 0, None, 2, axis)
    return low | (jax.lax.slice_in_dim(codes, 1, None, 2, axis) << 4)


def _unpacking(axis: int | None, dtype: str, sharding: Sharding | None) -> Any:
    def unpack(data: jax.Array) -> jax.Array:
        if axis is not None:
            shape = [*data.shape[:axis], 2 * data.shape[axis], *data.shape[axis + 1 :]]
            data = jnp.stack([data & 15, data >> 4], axis + 1).reshape(shape)
        return jax.lax.bitcast_convert_type(data.astype(jnp.uint4), DTYPES[dtype])

    return jax.jit(unpack) if sharding is None else jax.jit(unpack, out_shardings=sharding)
