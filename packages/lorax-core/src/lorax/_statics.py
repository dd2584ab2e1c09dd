"""The settings of an adapter as plain Python values: hashable, comparable, and written as JSON."""

import dataclasses
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
    """An int or a float for a number of any library; anything else as it is."""
    if type(value) in (int, float, bool):
        return value
    if isinstance(value, np.generic | np.ndarray | jax.Array) and value.ndim == 0:
        return value.item()
    if isinstance(value, numbers.Integral):
        return operator.index(value)
    return float(value) if isinstance(value, numbers.Real) else value


def plain_axes(axes: Any) -> Any:
    """A tuple for a sequence of axes; anything else as it is."""
    is_sequence = isinstance(axes, Iterable) and not isinstance(axes, str)
    return tuple(map(plain_number, axes)) if is_sequence else axes


def make_plain(settings: Any) -> None:
    """Makes plain what a frozen dataclass was given for numbers and axes; arrays stay."""
    fields = dataclasses.fields(settings)
    some_static = any("static" in field.metadata for field in fields)
    for field in fields:
        if some_static and not field.metadata.get("static"):
            continue
        value = getattr(settings, field.name)
        plain = plain_axes(value) if field.name.endswith("_axes") else plain_number(value)
        if plain is not value:
            object.__setattr__(settings, field.name, plain)


def is_of(value: Any, hint: Any) -> bool:
    """Whether a plain value is of the type of a setting, such as `float | None`; floats are finite.

    A bool is not an int here, and an int is a float.
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
