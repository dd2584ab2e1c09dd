"""Quantization formats, and which entries of a weight share a scale.

A format is one module of `bases/`, and no code outside it names one. `Blocks` describes by labels
which entries share scales; shapes, placement and files follow from it.
"""

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np

from ._errors import ArgumentError, SpecError
from ._statics import is_of, make_plain
from ._terms import Label, Labels

FORMATS: "dict[str, type[Format]]" = {}
"""The format classes, by the name that files use for them."""


class Blocks(NamedTuple):
    """The labels of a weight's axes, of its codes, and of its scales.

    Attributes:
        out: the labels of each axis of the weight: for an axis in blocks, block and place within
            it; for blocks in groups, group, block and place.
        codes: the labels of an array with one entry per entry of the weight.
        scales: the labels of an array with one entry per block.
        outer: the labels of an array with one entry per group; without groups, one entry per
            output: `[*shared, *out]`.
    """

    out: tuple[Labels, ...]
    codes: Labels
    scales: Labels
    outer: Labels

    @classmethod
    def of(
        cls, shape: Sequence[int], blocks: Mapping[int, Sequence[int]], along: Sequence[int]
    ) -> Self:
        """Returns the labels for a weight of `shape`.

        Args:
            shape: the shape of the weight.
            blocks: for each axis in blocks, the entries per block, preceded by the blocks per group
                if there are groups.
            along: the axes whose entries share scales: within blocks if the axis has some, else
                whole.
        """
        # Axis d has label d. Labels within blocks are numbered after those of all axes.
        inner = iter(range(len(shape), 3 * len(shape)))
        out: list[Labels] = []
        for d, size in enumerate(shape):
            sizes = blocks.get(d, ())
            within = tuple(Label(next(inner), part) for part in sizes)
            # [in] in blocks of 64 is [in / 64, 64]; in groups of 4 such blocks, [in / 256, 4, 64].
            out.append((Label(d, size // math.prod(sizes)), *within))
        codes = tuple(label for labels in out for label in labels)
        whole = {d for d in along if d not in blocks}
        each = [labels[:-1] if d in blocks else labels for d, labels in enumerate(out)]
        # One scale for each block, and none along an axis that shares them whole: codes
        # [in / 64, 64, out] have scales [in / 64, out], and without blocks [out].
        scales = tuple(label for d, labels in enumerate(each) if d not in whole for label in labels)
        # Scales of scales: one for each group, or for each output where there are no groups.
        outer = tuple(
            labels[0] for d, labels in enumerate(out) if d not in along or len(labels) > 2
        )
        return cls(tuple(out), codes, scales, outer)


class Format:
    """How a weight is stored in few bits.

    A format is a frozen dataclass under `@defformat`, whose fields are settings. `encode` computes
    arrays from a weight, and `decode` computes an entry of the weight from one entry of each array.
    """

    name: ClassVar[str]

    # The names of the arrays, in order; the codes come first.
    arrays: ClassVar[tuple[str, ...]] = ("codes", "scales", "zeros", "outer", "mins", "outer_mins")

    def __post_init__(self) -> None:
        make_plain(self)
        for name, hint in _hints_of(type(self)).items():
            value = getattr(self, name)
            if not is_of(value, hint):
                raise SpecError(
                    f"{type(self).__name__} has {name}={value!r}; it must be {_shown(hint)}."
                )
        self.check()

    def check(self) -> None:
        """Raises `SpecError` for invalid settings."""

    def blocks(
        self, path: str, shape: tuple[int, ...], along: tuple[int, ...]
    ) -> dict[int, tuple[int, ...]]:
        """Returns the axes in blocks with the entries per block, or blocks per group and entries.

        Blocks run along the last of the axes that share scales whose size they divide.
        """
        block: int | None = getattr(self, "block", None)
        group: int | None = getattr(self, "group", None)
        if block is None:
            return {}
        sizes = (block,) if group is None else (group, block)
        whole = math.prod(sizes)
        # The last axis first: in a kernel [height, width, in, out], that is the channels.
        for d in reversed(along):
            if shape[d] % whole == 0:
                return {d: sizes}
        axis_sizes = ", ".join(f"axis {d} has {shape[d]}" for d in along)
        raise SpecError(
            f"`{path}` has shape {shape}, and blocks of {whole} divide none of the axes that a "
            f"scale is shared along: {axis_sizes}. Give it another block, a format without blocks "
            "such as Int8(), or None to leave it as it is."
        )

    def labels(self, blocks: Blocks) -> dict[str, Labels]:
        """Returns the labels of each array that such a weight may have."""
        return {
            "codes": blocks.codes,
            "scales": blocks.scales,
            "zeros": blocks.scales,
            "outer": blocks.outer,
            "mins": blocks.scales,
            "outer_mins": blocks.outer,
        }

    def dtypes(self) -> tuple[Any, ...]:
        """Returns the dtypes that a backend must support."""
        raise NotImplementedError

    def encode(
        self, entries: jax.Array, within: Sequence[int], across: Sequence[int]
    ) -> dict[str, jax.Array]:
        """Returns the arrays of a weight.

        Args:
            entries: the weight in float32 or wider, in blocks: its axes are `Blocks.codes`.
            within: the axes of `entries` that share a scale.
            across: the axes of `entries` that share an outer scale.

        Returns:
            The codes, and arrays of size one along the axes that they lack.
        """
        raise NotImplementedError

    def decode(self, arrays: Mapping[str, jax.Array]) -> jax.Array:
        """Returns the entries of the weight, from arrays that broadcast against each other."""
        raise NotImplementedError

    def are_numbers(self, name: str, array: Any) -> bool:
        """Whether a JAX or NumPy array represents finite numbers."""
        if not jnp.issubdtype(array.dtype, jnp.floating):
            return True
        return bool(np.isfinite(np.asarray(array, np.float32)).all())

    def settings(self) -> dict[str, Any]:
        """Returns the fields and the name of the format, as JSON."""
        return {"format": self.name} | {name: getattr(self, name) for name in fields_of(self)}


def fields_of(format: Any) -> dict[str, Any]:
    """Returns the settings of a format with their types, without the axes that share scales."""
    hints = _hints_of(format if isinstance(format, type) else type(format))
    return {name: hint for name, hint in hints.items() if name != "along"}


@functools.cache
def _hints_of(cls: type) -> dict[str, Any]:
    """Returns the types of the fields of a format; those in strings are evaluated."""
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}  # pyright: ignore


def _shown(hint: Any) -> str:
    """Returns a type as messages name it, such as `int or None`."""
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(map(repr, typing.get_args(hint)))
    parts = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    names = ("None" if part is types.NoneType else str(part) for part in parts)
    return " or ".join(name.removeprefix("<class '").removesuffix("'>") for name in names)


def defformat(cls: type[Any]) -> type[Any]:
    """Registers a format class: makes it a frozen dataclass that `quantize` finds by name.

    Args:
        cls: a subclass of `Format`. Specs and files refer to it by its `name`.

    Returns:
        The class.

    Raises:
        ArgumentError: if a format of that name exists, or the class is not a format.

    Example:
        >>> from lorax.bases import Format, defformat
        >>> @defformat
        ... class Doubles(Format):
        ...     name = "doubles"
        >>> Doubles() == Doubles()
        True
    """
    if not (issubclass(cls, Format) and hasattr(cls, "name")):
        raise ArgumentError(f"defformat takes a subclass of Format with a `name`, not {cls!r}.")
    cls = dataclasses.dataclass(frozen=True)(cls)
    if cls.name in FORMATS:
        raise ArgumentError(f"The format {cls.name!r} is already defined, by {FORMATS[cls.name]}.")
    FORMATS[cls.name] = cls
    return cls


def format_of(value: Any) -> Format:
    """Returns a format, given the format or its name, with default settings.

    Args:
        value: a format, or its name.

    Returns:
        The format.

    Raises:
        SpecError: for anything else.

    Example:
        >>> from lorax.bases import format_of
        >>> format_of("nf4").name
        'nf4'
    """
    if isinstance(value, Format):
        return value
    if isinstance(value, str) and value in FORMATS:
        return FORMATS[value]()
    known = ", ".join(map(repr, FORMATS))
    raise SpecError(f"{value!r} is not a format; a format is one of {known}, or such as NF4(64).")
