"""Trainable tokens: some rows of a table are trained, and the others stay frozen.

W'[rows[k], :]  =  values[k, :]
"""

import dataclasses
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from .._adapter import Adapter, Labeled, Layout, Neutral, defkind, make_term, static
from .._adapter_spec import AdapterSpec, Start, Started
from .._arrays import own
from .._axes import Axes
from .._errors import SpecError
from .._statics import plain_axes
from .._terms import Term


@defkind
class TokensWeight(Adapter):
    """The trained rows of one table.

        W' = W + onehot[in, k] @ (values - W[indices])

    Besides the base, the frozen tree holds `replaced`: the original rows of the base. This is
    PEFT's `TrainableTokensConfig`.

    Attributes:
        values: `[*shared, k, *out]`, the rows in the order of `indices`.
        indices: the positions of these rows along the input axis.
        in_axes: the one axis of the weight along which rows are counted.
        out_axes: the other axes.
        shared_axes: the weight's axes with their own rows for each entry.
    """

    kind = "tokens"

    values: Any
    indices: tuple[int, ...] = static()
    in_axes: tuple[int, ...] = static((0,))
    out_axes: tuple[int, ...] = static((1,))
    shared_axes: tuple[int, ...] = static(())

    def layout(self, shape: tuple[int, ...]) -> Layout:
        """Returns the labels of the rows for a weight of `shape`."""
        axes = Labeled.of(self.axes, shape)
        # values and replaced [*shared, k, *out]
        rows = (*axes.shared, axes.inner(0, len(self.indices)), *axes.outputs)
        return Layout(axes.out, {"values": rows}, {"replaced": rows})

    def derived(self, base: Any) -> dict[str, Any]:
        """Returns the original rows of the base."""
        (axis,) = self.in_axes
        # […, vocabulary, …] -> […, k, …]
        rows = jnp.take(jnp.asarray(base), jnp.asarray(self.indices), axis)
        order = (*self.shared_axes, axis, *self.out_axes)
        return {"replaced": jnp.transpose(rows, order)}  # [*shared, k, *out]

    def neutral(self) -> dict[str, Neutral]:
        """Returns the original rows of the base."""
        return {"values": lambda frozen: frozen["replaced"]}

    def term(self, shape: tuple[int, ...], frozen: Mapping[str, Any], source: Hashable) -> Term:
        """Returns the difference between trained and original rows, at their positions."""
        layout, axes = self.layout(shape), Labeled.of(self.axes, shape)
        rows = layout.factors["values"]
        if not all(0 <= index < shape[self.in_axes[0]] for index in self.indices):
            raise SpecError(
                f"`{source}` replaces the rows {self.indices}, but its table has only "
                f"{shape[self.in_axes[0]]} rows. The adapter is for another base."
            )
        (vocabulary,), chosen = axes.inputs, axes.inner(0, len(self.indices))
        # onehot [k, vocabulary] · (values − replaced) [k, *out]: zero in all other rows.
        more = self.values - frozen["replaced"]
        onehot = jax.nn.one_hot(jnp.asarray(self.indices), vocabulary.size, dtype=more.dtype)
        labels = {"onehot": (chosen, vocabulary), "more": rows}
        return make_term({"onehot": onehot, "more": more}, labels, layout.out, source)

    def summary(self) -> str:
        """Returns the number of rows, for a table."""
        return f"{len(self.indices)} tokens"


@dataclasses.dataclass(frozen=True)
class TokensSpec(AdapterSpec):
    """The spec that trains some rows of an embedding table, such as those of new tokens.

        W'[indices] = values

    A table that is also the output head is one parameter, so the rows change in both.

    Args:
        indices: the rows, as distinct ints from zero.
        in_axes: the axis along which rows are counted; None means all axes but the outputs, such as
            the first of a table `(vocabulary, width)`.
        out_axes: as in `LoraSpec`.
        shared_axes: as in `LoraSpec`; the rows have the same indices in each entry.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from lorax import TokensSpec, init_lora
        >>> params = {"table": jnp.arange(8.0).reshape(4, 2)}
        >>> frozen, tunable = init_lora(params, {"table": TokensSpec([3, 1])}, jax.random.key(0))
        >>> tunable["table"].values.tolist()
        [[6.0, 7.0], [2.0, 3.0]]
    """

    indices: Sequence[int]
    in_axes: Sequence[int] | None = None
    out_axes: Sequence[int] | None = None
    shared_axes: Sequence[int] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "indices", plain_axes(self.indices))

    def check(self, path: str, shape: tuple[int, ...], axes: Axes) -> None:
        """Raises `SpecError` for invalid indices, or more than one input axis."""
        if len(axes.inputs) != 1:
            raise SpecError(
                f"`{path}` has a TokensSpec and the input axes {axes.inputs}; a table has one "
                "axis of rows. If it is the first, pass in_axes=[0]."
            )
        given = self.indices
        if not isinstance(given, tuple) or any(type(index) is not int for index in given):
            raise SpecError(f"`{path}` has a TokensSpec of {given!r}; it takes a sequence of ints.")
        if not given:
            raise SpecError(
                f"`{path}` has a TokensSpec without indices; give it LORA_FREEZE instead."
            )
        count = shape[axes.inputs[0]]
        for index in given:
            if not 0 <= index < count:
                raise SpecError(
                    f"`{path}` has a TokensSpec with index {index}, but its {count} rows are 0 to "
                    f"{count - 1}. To add rows, resize the table first."
                )
            if given.count(index) > 1:
                raise SpecError(
                    f"`{path}` has a TokensSpec with index {index} more than once; name each row "
                    "once."
                )

    def blank(self, shape: tuple[int, ...], axes: Axes) -> TokensWeight:
        """Returns the adapter without arrays."""
        return TokensWeight(None, tuple(self.indices), axes.inputs, axes.outputs, axes.shared)

    def start(self, start: Start) -> Started:
        """Returns the original rows of the base."""
        base = start.array(self, "the rows of the table")
        weight = self.blank(base.shape, start.axes)
        rows = weight.derived(base)["replaced"].astype(start.dtype)
        return Started(weight.with_factors({"values": rows}), {"replaced": own(rows)})
