"""The norm of a weight that is never formed, and the gain that it divides."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from . import _contract
from ._coded import CodedArray
from ._reading import reading
from ._term_products import align, relabeled
from ._terms import Inexpressible, Labels, Term


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Norm:
    """A gain that waits for its divisor: `magnitude / ‖base + Σ terms‖` over what it does not own.

        ‖W + Δ‖²  =  ‖W‖²  +  2⟨W, Δ⟩  +  ‖Δ‖²

    through products as small as the factors.

    Attributes:
        term: its first two factors are the magnitude and `‖W‖²`, both along the same labels.
        size: over how many entries the norm runs.
        detached: whether the divisor has no gradient.
    """

    term: Term
    size: int = dataclasses.field(metadata={"static": True})
    detached: bool = dataclasses.field(metadata={"static": True})

    def is_whole(self) -> bool:
        """Whether all entries that the norm runs over are still there."""
        summed = [label for label in self.term.shown if not self.term.owners(label)]
        is_part = any(label.is_index for label in summed)
        return not is_part and math.prod(label.size for label in summed) == self.size

    def _gain(self, term: Term, square: jax.Array, kept: Labels) -> Term:
        """The magnitude over the root of `square`; an output whose weights are all zero stays."""
        if self.detached:
            square = jax.lax.stop_gradient(square)
        # An output without a weight would divide by zero, and so would its gradient.
        square = jnp.where(square > 0, square, jnp.ones_like(square))
        magnitude = _along(term, 0, kept, square.dtype)
        return Term((magnitude / jnp.sqrt(square),), (kept,), term.out, term.sources)

    def of_sum(self, total: jax.Array) -> Term:
        """The gain beside a weight that is an array."""
        shown = self.term.shown
        kept = tuple(label for label in shown if self.term.owners(label))
        summed = tuple(k for k, label in enumerate(shown) if label not in kept)
        # The weight's shape -> [*shown] -> [*kept]
        entries = total.reshape([label.size for label in shown])
        return self._gain(self.term, jnp.sum(_squared(entries), summed), kept)

    def gain(self, base: jax.Array | CodedArray, terms: Sequence[Term]) -> Term:
        """The gain beside a weight that is never formed."""
        aligned, terms = _aligned(self.term, terms)
        kept = tuple(label for label in aligned.shown if aligned.owners(label))
        wide = _contract.wide_dtype(base.dtype)
        keywords: dict[str, Any] = {"dtype": wide, "precision": jax.lax.Precision.HIGHEST}
        sizes = [label.size for label in aligned.shown]

        def product(*operands: Any, **more: Any) -> jax.Array:
            return _contract.contract(operands, kept, **keywords, **more).real

        def cross(base: jax.Array, *factors: jax.Array, labels: Sequence[Labels]) -> jax.Array:
            met = zip(factors, labels, strict=True)
            return product((base.reshape(sizes), aligned.shown), *met, meets=0)

        conjugated = [_conjugate(term) for term in terms]
        # ‖W + Σ_j t_j‖²  =  ‖W‖²  +  2 Re Σ_j ⟨W, t_j⟩  +  Σ_jk ⟨t_j, t_k⟩, each [*kept]
        square = _along(aligned, 1, kept, wide)
        for k, term in enumerate(terms):
            of_term = functools.partial(cross, labels=term.labels)
            # ⟨W, t⟩: the factors meet the base as they would meet an operand.
            square += 2 * reading(of_term, base, *conjugated[k].factors)
            for j, other in enumerate(conjugated[: k + 1]):
                # The other term has the same axes, and its own rank.
                inner = {label for labels in other.labels for label in labels} - {*aligned.shown}
                first = 1 + max(
                    label.id for one in (term, other, aligned) for label in _labels(one)
                )
                names = {x: (x._replace(id=first + n),) for n, x in enumerate(sorted(inner))}
                renamed = other.rename(names)
                # ⟨t_j, t_k⟩: small factors alone. Off the diagonal it is there twice, as its own
                # conjugate.
                gram = product(
                    *zip(term.factors, term.labels, strict=True),
                    *zip(renamed.factors, renamed.labels, strict=True),
                )
                square += gram if j == k else 2 * gram
        return self._gain(aligned, square, kept)


def _labels(term: Term) -> Iterable[Any]:
    return itertools.chain(term.shown, *term.labels)


def _conjugate(term: Term) -> Term:
    if not any(map(jnp.iscomplexobj, term.factors)):
        return term
    return dataclasses.replace(term, factors=tuple(map(jnp.conj, term.factors)))


def _squared(array: jax.Array) -> jax.Array:
    return (array * array.conj()).real if jnp.iscomplexobj(array) else array * array


@functools.partial(jax.jit, static_argnums=1)
def norm_squared(array: jax.Array, kept: tuple[int, ...]) -> jax.Array:
    """`‖array‖²` over all axes but `kept`, whose order the result has; in float32 or wider."""
    summed = tuple(d for d in range(array.ndim) if d not in kept)
    total = jnp.sum(_squared(array.astype(_contract.wide_dtype(array.dtype))), summed)
    return jnp.transpose(total, [sorted(kept).index(d) for d in kept])


def _along(term: Term, k: int, kept: Labels, dtype: Any) -> jax.Array:
    """Factor k with its axes in the order of `kept`."""
    dtype = jnp.finfo(dtype).dtype
    return _contract.contract(((term.factors[k], term.labels[k]),), kept, dtype=dtype)


def _aligned(first: Term, others: Sequence[Term]) -> tuple[Term, list[Term]]:
    """Terms of one shape, all of which show the same labels, one for each axis if they can."""
    axes = range(len(first.out))
    try:
        first, *others = (term.fuse_all(axes, own=False)[0] for term in (first, *others))
    except Inexpressible:
        others = list(others)
    for _ in range(2):  # A later term may split labels that an earlier one shows.
        for k, other in enumerate(others):
            first, others[k] = align(first, relabeled(first, other), [(d, d) for d in axes])
    return first, others
