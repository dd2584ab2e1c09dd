"""Checks names, given as objects or as plain data: `{"type": "Linear", "module": …}`."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from ._errors import UNTIL, AdapterMismatchError, about, warn
from ._torch_names import (
    Conv,
    Conv1D,
    Embedding,
    Experts,
    Linear,
    Parameter,
    Tensor,
    TorchName,
    TorchNames,
)

TORCH_NAMES: dict[str, type[TorchName]] = {
    torch_name.__name__: torch_name
    for torch_name in (Linear, Conv1D, Embedding, Conv, Experts, Parameter, Tensor)
}

Names = Mapping[str, TorchName | Mapping[str, Any]]


def as_torch_names(names: Names) -> TorchNames:
    """Checked names by path; plain data is converted to `TorchName` objects.

    Raises:
        AdapterMismatchError: if one is not a valid name; the error's `path` is the parameter's.
    """
    torch_names: dict[str, TorchName] = {}
    for path, row in names.items():
        with about(path):
            torch_names[path] = _as_torch_name(row)
            _check_fields(torch_names[path])
    return torch_names


def _as_torch_name(row: TorchName | Mapping[str, Any]) -> TorchName:
    if isinstance(row, TorchName):
        return row
    fields = dict(row)
    if "layout" in fields and "type" not in fields:
        warn(f"its key `layout` is now called `type`. {UNTIL}", DeprecationWarning)
        fields["type"] = fields.pop("layout")
    kind = TORCH_NAMES.get(str(fields.pop("type", None)))
    if kind is None:
        raise AdapterMismatchError(
            f"its `type` is not one of {', '.join(TORCH_NAMES)}: {dict(row)}."
        )
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
    try:
        return kind(**values)
    except TypeError as error:
        raise AdapterMismatchError(f"is not a valid name: {error}.") from error


def _check_fields(torch_name: TorchName) -> None:
    for field in dataclasses.fields(torch_name):
        value = getattr(torch_name, field.name)
        if not _may_hold(field.name, value):
            raise AdapterMismatchError(f"has {field.name} = {json.dumps(value, default=repr)}.")
    *texts, last = torch_name.module.split("{}")
    stacked = max(len(torch_name.shared_axes) - torch_name.stacked_in_tensor, 0)
    if len(texts) != stacked or not {"{", "}"}.isdisjoint("".join([*texts, last])):
        raise AdapterMismatchError(
            "needs one `{}` in its module for each axis that stacks modules, and no other."
        )
    if torch_name.numbers is not None and (
        stacked != 1 or len({*torch_name.numbers}) < len(torch_name.numbers)
    ):
        raise AdapterMismatchError("needs a number for each module of its one stack.")


def _may_hold(field: str, value: Any) -> bool:
    match field:
        case "module" | "parameter":
            return isinstance(value, str)
        case "in_axes" | "out_axes" | "shared_axes":
            is_axes = isinstance(value, tuple | list) and all(type(axis) is int for axis in value)
            return is_axes or (value is None and field != "shared_axes")
        case "numbers":
            is_list = isinstance(value, tuple | list) and len(value) > 0
            return value is None or (is_list and all(type(n) is int and n >= 0 for n in value))
        case "channel_axis":
            return value is None or type(value) is int
        case "order":
            return type(value) is int
        case _:
            return isinstance(value, bool) or (value is None and field == "swapped")
