"""LoHa: the product, entry by entry, of two low-rank matrices.

ΔW[shared, in, out]  =  scale · (Σ_r a1[in, r] b1[r, out]) · (Σ_q a2[in, q] b2[q, out])
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax

from .._adapter import Adapter, AdapterSpec, Labeled, Layout, Start, Started, defkind, static
from .._axes import Axes
from .lora import check_rank, check_scale, lora_scale


@defkind
class LohaWeight(Adapter):
    """The four factors of one weight.

        ΔW  =  alpha / rank · (a1 b1) ⊙ (a2 b2)

    Its rank is up to `rank²`. Hyeon-Woo et al. 2022 (FedPara), arXiv:2108.06098.

    Attributes:
        a1: `[*shared, *in, rank]`.
        b1: `[*shared, rank, *out]`.
        a2: `[*shared, *in, rank]`.
        b2: `[*shared, rank, *out]`.
        rank: the inner size of both products.
        alpha: the numerator of the scale, or None for a scale of 1.
        in_axes: the weight's axes that meet the input.
        out_axes: the weight's axes that make the output.
        shared_axes: the weight's axes with their own factors for each entry.
    """

    kind = "loha"

    a1: Any
    b1: Any
    a2: Any
    b2: Any
    rank: int = static()
    alpha: float | None = static(None)
    in_axes: tuple[int, ...] = static((0,))
    out_axes: tuple[int, ...] = static((1,))
    shared_axes: tuple[int, ...] = static(())

    @property
    def scale(self) -> float:
        """The number that multiplies the delta."""
        return lora_scale(self.rank, self.alpha, "standard")

    def layout(self, shape: tuple[int, ...]) -> Layout:
        """How the factors run along a weight of `shape`."""
        axes = Labeled.of(self.axes, shape)
        factors = {}
        # Δ = (a1 b1) ⊙ (a2 b2): both share the labels of the weight, and each has its own rank
        # label.
        for k in range(2):
            rank = axes.inner(k, self.rank)
            factors[f"a{k + 1}"] = (*axes.shared, *axes.inputs, rank)
            factors[f"b{k + 1}"] = (*axes.shared, rank, *axes.outputs)
        return Layout(axes.out, factors)


@dataclasses.dataclass(frozen=True)
class LohaSpec(AdapterSpec):
    """LoHa of one weight: a delta of rank up to `rank²`, from twice the numbers of LoRA.

    As in PEFT, `a2` is zero at first: `b_init` of `init_lora` draws it, and `a_init` the others.

    Args:
        rank: the inner size of both products.
        alpha: the delta is scaled by `alpha / rank`; None means `alpha = rank`.
        in_axes: as in `LoraSpec`.
        out_axes: as in `LoraSpec`.
        shared_axes: as in `LoraSpec`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from lorax import LohaSpec, init_lora
        >>> frozen, tunable = init_lora({"w": jnp.ones((5, 3))}, {"w": LohaSpec(2)},
        ...                             jax.random.key(0))
        >>> tunable["w"].a1.shape, tunable["w"].b2.shape
        ((5, 2), (2, 3))
    """

    has_matrix_rank = True

    rank: int
    alpha: float | None = None
    in_axes: Sequence[int] | None = None
    out_axes: Sequence[int] | None = None
    shared_axes: Sequence[int] = ()

    def check(self, path: str, shape: tuple[int, ...], axes: Axes) -> None:
        """Refuses ranks and scales that are none."""
        check_rank(path, self, self.rank)
        check_scale(path, self.alpha)

    def blank(self, shape: tuple[int, ...], axes: Axes) -> LohaWeight:
        """The adapter without arrays."""
        return LohaWeight(
            None, None, None, None, self.rank, self.alpha, axes.inputs, axes.outputs, axes.shared
        )

    def start(self, start: Start) -> Started:
        """Three random factors, and `a2` of zeros."""
        shape = start.base.shape
        weight = self.blank(shape, start.axes)
        fan_in, fan_out = start.axes.sizes(shape)
        random, zero = start.initializers
        # One zero among the four makes Δ zero. The other three let the gradient of a2 through.
        inits = {"a1": random, "b1": random, "a2": zero, "b2": random}
        shapes = weight.layout(shape).shapes()
        factors = {}
        for (name, init), key in zip(inits.items(), jax.random.split(start.key, 4), strict=True):
            matrix = (fan_in, self.rank) if name in ("a1", "a2") else (self.rank, fan_out)
            factors[name] = start.draw(key, init, matrix, shapes[name])
        return Started(weight.with_factors(factors))
