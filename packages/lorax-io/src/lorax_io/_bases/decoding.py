"""Presents a checkpoint with quantized weights as one with floats, decoded when they are read."""

import contextlib
import dataclasses
import functools
from collections.abc import Container, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lorax import dequantize, quantize

from .._errors import AdapterError, UnsupportedAdapterError, about
from .._places import Array
from .._torch_names import tensor_name
from .checkpoint import Checkpoint, by_end
from .coded import ENDINGS, MARKS
from .codings import Coded, Decoded, find_coded
from .parameter import decoded, dtype_of, warn_of_assumed
from .sources import SafetensorsSource


class CodedWeight(NamedTuple):
    """One quantized weight of a checkpoint."""

    name: str
    coded: Coded | Decoded
    dtype: Any

    def array(self) -> Array:
        """The decoded weight."""
        array = decoded(self.coded, self.dtype, self.name)
        return array.astype(self.dtype, copy=False)

    def again(self, array: Array) -> tuple[dict[str, Array], float]:
        """Quantizes other floats in the format of this weight.

        Returns:
            The tensors by their names in the file, and the relative error, `‖decoded − x‖ / ‖x‖`.

        Raises:
            UnsupportedAdapterError: if the codes are in a form that is only read.
        """
        coded = self.coded
        if isinstance(coded, Decoded) or not coded.stored:
            raise UnsupportedAdapterError(
                f"has `{self.name}` in codes that can be read but not written. Omit "
                "`--requantize` to write the merged model as floats."
            )
        format = _same_blocks(self.name, coded)
        quantized = quantize({self.name: jnp.asarray(array)}, {self.name: format})[self.name]
        tensors, rounded = {}, dict(quantized.arrays)
        for key, (name, shape, dtype) in coded.stored.items():
            rounded[key] = quantized.arrays[key].astype(dtype)
            tensors[name] = np.asarray(rounded[key]).reshape(shape)
        wide = array.astype(np.float32)
        again = dequantize(dataclasses.replace(quantized, arrays=rounded))
        lost = np.asarray(again, np.float32) - wide
        return tensors, float(np.linalg.norm(lost) / max(np.linalg.norm(wide), 1e-30))


def _same_blocks(name: str, coded: Coded) -> Any:
    """The format, with the blocks of the file."""
    shape, grains = coded.shape, coded.parts["scales"].grains
    format: Any = coded.format
    if "zeros" in coded.parts or len(shape) != 2:
        raise UnsupportedAdapterError(f"has `{name}` in codes that can be read but not written.")
    if grains in ((1, shape[1]), shape):
        return dataclasses.replace(format, along=(1,) if grains[0] == 1 else (0, 1))
    is_square = grains[0] == grains[1] and not any(n % grains[0] for n in shape)
    if is_square and format.name == "fp8":
        return dataclasses.replace(format, block=grains[0], square=True, along=(1,))
    raise UnsupportedAdapterError(
        f"has `{name}` of shape {shape} in blocks of {grains}, which can be read but not written. "
        "Omit `--requantize` to write the merged model as floats."
    )


def with_decoded(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with decoded weights in place of the codes and scales that can be read."""
    broken: dict[str, Exception] = {}
    weights = {weight.name: weight for weight in _coded(checkpoint, broken)}
    if not weights:
        return checkpoint._replace(broken=broken)
    coded = [weight.coded for weight in weights.values()]
    warn_of_assumed([row.assumed for row in coded if isinstance(row, Coded) and row.assumed])
    parts = {name for weight in weights.values() for name in weight.coded.names}
    shapes = {name: shape for name, shape in checkpoint.shapes.items() if name not in parts}
    shapes |= {n: jax.ShapeDtypeStruct(w.coded.shape, w.dtype) for n, w in weights.items()}
    return checkpoint._replace(shapes=shapes, by_end=by_end(shapes), coded=weights, broken=broken)


def _coded(checkpoint: Checkpoint, broken: dict[str, Exception]) -> Iterator[CodedWeight]:
    """The quantized weights that can be read; the errors of all others are added to `broken`.

    They are not raised here: an adapter that touches none of these weights may still be merged.
    """
    places = {place for name in checkpoint.shapes for place in _of(name)}
    if not places:
        return
    with contextlib.ExitStack() as stack, about(checkpoint.path):
        source = SafetensorsSource(checkpoint, stack)
        for module, parameter in sorted(places):
            name = tensor_name(module, parameter)
            try:
                coded = find_coded(source, module, parameter)
            except AdapterError as error:
                broken[name] = error
                continue
            if coded is not None:
                yield CodedWeight(name, coded, np.dtype(dtype_of(source, coded)))


@functools.lru_cache(maxsize=2**16)
def _of(name: str) -> tuple[tuple[str, str], ...]:
    """The (module, parameter) pairs of which a tensor may be a mark, by its name."""
    places: list[tuple[str, str]] = []
    for mark in MARKS:
        if name.endswith(f".{mark}"):
            places.append((name.removesuffix(f".{mark}"), "weight"))
    for end in ENDINGS:
        if name.endswith(end):
            module, _, parameter = name.removesuffix(end).rpartition(".")
            places.append((module, parameter))
    return tuple(places)


def home_of(weight: CodedWeight, entries: Container[str], prefix: str) -> bool:
    """Whether a decoded weight is written to this file: the one that contains its codes."""
    first = weight.coded.names[0]
    return first.startswith(prefix) and first.removeprefix(prefix) in entries
