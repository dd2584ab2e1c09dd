"""The settings of an adapter as plain Python values: hashable, comparable, and written as JSON."""

import numbers
import operator
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
    """Makes plain what a frozen dataclass was given for its rank, alpha and axes."""
    for name in ("rank", "alpha"):
        object.__setattr__(settings, name, plain_number(getattr(settings, name)))
    for name in ("in_axes", "out_axes", "shared_axes"):
        object.__setattr__(settings, name, plain_axes(getattr(settings, name)))
