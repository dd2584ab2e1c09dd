"""What the readers of quantized weights share: how tensors of a file become arrays of a format.

The module of each library finds the tensors of a weight and maps them to the arrays of a format of
`lorax.bases`, without decoding them. Arrays are read by rows, so that only a few rows are unpacked
at a time.
"""

import contextlib
from collections.abc import Callable, Generator, Iterable, Mapping
from typing import Any, NamedTuple, Protocol

import jax.numpy as jnp
import numpy as np

from lorax.bases import Format

from ..._errors import AdapterError, AdapterFileError, UnsupportedAdapterError
from ..._places import Array

EXPONENT = np.dtype(jnp.float8_e8m0fnu)  # of scales that are powers of two
UNORDERED = "its groups are not neighbors (desc_act)"


class Tensors(Protocol):
    """The tensors of a checkpoint by name, each read when it is used."""

    config: Mapping[str, Any]  # the model's config; empty if there is none

    def __contains__(self, name: str) -> bool:
        """Whether there is such a tensor."""
        ...

    def view(self, name: str) -> Array:
        """The tensor as it is in the file."""
        ...

    def beginning(self, prefix: str) -> Iterable[str]:
        """The names of the tensors that begin with a prefix."""
        ...


class Part(NamedTuple):
    """One array of a quantized weight, with the same axes as the weight in the file.

    Attributes:
        read: reads a slice of rows, which has a start and a stop.
        grains: for each axis, how many entries of the weight share an entry of the array, up to the
            whole axis. The last block of an axis may be shorter.
        shape: the array's shape.
        dtype: the array's dtype in memory; `read` returns 4-bit codes as one byte each.
    """

    read: Callable[[slice], Array]
    grains: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: Any


class Coded(NamedTuple):
    """A quantized weight that a format of `lorax.bases` decodes.

    Attributes:
        names: the tensors that it consists of.
        format: decodes it; its blocks follow from the `grains` of the parts.
        parts: its arrays by name.
        shape: the weight's shape.
        dtype: the dtype of the decoded weight; None if the file does not specify it.
        is_cut: whether blocks of the file cross rows, so that `grains` are shorter than a block.
        assumed: what the file leaves open and was assumed, as a clause.
        stored: for each array, the name, shape and dtype of its tensor, if every array is stored
            unchanged, with scales of two or more bytes, so that it can be written again; else
            empty.
    """

    names: tuple[str, ...]
    format: Format
    parts: Mapping[str, Part]
    shape: tuple[int, ...]
    dtype: Any = None
    is_cut: bool = False
    assumed: str = ""
    stored: Mapping[str, tuple[str, tuple[int, ...], Any]] = {}


class Decoded(NamedTuple):
    """A quantized weight that no format of `lorax.bases` can hold, so that it must be decoded.

    Attributes:
        names: the tensors that it consists of.
        why: why no format can hold it, as a clause.
        read: decodes a slice of rows, which has a start and a stop.
        shape: the weight's shape.
        dtype: the dtype of the decoded weight.
    """

    names: tuple[str, ...]
    why: str
    read: Callable[[slice], Array]
    shape: tuple[int, ...]
    dtype: Any


AnyCoded = Coded | Decoded
Finder = Callable[[Tensors, str, str], AnyCoded | None]


@contextlib.contextmanager
def fitting(name: str) -> Generator[None]:
    """Inside this block, errors of mismatched tensors are raised as errors of the file."""
    try:
        yield
    except (ValueError, TypeError, ArithmeticError, LookupError) as error:
        if isinstance(error, AdapterError):
            raise
        message = f"has tensors of `{name}` that do not fit each other: {error}."
        raise AdapterFileError(message) from error


def whole(array: Array, grains: tuple[int, ...], dtype: Any = None) -> Part:
    """A part that is stored in the file unchanged."""
    dtype = array.dtype if dtype is None else dtype
    return Part(lambda rows: array[rows], grains, array.shape, dtype)


def stored(**arrays: tuple[str, Array]) -> dict[str, tuple[str, tuple[int, ...], Any]]:
    """The value of `Coded.stored` for arrays given by the names and the views of their tensors."""
    return {key: (name, array.shape, array.dtype) for key, (name, array) in arrays.items()}


def need(tensors: Tensors, name: str, *, ndim: int | None = None, dtypes: Any = None) -> Array:
    """A view of a tensor; raises if it is absent or has another number of axes or another dtype."""
    if name not in tensors:
        raise AdapterFileError(f"lacks `{name}`, which belongs to a quantized weight.")
    view = tensors.view(name)
    fits = dtypes is None or view.dtype in [np.dtype(dtype) for dtype in dtypes]
    if not fits or ndim not in (None, view.ndim):
        raise AdapterFileError(f"has `{name}` of {view.dtype} {view.shape}, which is not a part "
                               "of a quantized weight.")  # fmt: skip
    return view


def need_scales(
    tensors: Tensors, name: str, *, ndim: int | None = None, of_floats: bool = False
) -> Array:
    """A view of scales; raises if they are absent, not floats, or wider than JAX's own.

    Args:
        tensors: the checkpoint.
        name: of the scales.
        ndim: how many axes they have; None: any.
        of_floats: whether codes are 8-bit floats. Their scales may be 8-bit floats, or bytes, which
            are powers of two; those of integers have the dtype of the decoded weight.
    """
    scales = need(tensors, name, ndim=ndim)
    if of_floats and scales.dtype == np.uint8:
        return scales.view(EXPONENT)
    is_float, size = jnp.issubdtype(scales.dtype, jnp.floating), scales.dtype.itemsize
    if not is_float or size > 4 or (size == 1 and not of_floats):
        sizes = "up to 32" if of_floats else "16 or 32"
        raise AdapterFileError(f"has `{name}` in {scales.dtype}, not floats of {sizes} bits.")
    return scales


def expect(name: str, array: Array, shape: tuple[int, ...]) -> Array:
    """The array; raises if it has another shape."""
    if array.shape != shape:
        raise AdapterFileError(f"has `{name}` of shape {array.shape}; {shape} would fit.")
    return array


def check_groups(name: str, groups: Array, count: int) -> None:
    """Raises unless each input is in one of the groups that have scales."""
    if groups.min() < 0 or groups.max() >= count:
        raise AdapterFileError(f"has a group without a scale in `{name}`.")


def in_groups(
    codes: Callable[[slice], Array],
    zeros: Callable[[slice], Array],
    scales: Callable[[slice], Array],
    groups: Array,
) -> Callable[[slice], Array]:
    """Decodes rows whose entries are in these groups, in any order: (codes − zeros) · scales."""

    def read(rows: slice) -> Array:
        scale = scales(rows)[:, groups]
        steps = codes(rows).astype(np.int16) - zeros(rows)[:, groups]
        return steps.astype(scale.dtype) * scale

    return read


def nibbles(data: Array, *, high_first: bool = False) -> Array:
    """Unpacks 4-bit codes along the last axis, to one byte each."""
    codes = np.empty((*data.shape, 2), np.uint8)
    np.bitwise_and(data, 15, out=codes[..., 1 if high_first else 0])
    np.right_shift(data, 4, out=codes[..., 0 if high_first else 1])
    return codes.reshape(*data.shape[:-1], 2 * data.shape[-1])


def from_words(words: Array, bits: int) -> Array:
    """Unpacks 4- or 8-bit codes from int32 words, lowest bits first, to one byte each."""
    data = np.ascontiguousarray(words).astype("<i4", copy=False).view(np.uint8)
    return nibbles(data) if bits == 4 else data


def check_bits(name: str, bits: Any) -> int:
    """The number of bits as an int; raises if it is neither 4 nor 8."""
    if bits not in (4, 8):
        raise UnsupportedAdapterError(
            f"has `{name}` in codes of {bits} bits; those of 4 and 8 bits are read."
        )
    return int(bits)


def setting(tensors: Tensors, key: str, default: Any = None) -> Any:
    """A setting from `quantization_config` in the model's config."""
    settings = tensors.config.get("quantization_config")
    return settings.get(key, default) if isinstance(settings, dict) else default
