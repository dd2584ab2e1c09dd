"""A model as rows, one for each parameter, independent of its library.

The parts for each library (`_flax`, `_torch`) make rows; everything else works on rows.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from lorax import Axes


class Row(NamedTuple):
    """One parameter of a model."""

    path: str
    module: str  # the module in PyTorch that it belongs to
    shape: tuple[int, ...]
    axes: Axes | None  # None if it is not a weight, or its axes are not known
    torch_name: Mapping[str, Any]  # for lorax_io, as plain data
    words: frozenset[str]  # the named choices that include it, such as "attention"
    unsure: bool = False  # whether it may be a weight although its axes are not known
    owner: str = ""  # the class of its module, if there is one


class Described(NamedTuple):
    """A model as rows."""

    rows: list[Row]
    params: Any  # the parameter tree, whose structure a spec has
    infer: Callable[[Sequence[str], Any], Mapping[str, Axes]]  # axes of paths, from example inputs
    no_default: str = ""  # why there are no targets called "default"; empty if there are


def ends_in(ends: Sequence[str], module: str) -> bool:
    """Whether a module's name equals one of these or ends in one after a dot, PEFT's rule."""
    return any(module == end or module.endswith(f".{end}") for end in ends)


def layers_of(module: str) -> range:
    """The indices of a module's layers: the first number in its name, or a range (`1:30:2`).

    A module of scanned layers has a range. The result is empty if the name has no number.
    """
    for part in module.split("."):
        if part.isdigit():
            return range(int(part), int(part) + 1)
        if re.fullmatch(r"\d+:\d+(:\d+)?", part):
            return range(*map(int, part.split(":")))
    return range(0)
