"""DeLoRA: a product of two normalized factors, whose length is a separate parameter.

delta[in, out]  =  norm[in] · Σ_r a[in, r] · g[r] · b[r, out]

g[r]  =  length / (rank · ‖a[:, r]‖ · ‖b[r, :]‖), separately for each entry of the shared axes
"""

import dataclasses
import math
import numbers
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from .._adapter import Adapter, Labeled, Layout, Neutral, defkind, make_term, static
from .._adapter_spec import AdapterSpec, Start, Started
from .._axes import Axes
from .._contract import product_dtype
from .._errors import SpecError
from .._norm import norm_squared
from .._terms import Term
from .lora import check_rank, draw_two, two_factors, warn_of_high_rank

# Shorter vectors are treated as if they had this norm, as in PEFT.
SHORTEST = 1e-4


@defkind
class DeloraWeight(Adapter):
    """The trained factors of one weight, and the length of their product.

        delta = diag(norm) @ a @ diag(g) @ b,   g = length / (rank ‖a[:, r]‖ ‖b[r, :]‖)

    for a kernel `[in, out]`. Besides the base, the frozen tree holds `norm`: the norms `‖W[in, :]‖`
    of the base over its outputs, `[*shared, *in]`. Bini et al. 2025, arXiv:2503.18225.

    Attributes:
        a: `[*shared, *in, rank]`, the fan-in factor.
        b: `[*shared, rank, *out]`, the fan-out factor.
        length: `[*shared]`, the paper's λ.
        rank: the inner size.
        in_axes: the weight's axes that meet the input.
        out_axes: the weight's axes that produce the output.
        shared_axes: the weight's axes with their own factors for each entry.
    """

    kind = "delora"

    a: Any
    b: Any
    length: Any
    rank: int = static()
    in_axes: tuple[int, ...] = static((0,))
    out_axes: tuple[int, ...] = static((1,))
    shared_axes: tuple[int, ...] = static(())

    def layout(self, shape: tuple[int, ...]) -> Layout:
        """Returns the labels of the factors for a weight of `shape`."""
        axes = Labeled.of(self.axes, shape)
        a, b = two_factors(axes, self.rank)
        # a [*in, rank], b [rank, *out], length [*shared], and the frozen norm [*in]
        frozen = {"norm": (*axes.shared, *axes.inputs)}
        return Layout(axes.out, {"a": a, "b": b, "length": axes.shared}, frozen)

    def derived(self, base: Any) -> dict[str, Any]:
        """Returns the norms of the base."""
        return {"norm": _norm(base, self.axes)}

    def neutral(self) -> dict[str, Neutral]:
        """Returns zeros, with which the delta has length zero."""
        return {"a": 0.0, "b": 0.0, "length": 0.0}

    def term(self, shape: tuple[int, ...], frozen: Mapping[str, Any], source: Hashable) -> Term:
        """Returns the factors with a gain per rank that gives their product its length."""
        layout, axes = self.layout(shape), Labeled.of(self.axes, shape)
        rank = axes.inner(0, self.rank)
        shared = len(axes.shared)
        # ‖a[:, r]‖² · ‖b[r, :]‖², each [*shared, rank]
        square = _clamped(self.a, (*range(shared), self.a.ndim - 1))
        square *= _clamped(self.b, range(shared + 1))
        # length [*shared] / (rank · ‖a_r‖ ‖b_r‖) [*shared, rank]
        wide = product_dtype(square.dtype, self.length.dtype)
        lengths = (self.rank * jnp.sqrt(square)).astype(wide)
        gain = self.length.astype(wide)[..., None] / lengths
        factors = {
            # Δ = norm [in] ⊙ a [in, rank] · diag(gain [rank]) · b [rank, out]
            "norm": frozen["norm"],
            "a": self.a,
            "gain": gain,
            "b": self.b,
        }
        labels = {**layout.factors, **layout.frozen, "gain": (*axes.shared, rank)}
        return make_term(factors, {name: labels[name] for name in factors}, layout.out, source)


def _clamped(array: jax.Array, kept: Sequence[int]) -> jax.Array:
    """Returns squared norms over all axes but `kept`, at least `SHORTEST` squared."""
    return jnp.maximum(norm_squared(array, tuple(kept)), SHORTEST**2)


def _norm(base: Any, axes: Axes) -> jax.Array:
    """Returns `‖W[in, :]‖` over the outputs, `[*shared, *in]`."""
    return jnp.sqrt(norm_squared(jnp.asarray(base), (*axes.shared, *axes.inputs)))


@dataclasses.dataclass(frozen=True)
class DeloraSpec(AdapterSpec):
    """The spec of DeLoRA for one weight: the delta's direction and length are trained separately.

        delta = diag(norm) @ a @ diag(g) @ b,   g = length / (rank ‖a[:, r]‖ ‖b[r, :]‖)

    Args:
        rank: the inner size.
        length: the initial length of the delta, the paper's λ.
        in_axes: as in `LoraSpec`.
        out_axes: as in `LoraSpec`.
        shared_axes: as in `LoraSpec`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from lorax import DeloraSpec, init_lora
        >>> params = {"w": jnp.ones((5, 4))}
        >>> frozen, tunable = init_lora(params, {"w": DeloraSpec(2)}, jax.random.key(0))
        >>> tunable["w"].length.item(), frozen["w"].factors["norm"].tolist()
        (15.0, [2.0, 2.0, 2.0, 2.0, 2.0])
    """

    has_matrix_rank = True

    rank: int
    length: float = 15.0
    in_axes: Sequence[int] | None = None
    out_axes: Sequence[int] | None = None
    shared_axes: Sequence[int] = ()

    def check(self, path: str, shape: tuple[int, ...], axes: Axes) -> None:
        """Raises `SpecError` for an invalid rank or length."""
        check_rank(path, self, self.rank)
        first = self.length
        if not isinstance(first, numbers.Real) or not math.isfinite(first) or first == 0:
            raise SpecError(
                f"`{path}` has length {first!r}; it must be a finite number other than zero, which "
                "would leave all gradients of the factors zero. PEFT's default is 15."
            )
        warn_of_high_rank(path, self.rank, shape, axes)

    def blank(self, shape: tuple[int, ...], axes: Axes) -> DeloraWeight:
        """Returns the adapter without arrays."""
        return DeloraWeight(None, None, None, self.rank, axes.inputs, axes.outputs, axes.shared)

    def start(self, start: Start) -> Started:
        """Returns `a` and `b` like those of LoRA, with the norms of the base."""
        base = start.array(self, "the norms of the weight")
        a, b = draw_two(start, self.rank, *start.initializers)
        weight = self.blank(base.shape, start.axes)
        shape = weight.layout(base.shape).shapes()["length"]
        # Real, as the norms are, also where the weight is complex.
        real = jnp.finfo(start.dtype).dtype
        length = jnp.full(shape, self.length, real)
        norm = _norm(base, start.axes).astype(real)
        return Started(weight.with_factors({"a": a, "b": b, "length": length}), {"norm": norm})
