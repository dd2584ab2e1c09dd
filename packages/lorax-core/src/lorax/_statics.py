"""Settings of adapters as plain Python values: hashable, comparable and JSON-serializable."""

import dataclasses
import functools
import numbers
import operator
import sys
import types
import typing
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np


def plain_number(value: Any) -> Any:
    """Converts a number of any library to an int or a float; other values are unchanged."""
    if type(value) in (int, float, bool):
        return value
    if isinstance(value, np.generic | np.ndarray | jax.Array) and value.ndim == 0:
        return value.item()
    if isinstance(value, numbers.Integral):
        return operator.index(value)
    return float(value) if isinstance(value, numbers.Real) else value


def plain_axes(axes: Any) -> Any:
    """Converts a sequence of axes to a tuple; other values are unchanged."""
    is_sequence = isinstance(axes, Iterable) and not isinstance(axes, str)
    return tuple(map(plain_number, axes)) if is_sequence else axes


def with_tuples(value: Any) -> Any:
    """Converts JSON lists to tuples, recursively."""
    return tuple(map(with_tuples, value)) if isinstance(value, list) else value


def make_plain(settings: Any) -> None:
    """Converts numbers and axes in the settings of a frozen dataclass to plain values, in place."""
    for name in _settings_of(type(settings)):
        value = getattr(settings, name)
        are_axes = name == "along" or name.endswith("_axes")
        plain = plain_axes(value) if are_axes else plain_number(value)
        if plain is not value:
            object.__setattr__(settings, name, plain)


@functools.cache  # Each `jax.tree.map` rebuilds every adapter.
def _settings_of(cls: Any) -> tuple[str, ...]:
    """Returns the names of the static fields of a class, or of all fields if none is static."""
    fields = dataclasses.fields(cls)
    static = tuple(field.name for field in fields if field.metadata.get("static"))
    return static or tuple(field.name for field in fields)


def is_of(value: Any, hint: Any) -> bool:
    """Whether a plain value has the type of a setting, such as `float | None`.

    A bool is not an int here, an int is a float, and floats must be finite.
    """
    arguments = typing.get_args(hint)
    if hint is float:
        return type(value) in (int, float) and abs(value) <= sys.float_info.max
    match typing.get_origin(hint):
        case None:
            return hint is Any or type(value) is (type(None) if hint is None else hint)
        case typing.Literal:
            return any(type(value) is type(known) and value == known for known in arguments)
        case types.UnionType | typing.Union:
            return any(is_of(value, argument) for argument in arguments)
        case _ if arguments[-1:] == (...,):
            return type(value) is tuple and all(is_of(item, arguments[0]) for item in value)
        case _:
            return (
                type(value) is tuple
                and len(value) == len(arguments)
                and all(map(is_of, value, arguments))
            )
