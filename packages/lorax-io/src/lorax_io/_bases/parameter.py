"""Loads one parameter of a base: assembles its arrays from tensors and puts them on devices."""

import dataclasses
import functools
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

from lorax import QuantizedWeight, dequantize, quantize
from lorax.bases import Format, format_of

from .._disk.arrays import place as put
from .._disk.packed import Packed
from .._disk.streams import parts_of
from .._errors import AdapterError, warn
from .._frozen.header import check_numbers
from .._places import Array, Place
from .._torch_names import Embedding, Tensor
from .blocks import (
    Runs,
    Target,
    assemble,
    blank,
    check_shape,
    packing,
    plain_target,
    targets,
    with_along,
)
from .codings import Coded, Decoded, fitting
from .codings.coding import Part, whole as part_of
from .sources import Source, Weight, needed

FLOAT = "float"
# Formats whose decoded entries may exceed float16 although their scales are at most 1.
_WIDE = ("mxfp4", "nvfp4")


class Notes(NamedTuple):
    """What to warn about, once all parameters are loaded."""

    shorter: list[str]  # weights with shorter blocks than in the file
    requantized: list[str]  # weights whose codes could not be kept
    assumed: list[str]  # weights of whose form the file leaves something open
    widened: list[str]  # parameters whose modules have several dtypes

    @classmethod
    def none(cls) -> Self:
        """Nothing to warn about."""
        return cls([], [], [], [])

    def warn(self, source: Source) -> None:
        """Warns about unused tensors, and of all that is noted."""
        if left := sorted(source.names.keys() - source.used):
            warn(f"has tensors that `names` does not contain{_some(left)}")
        if self.shorter:
            warn(
                "has blocks that do not divide an axis of their parameter, so that blocks in "
                f"memory are shorter and scales are repeated{_some(self.shorter)}"
            )
        if self.requantized:
            warn(f"has weights whose codes are not kept{_some(self.requantized)}")
        warn_of_assumed(self.assumed)
        if self.widened:
            warn(
                "has modules of one parameter in several dtypes, which are widened to one"
                f"{_some(self.widened)}"
            )


def warn_of_assumed(clauses: list[str]) -> None:
    """Warns of what the file leaves open and was assumed."""
    if clauses:
        warn(
            "has weights whose layout is ambiguous; compare the model's outputs with those of "
            f"the library that wrote it{_some(clauses)}"
        )


def _some(names: list[str]) -> str:
    more = f", and {len(names) - 8} more" if len(names) > 8 else ""
    return f": {', '.join(names[:8])}{more}."


def load_parameter(
    source: Source,
    place: Place,
    dtype: Any,
    requantize: Format | str | None,
    where: Sharding | None,
    notes: Notes,
) -> Any:
    """Loads one parameter onto its devices, and adds to `notes`."""
    weights: dict[tuple[int, ...], Weight] = {}
    for index, module in place.modules.items():
        weights[index] = needed(source, module, place.torch_name.parameter)
        check_shape(place, module, weights[index].shape)
    first = next(iter(weights.values()))
    with fitting(place.path):
        of_one_kind = len({_kind(row) for row in weights.values()}) == 1
        if isinstance(first, Coded) and of_one_kind:
            coded = {index: row for index, row in weights.items() if isinstance(row, Coded)}
            return _coded(place, coded, dtype or dtype_of(source, first), where, notes)
        parts = {index: row for index, row in weights.items() if isinstance(row, Part)}
        if len(parts) == len(weights):
            target = plain_target(place, _one_dtype(place.path, parts.values(), notes))
            return _array(place.path, place, target, parts, where, None)
        return _requantized(source, place, weights, dtype, requantize, where, notes)


def _kind(row: Weight) -> Any:
    """The properties that all modules of a stack must share."""
    if isinstance(row, Part):
        return row.dtype
    if isinstance(row, Decoded):
        return row.why
    dtypes = tuple((name, part.dtype, part.grains) for name, part in sorted(row.parts.items()))
    return row.format, dtypes


def _one_dtype(path: str, parts: Collection[Part], notes: Notes) -> Any:
    """The dtype that holds the numbers of all parts exactly."""
    dtypes = sorted({part.dtype for part in parts}, key=str)
    if len(dtypes) == 1:
        return dtypes[0]
    listed = " and ".join(str(dtype) for dtype in dtypes)
    if not all(jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize > 1 for dtype in dtypes):
        raise AdapterError(f"has modules of `{path}` in {listed}, which have no dtype in common.")
    dtype = functools.reduce(jnp.promote_types, dtypes)
    notes.widened.append(f"`{path}` ({listed}, as {dtype})")
    return np.dtype(dtype)


def dtype_of(source: Source, coded: Coded | Decoded) -> Any:
    """The default dtype of a decoded weight: the file's, else the config's, else bfloat16."""
    if coded.dtype is not None:
        return coded.dtype
    config = getattr(source, "config", {})
    stored = config.get("dtype", config.get("torch_dtype"))
    return jnp.dtype(stored if stored in ("float32", "float16", "bfloat16") else "bfloat16")


def _coded(
    place: Place,
    weights: Mapping[tuple[int, ...], Coded],
    dtype: Any,
    where: Sharding | None,
    notes: Notes,
) -> QuantizedWeight:
    first = next(iter(weights.values()))
    runs = Runs.of(place, first)
    empty = blank(place.path, place, first, runs, dtype)
    shardings = {} if where is None else empty.shardings(where)
    arrays: dict[str, Any] = {}
    for name, target in targets(empty).items():
        parts = {index: row.parts[name] for index, row in weights.items()}
        full = f"{place.path}/{name}"
        arrays[name] = _array(full, place, target, parts, shardings.get(name), first.format)
    result = dataclasses.replace(empty, arrays=arrays)
    if dtype == np.float16:
        _check_range(place.path, result)
    notes.assumed.extend(
        f"`{place.path}`: {row.assumed}" for row in weights.values() if row.assumed
    )
    if runs.is_shorter or first.is_cut:
        notes.shorter.append(f"`{place.path}` ({result.bits:.2f} bits a weight)")
    return result


def _array(
    name: str,
    place: Place,
    target: Target,
    parts: Mapping[tuple[int, ...], Part],
    where: Sharding | None,
    codec: Format | None,
) -> jax.Array:
    """Puts one array on its devices; 4-bit codes are transferred as bytes."""
    packed: Packed | None = packing(place, target)
    whole = assemble(place, target, parts, packed)
    check_numbers(name, whole, codec if packed is None else None)

    def read(index: Any) -> Array:
        return whole[index]

    if packed is None:
        return put(target.shape, whole.dtype, read, where)
    data = put(packed.bytes_shape, whole.dtype, read, packed.bytes_sharding(where))
    return packed.unpack(data, where)


def _check_range(path: str, weight: QuantizedWeight) -> None:
    """Rejects a weight that decodes to infinity, although its codes and scales are finite."""
    numbers = [x for name, x in weight.arrays.items() if name != "codes"]
    floats = [x for x in numbers if jnp.issubdtype(x.dtype, jnp.floating)]
    largest = max(
        (float(jnp.max(jnp.abs(x.astype(np.float32)), initial=0)) for x in floats), default=0.0
    )
    if largest <= 1 and weight.format not in _WIDE:
        return
    if not jax.jit(lambda weight: jnp.isfinite(dequantize(weight)).all())(weight):
        raise AdapterError(
            f"has entries in `{path}` that decode to infinity in {weight.dtype}. If the file is as "
            "it should be, `load_base(dtype=jnp.bfloat16)` loads it."
        )


def _requantized(
    source: Source,
    place: Place,
    weights: Mapping[tuple[int, ...], Weight],
    dtype: Any,
    requantize: Format | str | None,
    where: Sharding | None,
    notes: Notes,
) -> Any:
    """A parameter whose codes cannot be kept: decoded, and quantized unless as "float"."""
    first = next(row for row in weights.values() if not isinstance(row, Part))
    why = first.why if isinstance(first, Decoded) else "its modules are stored in several forms"
    if requantize is None:
        raise AdapterError(
            f"has codes for `{place.path}` that cannot be kept: {why}. Choose how to store it: "
            '`requantize="nf4"`, or another format, quantizes it again; `requantize="float"` '
            "decodes it."
        )
    dtype = np.dtype(dtype or dtype_of(source, first))
    target = plain_target(place, dtype)
    parts = {index: _floats(row, dtype) for index, row in weights.items()}
    whole = assemble(place, target, parts, None)
    check_numbers(place.path, whole)
    if not all(np.isfinite(part).all() for part in parts_of(whole)):
        raise AdapterError(f"has infinity in `{place.path}`, which is decoded.")
    array = put(target.shape, whole.dtype, lambda index: whole[index], where)
    if requantize == FLOAT:
        notes.requantized.append(f"`{place.path}` (as floats: {why})")
        return array
    along = place.axes.outputs if isinstance(place.torch_name, Embedding) else place.axes.inputs
    form = with_along(format_of(requantize), along)
    quantized = quantize({place.path: array}, {place.path: form})[place.path]
    norm = jnp.linalg.norm(array.astype(jnp.float32).reshape(-1))
    lost = dequantize(quantized).astype(jnp.float32) - array.astype(jnp.float32)
    error = float(jnp.linalg.norm(lost.reshape(-1)) / jnp.maximum(norm, 1e-30))
    notes.requantized.append(
        f"`{place.path}` as {quantized.format}, {error:.2g} from the file's ({why})"
    )
    return quantized


def _floats(row: Weight, dtype: Any) -> Part:
    """One tensor as floats."""
    if isinstance(row, Coded):
        return part_of(decoded(row, dtype), (1,) * len(row.shape))

    def read(rows: slice) -> Array:
        with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is rejected later
            return row.read(rows).astype(dtype)

    return Part(read, (1,) * len(row.shape), row.shape, dtype)


def decoded(row: Coded | Decoded, dtype: Any, name: str = "the weight") -> Array:
    """The decoded tensor, with the axes of the file; `name` is for errors."""
    if isinstance(row, Decoded):
        return _floats(row, row.dtype).read(slice(0, row.shape[0]))
    place = Tensor("").at(name, row.shape)
    return np.asarray(dequantize(_coded(place, {(): row}, dtype, None, Notes.none())))
