"""The settings of an adapter as plain Python values: hashable, comparable, and written as JSON."""

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


def with_tuples(value: Any) -> Any:
    """A tuple for a list of JSON, and for those in it."""
    return tuple(map(with_tuples, value)) if isinstance(value, list) else value


def make_plain(settings: Any) -> None:
    """Makes plain what a frozen dataclass was given for numbers and axes; arrays stay."""
    for name in _settings_of(type(settings)):
        value = getattr(settings, name)
        plain = plain_axes(value) if name.endswith("_axes") else plain_number(value)
        if plain is not value:
            object.__setattr__(settings, name, plain)


@functools.cache  # Each `jax.tree.map` makes every adapter anew.
def _settings_of(cls: Any) -> tuple[str, ...]:
    """The names of the static fields of a class, or of all where it has no arrays."""
    fields = dataclasses.fields(cls)
    static = tuple(field.name for field in fields if field.metadata.get("static"))
    return static or tuple(field.name for field in fields)


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
