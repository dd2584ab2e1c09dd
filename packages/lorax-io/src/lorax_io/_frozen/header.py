"""The header of a frozen tree: the settings of each base."""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple, Self

import jax
import numpy as np

from lorax import FrozenWeight, LoraxError, QuantizedWeight, adapter_from_settings
from lorax.bases import quantized_from_settings

from .._disk.packed import Packed
from .._disk.streams import parts_of
from .._disk.tensors import TensorFile, check_width, parse_json
from .._errors import AdapterError, AdapterFileError
from .._formats.native import FROZEN_KEY, PREFIX

FORMAT = "1"
BASES, PACKED = PREFIX + "bases", PREFIX + "packed"

_KEYS = {"factors", "arrays", "quantized", "adapter"}

Base = Any  # an array or its shape, a `QuantizedWeight` of these, or None


class Entry(NamedTuple):
    """One leaf of the tree: the base, of arrays or shapes, and its frozen factors."""

    base: Base
    factors: Mapping[str, Any]
    adapter: str = ""  # `FrozenWeight.settings`

    @classmethod
    def of(cls, leaf: Any) -> Self:
        """The entry of a leaf."""
        if isinstance(leaf, FrozenWeight):
            return cls(leaf.base, leaf.factors, leaf.settings)
        return cls(leaf, {})

    def arrays(self, path: str) -> dict[str, Any]:
        """The arrays of the base and the factors, by the names of their tensors."""
        arrays: dict[str, Any] = {}
        if isinstance(self.base, QuantizedWeight):
            arrays = {f"{path}/{name}": self.base.arrays[name] for name in self.base.names}
        elif self.base is not None:
            arrays = {path: self.base}
        for name, factor in self.factors.items():
            if f"{path}/{name}" in arrays:
                raise AdapterError(f"two arrays are both called `{path}/{name}`; rename one.")
            arrays[f"{path}/{name}"] = factor
        return arrays

    def settings(self) -> dict[str, Any] | None:
        """The settings in the header; None if the parameter is trained in full."""
        if self.base is None:
            return None
        settings: dict[str, Any] = {"factors": sorted(self.factors)}
        if isinstance(self.base, QuantizedWeight):
            settings |= {"arrays": list(self.base.names), "quantized": self.base.settings()}
        if self.adapter:
            settings["adapter"] = json.loads(self.adapter)
        return settings


def all_arrays(entries: Mapping[str, Entry]) -> dict[str, Any]:
    """The arrays of all entries by name."""
    everything: dict[str, Any] = {}
    for path, entry in entries.items():
        arrays = entry.arrays(path)
        if twice := sorted(everything.keys() & arrays.keys()):
            raise AdapterError(f"two arrays are both called `{twice[0]}`; rename one.")
        everything |= arrays
    return everything


def read_header(file: TensorFile) -> tuple[dict[str, Entry], dict[str, Packed]]:
    """Reads the entries, with shapes for arrays, and the packed tensors; checks every tensor."""
    version = file.metadata.get(FROZEN_KEY)
    if version is None:
        raise AdapterFileError(
            "is a safetensors file, but not a frozen tree of `save_frozen`. `load_base` reads the "
            "checkpoints of other libraries, `load_adapter` adapters."
        )
    if version != FORMAT:
        raise AdapterFileError(
            f"is a frozen tree of format {version[:20]!r}; this version of lorax-io reads format "
            f"{FORMAT}. Update it."
        )
    packed = {name: Packed.from_settings(name, row) for name, row in _object(file, PACKED).items()}
    shapes = {name: _shape(file, name, packed) for name in file.entries}
    entries: dict[str, Entry] = {}
    for path, row in _object(file, BASES).items():
        entries[path] = _entry(path, row, shapes)
    wanted = all_arrays(entries).keys()
    if extra := sorted((shapes.keys() | packed.keys()) - wanted):
        raise AdapterFileError(f"has a tensor `{extra[0]}` that its header does not name.")
    return entries, packed


def _object(file: TensorFile, key: str) -> dict[str, Any]:
    content = parse_json(file.metadata.get(key, ""))
    if not isinstance(content, dict):
        raise AdapterFileError(f"its header has no object under {key!r}.")
    return content


def _shape(file: TensorFile, name: str, packed: Mapping[str, Packed]) -> jax.ShapeDtypeStruct:
    dtype, shape, _, _ = file.entries[name]
    check_width(name, dtype)
    if name not in packed:
        return jax.ShapeDtypeStruct(shape, dtype)
    packing = packed[name]
    if (dtype, shape) != (np.dtype(np.uint8), packing.bytes_shape):
        raise AdapterFileError(
            f"has `{name}` of {dtype} {shape}; packed, {packing.dtype} {packing.shape} is uint8 "
            f"{packing.bytes_shape}."
        )
    return jax.ShapeDtypeStruct(packing.shape, packing.dtype)


def _entry(path: str, row: Any, shapes: Mapping[str, jax.ShapeDtypeStruct]) -> Entry:
    if row is None:
        return Entry(None, {})
    if not isinstance(row, dict) or not row.keys() <= _KEYS:
        raise AdapterFileError(f"its header does not say how `{path}` is stored.")

    def named(key: str) -> dict[str, jax.ShapeDtypeStruct]:
        names = row.get(key, [])
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise AdapterFileError(f"its header has no list of the {key} of `{path}`.")
        return {name: shape_of(f"{path}/{name}") for name in names}

    def shape_of(name: str) -> jax.ShapeDtypeStruct:
        if name not in shapes:
            raise AdapterFileError(f"lacks the tensor `{name}` of its header.")
        return shapes[name]

    factors, adapter = named("factors"), _adapter(path, row.get("adapter"))
    if "quantized" not in row:
        return Entry(shape_of(path), factors, adapter)
    try:
        base = quantized_from_settings(row["quantized"], named("arrays"))
        return Entry(base, factors, adapter)
    except (ValueError, TypeError, KeyError, ArithmeticError, AttributeError) as error:
        if isinstance(error, AdapterError):
            raise
        raise AdapterFileError(
            f"its header does not fit the quantized weight `{path}`: {error}"
        ) from error


def _adapter(path: str, settings: Any) -> str:
    """The settings of the adapter that the frozen factors belong to; "" if there are none."""
    if settings is None:
        return ""
    try:
        return json.dumps(adapter_from_settings(settings).settings())
    except (ValueError, TypeError, KeyError, AttributeError, LoraxError) as error:
        raise AdapterFileError(
            f"its header does not describe the adapter of the frozen factors of `{path}`: {error}"
        ) from error


def check_numbers(name: str, array: np.ndarray[Any, Any], codec: Any = None) -> None:
    """Rejects NaN, and values with which a quantized weight cannot be decoded.

    Infinity is allowed in a base that is not quantized, such as a mask.

    Args:
        name: the array's name.
        array: the array or a part of it.
        codec: the format of the quantized weight that it belongs to, if any.
    """
    for part in parts_of(array):
        if part.dtype == bool and (part.view(np.uint8) > 1).any():
            raise AdapterFileError(f"`{name}` has a boolean that is neither true nor false.")
        if codec is not None and not codec.are_numbers(name.rpartition("/")[2], part):
            raise AdapterError(
                f"`{name}` holds NaN, infinity or a zero that is divided by, so its weight cannot "
                "be decoded. Quantize the weight again."
            )
        if codec is None and part.dtype.kind in "fcV":
            with np.errstate(invalid="ignore"):  # of signalling NaNs
                if np.isnan(part).any():
                    raise AdapterError(f"`{name}` holds NaN.")
