"""A coding: how one library stores the codes of a weight, read without decoding them.

A coding finds the tensors of a weight and says what each array of a format of `lorax.bases` is made
of. Every array is read by rows, so that no more than some of them are unpacked at a time.
"""

import contextlib
from collections.abc import Callable, Generator, Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np

from lorax import LoraxError
from lorax.bases import Format

from ..._errors import AdapterFileError, UnsupportedAdapterError
from ..._places import Array


class Tensors(Protocol):
    """The tensors of a checkpoint by name, none of which is read before it is used."""

    config: Mapping[str, Any]  # the model's, empty where there is none

    def __contains__(self, name: str) -> bool:
        """Whether there is such a tensor."""
        ...

    def view(self, name: str) -> Array:
        """The tensor as it is in the file."""
        ...


class Part(NamedTuple):
    """One array of a weight's, with an axis for each of the weight's as the file has them.

    Attributes:
        read: gives some rows of the array, a slice with a start and a stop of its first axis.
        grains: how many entries of the weight share an entry along each axis: a number of them, or
            the whole axis. The last block of an axis may be cut.
        shape: of the array.
        dtype: of the array in memory; codes of four bits are read as bytes.
    """

    read: Callable[[slice], Array]
    grains: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: Any


class Coded(NamedTuple):
    """A weight in codes that a format of the core decodes.

    Attributes:
        names: the tensors that it is made of.
        format: how it is decoded, without blocks, which follow from `grains`.
        parts: its arrays by name.
        shape: of the weight.
        dtype: of the decoded weight, where the file says it.
        is_cut: whether blocks of the file cross rows, and `grains` are parts of them.
        stored: the tensor, its shape and its dtype, of each array that is stored as it is; only
            where all of them are.
    """

    names: tuple[str, ...]
    format: Format
    parts: Mapping[str, Part]
    shape: tuple[int, ...]
    dtype: Any = None
    is_cut: bool = False
    stored: Mapping[str, tuple[str, tuple[int, ...], Any]] = {}


class Decoded(NamedTuple):
    """A weight whose codes no format of the core has: it is decoded, and held in another one.

    Attributes:
        names: the tensors that it is made of.
        why: what no format has, as a clause.
        read: gives the whole weight.
        shape: of the weight.
        dtype: of the decoded weight.
    """

    names: tuple[str, ...]
    why: str
    read: Callable[[], Array]
    shape: tuple[int, ...]
    dtype: Any


AnyCoded = Coded | Decoded
Finder = Callable[[Tensors, str, str], AnyCoded | None]


@contextlib.contextmanager
def fitting(name: str) -> Generator[None]:
    """A block in which tensors of a stranger's file that do not fit each other are its fault."""
    try:
        yield
    except (ValueError, TypeError, ArithmeticError, LookupError) as error:
        if isinstance(error, LoraxError):
            raise
        message = f"has tensors of `{name}` that do not fit each other: {error}."
        raise AdapterFileError(message) from error


def whole(array: Array, grains: tuple[int, ...], dtype: Any = None) -> Part:
    """A part that is an array of the file as it is."""
    dtype = array.dtype if dtype is None else dtype
    return Part(lambda rows: array[rows], grains, array.shape, dtype)


def stored(**arrays: tuple[str, Array]) -> dict[str, tuple[str, tuple[int, ...], Any]]:
    """What `Coded.stored` says of arrays that are tensors of the file."""
    return {key: (name, array.shape, array.dtype) for key, (name, array) in arrays.items()}


def grains_of(name: str, shape: tuple[int, ...], scales: tuple[int, ...]) -> tuple[int, ...]:
    """How many entries share a scale along each axis, from the shapes of weight and scales."""
    if len(scales) != len(shape) or any(
        not 0 < count <= size or size % count for size, count in zip(shape, scales, strict=False)
    ):
        raise AdapterFileError(f"has `{name}` of shape {scales} beside a weight of {shape}.")
    return tuple(size // count for size, count in zip(shape, scales, strict=True))


def need(tensors: Tensors, name: str, *, ndim: int | None = None, dtypes: Any = None) -> Array:
    """A tensor that must be there, with so many axes, in one of these types."""
    if name not in tensors:
        raise AdapterFileError(f"lacks `{name}`, which belongs to a quantized weight.")
    view = tensors.view(name)
    fits = dtypes is None or view.dtype in [np.dtype(dtype) for dtype in dtypes]
    if not fits or ndim not in (None, view.ndim):
        raise AdapterFileError(f"has `{name}` of {view.dtype} {view.shape}, which is not a part "
                               "of a quantized weight.")  # fmt: skip
    return view


def expect(name: str, array: Array, shape: tuple[int, ...]) -> Array:
    """An array that must have this shape."""
    if array.shape != shape:
        raise AdapterFileError(f"has `{name}` of shape {array.shape}; {shape} would fit.")
    return array


def nibbles(data: Array, *, high_first: bool = False) -> Array:
    """Codes of four bits, a byte each, along the last axis."""
    parts = (data >> 4, data & 15) if high_first else (data & 15, data >> 4)
    return np.stack(parts, -1).reshape(*data.shape[:-1], 2 * data.shape[-1])


def from_words(words: Array, bits: int) -> Array:
    """The codes of 4 or 8 bits in int32, the lowest first, a byte each, along the last axis."""
    data = np.ascontiguousarray(words).astype("<i4", copy=False).view(np.uint8)
    return nibbles(data) if bits == 4 else data


def check_bits(name: str, bits: Any) -> int:
    """Refuses codes of other sizes than 4 and 8 bits."""
    if bits not in (4, 8):
        raise UnsupportedAdapterError(
            f"has `{name}` in codes of {bits} bits; those of 4 and 8 bits are read."
        )
    return int(bits)


def setting(tensors: Tensors, key: str, default: Any = None) -> Any:
    """A setting of the quantization, from the config."""
    settings = tensors.config.get("quantization_config")
    return settings.get(key, default) if isinstance(settings, dict) else default
