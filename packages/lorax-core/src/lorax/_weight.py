"""An adapter of one weight: its factors, and the term that they are."""

import dataclasses
import math
from collections.abc import Hashable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from ._axes import Axes
from ._formats import register_with_export, register_with_flax
from ._statics import make_plain
from ._terms import FactoredArray, Label, Term

Scaling = Literal["standard", "rslora"]


def lora_scale(rank: int, alpha: float | None, scaling: Scaling) -> float:
    """`alpha / rank`, or `alpha / √rank` for rsLoRA; 1 where alpha is None."""
    if alpha is None:
        return 1.0
    return alpha / (math.sqrt(rank) if scaling == "rslora" else rank)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LoraWeight:
    """The trainable factors of one weight.

    For a kernel `[in, out]` the delta is `scale · a @ b`; in general, with the axes of each group
    in the weight's order,

        delta[shared, in, out] = scale · Σ_r a[shared, in, r] · b[shared, r, out]

    `scale` is `alpha / rank`, or `alpha / √rank` where `scaling` is "rslora" (Kalajdzievski 2023,
    arXiv:2312.03732), and 1 where `alpha` is None. LoRA is Hu et al. 2021, arXiv:2106.09685.

    `a` and `b` are leaves of the pytree, all else is static, so optimizers, `jax.vmap` and
    checkpoints see two arrays.

    Attributes:
        a: `[*shared, *in, rank]`, the fan-in factor: it meets the input first.
        b: `[*shared, rank, *out]`, the fan-out factor.
        rank: the inner size.
        alpha: the numerator of the scale, or None for a scale of 1.
        scaling: "standard" or "rslora".
        in_axes: the weight's axes that meet the input.
        out_axes: the weight's axes that make the output.
        shared_axes: the weight's axes with factors of their own for each entry: stacked layers,
            experts.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from lorax import LoraWeight, materialize
        >>> weight = LoraWeight(jnp.ones((3, 1)), jnp.ones((1, 2)), rank=1, alpha=2.0)
        >>> materialize(jnp.zeros((3, 2)), weight).tolist()
        [[2.0, 2.0], [2.0, 2.0], [2.0, 2.0]]
    """

    a: Any
    b: Any
    rank: int = dataclasses.field(metadata={"static": True})
    alpha: float | None = dataclasses.field(metadata={"static": True}, default=None)
    scaling: Scaling = dataclasses.field(metadata={"static": True}, default="standard")
    in_axes: tuple[int, ...] = dataclasses.field(metadata={"static": True}, default=(0,))
    out_axes: tuple[int, ...] = dataclasses.field(metadata={"static": True}, default=(1,))
    shared_axes: tuple[int, ...] = dataclasses.field(metadata={"static": True}, default=())

    # JAX rebuilds adapters with anything at all for `a` and `b`, so nothing is asked of these.
    def __post_init__(self) -> None:
        make_plain(self)
        register_with_flax(LoraWeight)

    @property
    def scale(self) -> float:
        """The number that multiplies `a @ b`."""
        return lora_scale(self.rank, self.alpha, self.scaling)

    @property
    def axes(self) -> Axes:
        """The roles of the weight's axes."""
        return Axes(self.shared_axes, self.in_axes, self.out_axes)

    def term(self, shape: tuple[int, ...], source: Hashable = None) -> Term:
        """The adapter as a term of a weight of `shape`."""
        axis = [Label(d, size) for d, size in enumerate(shape)]
        rank = Label(len(shape), self.rank)
        shared, inputs, outputs = ([axis[d] for d in group] for group in self.axes)
        term = Term(
            (self.a, self.b),
            ((*shared, *inputs, rank), (*shared, rank, *outputs)),
            tuple((label,) for label in axis),
            () if source is None else (source,),
        )
        return term if self.scale == 1 else term.scale(self.scale)


def factored(base: jax.Array, weight: LoraWeight, source: Hashable = None) -> FactoredArray:
    """A base with its adapter."""
    return FactoredArray(base, (weight.term(jnp.shape(base), source),))


register_with_export(LoraWeight)
