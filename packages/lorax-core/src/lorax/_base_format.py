"""How a weight is held in few bits: a format, and which entries of a weight share a scale.

A format is one module of `bases/`, and nothing outside of it handles one by name. `Blocks` says by
labels which entries share scales; shapes, placement and files follow from it.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np

from ._errors import SpecError
from ._statics import make_plain
from ._terms import Label, Labels

FORMATS: "dict[str, type[Format]]" = {}
"""The classes of formats, by the name that files know them by."""


class Blocks(NamedTuple):
    """The labels of a weight's axes where entries share scales.

    Attributes:
        out: the labels of each of the weight's axes: block and place within, for an axis in blocks;
            group, block and place within, where blocks are in groups.
        codes: of an array with an entry for each of the weight's.
        scales: of one with an entry for each block.
        outer: of one with an entry for each group; without groups, for each block but those along
            one axis: `[*shared, *out]`.
    """

    out: tuple[Labels, ...]
    codes: Labels
    scales: Labels
    outer: Labels

    @classmethod
    def of(
        cls, shape: Sequence[int], blocks: Mapping[int, Sequence[int]], along: Sequence[int]
    ) -> Self:
        """The labels for a weight of `shape`.

        Args:
            shape: of the weight.
            blocks: of each axis in blocks, the entries of a block, and before them the blocks of a
                group where there are groups.
            along: the axes whose entries share scales: in blocks where they have some, else whole.
        """
        # Axis d has the label d; labels within its blocks come behind those of all axes.
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
    """How a weight is held in few bits.

    A format is a frozen dataclass under `@defformat`, whose fields are settings. It makes arrays of
    a weight in `encode`, and an entry of the weight of an entry of each array in `decode`.
    """

    name: ClassVar[str]

    # The names of the arrays, in order; the codes come first.
    arrays: ClassVar[tuple[str, ...]] = ("codes", "scales", "zeros", "outer", "mins", "outer_mins")

    def __post_init__(self) -> None:
        make_plain(self)
        self.check()

    def check(self) -> None:
        """Raises `SpecError` for settings that no weight can have."""

    def blocks(
        self, path: str, shape: tuple[int, ...], along: tuple[int, ...]
    ) -> dict[int, tuple[int, ...]]:
        """The axes that are in blocks; the entries of a block, before them the blocks of a group.

        Blocks run along the last of the axes that share scales which they divide.
        """
        block: int | None = getattr(self, "block", None)
        group: int | None = getattr(self, "group", None)
        if block is None:
            return {}
        sizes = (block,) if group is None else (group, block)
        whole = math.prod(sizes)
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
        """The labels of each array that such a weight may have."""
        return {
            "codes": blocks.codes,
            "scales": blocks.scales,
            "zeros": blocks.scales,
            "outer": blocks.outer,
            "mins": blocks.scales,
            "outer_mins": blocks.outer,
        }

    def dtypes(self) -> tuple[Any, ...]:
        """The dtypes that a backend must know."""
        raise NotImplementedError

    def encode(
        self, entries: jax.Array, within: Sequence[int], across: Sequence[int]
    ) -> dict[str, jax.Array]:
        """The arrays of a weight.

        Args:
            entries: the weight in float32 or wider, in blocks: `Blocks.codes` are its axes.
            within: the axes of `entries` that a scale is shared along.
            across: the axes of `entries` that make one output: the blocks, too.

        Returns:
            The codes, and arrays with a size of one along the axes that they lack.
        """
        raise NotImplementedError

    def decode(self, arrays: Mapping[str, jax.Array]) -> jax.Array:
        """The entries of the weight, from arrays that broadcast against each other."""
        raise NotImplementedError

    def are_numbers(self, name: str, array: Any) -> bool:
        """Whether an array, of JAX or of NumPy, represents finite numbers."""
        if not jnp.issubdtype(array.dtype, jnp.floating):
            return True
        return bool(np.isfinite(np.asarray(array, np.float32)).all())

    def settings(self) -> dict[str, Any]:
        """The fields, as JSON, with the name."""
        return {"format": self.name} | {name: getattr(self, name) for name in fields_of(self)}


def fields_of(format: Any) -> dict[str, Any]:
    """The settings of a format and their types; which axes it shares scales along is not one."""
    fields = dataclasses.fields(format)
    return {field.name: field.type for field in fields if field.name != "along"}


def defformat(cls: type[Any]) -> type[Any]:
    """Registers a class of formats: it becomes a frozen dataclass, and `quantize` takes its name.

    Args:
        cls: a subclass of `Format`. Its `name` is the one that specs and files have for it.

    Returns:
        The class.

    Raises:
        ValueError: where there is a format of that name.

    Example:
        >>> from lorax.bases import Format, defformat
        >>> @defformat
        ... class Doubles(Format):
        ...     name = "doubles"
        >>> Doubles() == Doubles()
        True
    """
    cls = dataclasses.dataclass(frozen=True)(cls)
    if cls.name in FORMATS:
        raise ValueError(f"There is a format {cls.name!r} already: {FORMATS[cls.name]}.")
    FORMATS[cls.name] = cls
    return cls


def format_of(value: Any) -> Format:
    """A format, or the one with default settings of that name.

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
