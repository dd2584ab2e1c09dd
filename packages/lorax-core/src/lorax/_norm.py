"""The norm of a weight that is never formed, and the gain that is divided by it."""

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
    """A pending gain `magnitude / ‖base + Σ terms‖`, the norm over labels that it does not own.

        ‖W + Δ‖²  =  ‖W‖²  +  2⟨W, Δ⟩  +  ‖Δ‖²

    is computed through products as small as the factors.

    Attributes:
        term: its first two factors are the magnitude and `‖W‖²`, both with the same labels.
        size: the number of entries that the norm runs over.
        detached: whether the divisor has no gradient.
    """

    term: Term
    size: int = dataclasses.field(metadata={"static": True})
    detached: bool = dataclasses.field(metadata={"static": True})

    def is_whole(self) -> bool:
        """Whether all entries that the norm runs over are still present."""
        summed = [label for label in self.term.shown if not self.term.owners(label)]
        # Looked-up entries along such an axis are some of the entries, possibly repeated.
        is_part = any(label.is_index for label in summed)
        return not is_part and math.prod(label.size for label in summed) == self.size

    def _gain(self, term: Term, square: jax.Array, kept: Labels) -> Term:
        """Returns magnitude / √square; where `square` is zero, the divisor is 1."""
        # As in the paper and PEFT: less memory, for a gradient that ignores the norm.
        if self.detached:
            square = jax.lax.stop_gradient(square)
        # An output whose weights are all zero would divide by zero; replacing its square before
        # the root keeps the gradient finite as well.
        square = jnp.where(square > 0, square, jnp.ones_like(square))
        magnitude = _along(term, 0, kept, square.dtype)
        return Term((magnitude / jnp.sqrt(square),), (kept,), term.out, term.sources)

    def of_sum(self, total: jax.Array) -> Term:
        """Returns the gain for a weight that has been summed into an array."""
        shown = self.term.shown
        kept = tuple(label for label in shown if self.term.owners(label))
        summed = tuple(k for k, label in enumerate(shown) if label not in kept)
        # The weight's shape -> [*shown] -> [*kept]
        entries = total.reshape([label.size for label in shown])
        return self._gain(self.term, jnp.sum(_squared(entries), summed), kept)

    def gain(self, base: jax.Array | CodedArray, terms: Sequence[Term]) -> Term:
        """Returns the gain for a weight that is never formed."""
        aligned, terms = _aligned(self.term, terms)
        kept = tuple(label for label in aligned.shown if aligned.owners(label))
        wide = _contract.wide_dtype(base.dtype)
        keywords: dict[str, Any] = {"dtype": wide, "precision": jax.lax.Precision.HIGHEST}
        sizes = [label.size for label in aligned.shown]

        def product(*operands: Any, **more: Any) -> jax.Array:
            return _contract.contract(operands, kept, **keywords, **more).real

        def cross(base: jax.Array, *factors: jax.Array, labels: Sequence[Labels]) -> jax.Array:
            # The base is the operand that meets (`meets=0`), so no delta is formed.
            met = zip(factors, labels, strict=True)
            return product((base.reshape(sizes), aligned.shown), *met, meets=0)

        conjugated = [_conjugate(term) for term in terms]
        # ‖W + Σ_j t_j‖²  =  ‖W‖²  +  2 Re Σ_j ⟨W, t_j⟩  +  Σ_jk ⟨t_j, t_k⟩, each [*kept]
        square = _along(aligned, 1, kept, wide)
        for k, term in enumerate(terms):
            of_term = functools.partial(cross, labels=term.labels)
            # ⟨W, t⟩: the base is contracted with one factor after the other, like an operand.
            square += 2 * reading(of_term, base, *conjugated[k].factors)
            # The Gram matrix ⟨t_j, t_k⟩ is Hermitian: only its lower triangle is computed.
            for j, other in enumerate(conjugated[: k + 1]):
                # Both terms show the same labels, but each sums over a rank of its own: rename one.
                inner = {label for labels in other.labels for label in labels} - {*aligned.shown}
                first = 1 + max(
                    label.id for one in (term, other, aligned) for label in _labels(one)
                )
                names = {x: (x._replace(id=first + n),) for n, x in enumerate(sorted(inner))}
                renamed = other.rename(names)
                # ⟨t_j, t_k⟩: a contraction of small factors only. Off the diagonal, the pair occurs
                # twice, as itself and as its conjugate, which have the same real part.
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
    """Returns `‖array‖²` over all axes but `kept`, in the order of `kept`; float32 or wider."""
    summed = tuple(d for d in range(array.ndim) if d not in kept)
    # In float32 or wider: squares of a low-precision weight would overflow or lose digits.
    total = jnp.sum(_squared(array.astype(_contract.wide_dtype(array.dtype))), summed)
    return jnp.transpose(total, [sorted(kept).index(d) for d in kept])


def _along(term: Term, k: int, kept: Labels, dtype: Any) -> jax.Array:
    """Returns factor k as a real array with its axes in the order of `kept`."""
    # `finfo` of a complex dtype gives its real counterpart: magnitudes and norms are real.
    dtype = jnp.finfo(dtype).dtype
    return _contract.contract(((term.factors[k], term.labels[k]),), kept, dtype=dtype)


def _aligned(first: Term, others: Sequence[Term]) -> tuple[Term, list[Term]]:
    """Returns terms of one shape with the same labels on each axis, one per axis if possible."""
    axes = range(len(first.out))
    try:
        first, *others = (term.fuse_all(axes, own=False)[0] for term in (first, *others))
    except Inexpressible:
        # Axes with several labels stay as they are and are split in the same way below.
        others = list(others)
    for _ in range(2):  # A later term may split labels that an earlier one shows.
        for k, other in enumerate(others):
            first, others[k] = align(first, relabeled(first, other), [(d, d) for d in axes])
    return first, others
