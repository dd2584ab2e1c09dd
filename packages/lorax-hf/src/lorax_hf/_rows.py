"""A model as rows, one for each parameter: what choosing modules needs to know about any library.

Each library of models makes rows (`_flax`, `_torch`); everything else is written once, for rows.
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
    axes: Axes | None  # None where it is not a weight, or its module does not say
    layout: Mapping[str, Any]  # for lorax_io, as plain data
    words: frozenset[str]  # which of the named choices have it, such as "attention"
    unsure: bool = False  # whether it may be a weight although its axes are not known
    owner: str = ""  # the class of its module, where its library has one


class Described(NamedTuple):
    """A model, in the words that every library shares."""

    rows: list[Row]
    params: Any  # the tree that a spec gets the structure of
    infer: Callable[[Sequence[str], Any], Mapping[str, Axes]]  # axes of paths, from example inputs
    no_default: str = ""  # why nothing is chosen by "default"


def ends_in(ends: Sequence[str], module: str) -> bool:
    """Whether a module's name is one of these, or ends in one after a dot; PEFT's rule."""
    return any(module == end or module.endswith(f".{end}") for end in ends)


def layers_of(module: str) -> range:
    """The layers that a module is in: the first number in its name, or several (`0:30`, `1:30:2`).

    Empty where it is in none.
    """
    for part in module.split("."):
        if part.isdigit():
            return range(int(part), int(part) + 1)
        if re.fullmatch(r"\d+:\d+(:\d+)?", part):
            return range(*map(int, part.split(":")))
    return range(0)
