"""Checks layouts, given as objects or as plain data: `{"layout": "Linear", "module": …}`."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from ._errors import AdapterMismatchError, about
from ._layouts import (
    Conv,
    Conv1D,
    Embedding,
    Experts,
    Layout,
    Layouts,
    Linear,
    Parameter,
    Tensor,
)

LAYOUTS: dict[str, type[Layout]] = {
    layout.__name__: layout
    for layout in (Linear, Conv1D, Embedding, Conv, Experts, Parameter, Tensor)
}

Names = Mapping[str, Layout | Mapping[str, Any]]


def as_layouts(names: Names) -> Layouts:
    """Checked layouts by path; plain data is converted to `Layout` objects.

    Raises:
        AdapterMismatchError: if one is not a valid layout; the error's `path` is the parameter's.
    """
    layouts: dict[str, Layout] = {}
    for path, row in names.items():
        with about(path):
            layouts[path] = _as_layout(row)
            _check_fields(layouts[path])
    return layouts


def _as_layout(row: Layout | Mapping[str, Any]) -> Layout:
    if isinstance(row, Layout):
        return row
    fields = dict(row)
    kind = LAYOUTS.get(str(fields.pop("layout", None)))
    if kind is None:
        raise AdapterMismatchError(f"its `layout` is not one of {', '.join(LAYOUTS)}: {dict(row)}.")
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
    try:
        return kind(**values)
    except TypeError as error:
        raise AdapterMismatchError(f"is not a layout: {error}.") from error


def _check_fields(layout: Layout) -> None:
    for field in dataclasses.fields(layout):
        value = getattr(layout, field.name)
        if not _may_hold(field.name, value):
            raise AdapterMismatchError(f"has {field.name} = {json.dumps(value, default=repr)}.")
    *texts, last = layout.module.split("{}")
    stacked = max(len(layout.shared_axes) - layout.stacked_in_tensor, 0)
    if len(texts) != stacked or not {"{", "}"}.isdisjoint("".join([*texts, last])):
        raise AdapterMismatchError(
            "needs one `{}` in its module for each axis that stacks modules, and no other."
        )
    if layout.numbers is not None and (
        stacked != 1 or len({*layout.numbers}) < len(layout.numbers)
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
