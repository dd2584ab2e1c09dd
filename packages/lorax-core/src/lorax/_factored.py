"""A weight while the transformed function runs: a base, added terms, and multiplying gains.

    W  =  Π gains  ⊙  turn · (base + Σ terms)

A gain is a term that owns few of the weight's labels. One gain may be pending: its divisor, the
norm of the sum, is computed only when the weight is used, and only for the part that is left of it.
A turn is a block-diagonal matrix along one axis.

All of these pieces are terms of the same shape, so any function that moves a term moves them all.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp

from . import _contract
from ._coded import CodedArray, is_coded
from ._meter import Meter
from ._norm import Norm
from ._sharding import sharded_like
from ._terms import Term
from ._turn import Turn


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Keys:
    """Dropout on the input of the terms: PRNG keys of the weight, one per shared entry.

    Attributes:
        term: one factor of key data, `[*shared, words]`, along the axes of the weight.
        rate: the fraction of entries that is dropped.
        impl: the PRNG implementation of the keys.
    """

    term: Term
    rate: float = dataclasses.field(metadata={"static": True})
    impl: str = dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FactoredArray:
    """`Π gains ⊙ turn · (base + Σ terms)`: what a weight is while the transformed function runs.

    Attributes:
        base: the frozen weight.
        terms: the terms that are added to it.
        gains: the gains that multiply the sum.
        norm: a pending gain, whose divisor has not been computed yet.
        keys: the PRNG keys of dropout on the input of the terms, as a term of integers.
        turn: a block-diagonal matrix that multiplies the sum along one axis.
        meter: accumulates statistics of the inputs of the weight; it does not change values.
    """

    base: jax.Array | CodedArray
    terms: tuple[Term, ...]
    gains: tuple[Term, ...] = ()
    norm: Norm | None = None
    keys: Keys | None = None
    turn: Turn | None = None
    meter: Meter | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight."""
        return self.base.shape

    @property
    def is_sum(self) -> bool:
        """Whether the weight is a base plus terms, without any other piece."""
        rest = (self.norm, self.keys, self.turn, self.meter)
        return not self.gains and all(piece is None for piece in rest)

    @property
    def is_flat(self) -> bool:
        """Whether keeping the pieces separate saves nothing.

        That is so if one factor of each term spans all that is left of the weight, and the gains
        vary along all of it.
        """
        of_gains = (*self.gains, *([self.norm.term] if self.norm else ()))
        flat = all(term.is_flat for term in self.terms) and self.meter is None
        turned = self.turn is None or self.turn.is_owned
        return flat and turned and all(gain.is_owned for gain in of_gains)

    @property
    def pieces(self) -> tuple[Term, ...]:
        """All pieces but the base: terms, gains, and those of the norm, keys, turn, meter."""
        rest = (self.norm, self.keys, self.turn, self.meter)
        pending = [piece.term for piece in rest if piece is not None]
        return (*self.terms, *self.gains, *pending)

    def steps_through(self, axis: int) -> bool:
        """Whether a `scan` over this axis would separate entries that belong together."""
        turned = self.turn is not None and self.turn.axis == axis
        return turned or (self.meter is not None and axis in self.meter.axes)

    @property
    def is_bare(self) -> bool:
        """Whether this is a base that is stored as codes, without any other piece."""
        return is_coded(self.base) and not self.pieces

    @property
    def sources(self) -> list[tuple[Hashable, ...]]:
        """The source names of a base that is stored as codes, then those of each piece."""
        of_base = [self.base.sources] if is_coded(self.base) else []
        return of_base + [piece.sources for piece in self.pieces]

    def with_sources(self, names: Iterator[tuple[Hashable, ...]]) -> "FactoredArray":
        """Returns the same weight with other source names, in the order of `sources`."""
        base = self.base
        if is_coded(base):
            base = dataclasses.replace(base, sources=next(names))
        return self.with_pieces(
            base, [dataclasses.replace(piece, sources=next(names)) for piece in self.pieces]
        )

    def unnamed(self) -> "FactoredArray":
        """Returns the same weight without source names, so that equal layers are equal."""
        return self.with_sources(itertools.repeat(()))

    def with_pieces(self, base: Any, pieces: Iterable[Term]) -> "FactoredArray":
        """Returns the weight with another base and other pieces, in the order of `pieces`."""
        rest = iter(pieces)
        terms = tuple(next(rest) for _ in self.terms)
        gains = tuple(next(rest) for _ in self.gains)
        norm = self.norm and dataclasses.replace(self.norm, term=next(rest))
        keys = self.keys and dataclasses.replace(self.keys, term=next(rest))
        turn = self.turn and self.turn.moved_to(next(rest))
        meter = self.meter and self.meter.moved_to(next(rest))
        return FactoredArray(base, terms, gains, norm, keys, turn, meter)

    def moved(self, change: Callable[[Term], Term]) -> "FactoredArray":
        """Returns the weight with `change` applied to every piece; the base stays unchanged.

        A pending norm that would lose some of the entries it runs over is computed first.
        """
        weight = self
        if weight.norm is not None:
            norm = dataclasses.replace(weight.norm, term=change(weight.norm.term))
            if not norm.is_whole():
                weight = weight.resolved()
        return weight.with_pieces(weight.base, map(change, weight.pieces))

    def resolved(self) -> "FactoredArray":
        """Returns the same weight with its pending norm computed."""
        if self.norm is None:
            return self
        gain = self.norm.gain(self.base, self.terms)
        return dataclasses.replace(self, gains=(*self.gains, gain), norm=None)

    def replace_terms(self, terms: Iterable[Term]) -> "FactoredArray":
        """Returns the same weight with other terms."""
        return dataclasses.replace(self, terms=tuple(terms))

    def replace_base(self, base: jax.Array | CodedArray) -> "FactoredArray":
        """Returns the same weight with another base."""
        return dataclasses.replace(self, base=base)

    def array(self) -> jax.Array:
        """Returns the materialized weight: summed in float32 or wider, cast to the base's dtype."""
        wide = _contract.wide_dtype(self.base.dtype)
        total = self.base.astype(wide)
        # A merged weight is computed once and used many times, so it is worth full precision.
        highest: dict[str, Any] = {"precision": jax.lax.Precision.HIGHEST}
        for term in self.terms:
            total = total + term.array(wide, **highest)
        if self.turn is not None:
            total = self.turn.applied_to(total, self._axes, **highest)
        gains = self.gains if self.norm is None else (*self.gains, self.norm.of_sum(total))
        for gain in gains:
            total = total * gain.array(wide, **highest)
        return total.astype(self.base.dtype)

    @property
    def _axes(self) -> dict[int, int]:
        return {d: d for d in range(self.base.ndim)}

    def metered(self, operand: jax.Array, places: Mapping[int, int], **keywords: Any) -> jax.Array:
        """Returns the operand, read by the weight's meter if there is one; see `Meter.read`."""
        return operand if self.meter is None else self.meter.read(operand, places, **keywords)

    def turned(self, array: jax.Array) -> jax.Array:
        """Returns an array with the weight's axes, multiplied by the turn."""
        return array if self.turn is None else self.turn.applied_to(array, self._axes)

    def removed(self) -> jax.Array:
        """Returns the base that was merged into `base`: undoes gains, turn and terms."""
        wide = _contract.wide_dtype(self.base.dtype)
        total = self.base.astype(wide)
        highest: dict[str, Any] = {"precision": jax.lax.Precision.HIGHEST}
        for gain in self.gains:
            total = total / gain.array(wide, **highest)
        if self.turn is not None:
            total = self.turn.inverse().applied_to(total, self._axes, **highest)
        for term in self.terms:
            total = total - term.array(wide, **highest)
        return total.astype(self.base.dtype)


def times_gain(array: jax.Array, gain: jax.Array, *, joins: bool = False) -> jax.Array:
    """Returns an array times a gain, in the dtype of the array; complex if the gain is.

    The gain is float32 or wider. A narrower array is saved for the backward pass as it is, not
    widened. On a mesh with explicit axes, the gain is sharded like the array.

    Args:
        array: any array.
        gain: has the same number of axes; those of size one are broadcast.
        joins: whether adjacent axes may be joined for the product, on a single CPU. The gradient of
            the gain is a sum over all axes that the gain is constant along, which XLA on CPU fuses
            only over a single axis. If the array has other uses, JAX would keep both forms of it.
    """
    if joins and _contract.is_for_one_cpu([array]):
        return times_gain(*_joined(array, gain)).reshape(array.shape)
    # [*axes] ⊙ [*axes], where the gain has size 1 along each axis that it is constant along
    gain = sharded_like(gain, array)

    # A complex weight may meet a real operand.
    keeps_phase = jnp.iscomplexobj(gain) and not jnp.iscomplexobj(array)
    dtype = gain.dtype if keeps_phase else array.dtype

    def times(array: jax.Array, gain: jax.Array) -> jax.Array:
        return (array.astype(gain.dtype) * gain).astype(dtype)

    with jax.named_scope("lora"):
        # Without the checkpoint, JAX would keep the widened copy of a narrow array.
        wide = array.dtype == gain.dtype
        return times(array, gain) if wide else jax.checkpoint(times)(array, gain)


def _joined(array: jax.Array, gain: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Joins adjacent axes that the gain is constant along, and those that it varies along."""
    # array [batch, seq, out], gain [1, 1, out]  ->  [batch · seq, out], [1, out]
    axes = itertools.groupby(range(array.ndim), lambda d: gain.shape[d] == 1)
    runs = [list(run) for _, run in axes]
    array, gain = (
        x.reshape([math.prod(x.shape[d] for d in run) for run in runs]) for x in (array, gain)
    )
    return array, gain


def is_weight(value: Any) -> TypeGuard[FactoredArray]:
    """Whether a value is a weight and not a plain array.

    Args:
        value: an operand of a rule.

    Returns:
        Whether it is a `FactoredArray`.

    Example:
        >>> import jax.numpy as jnp
        >>> from lorax.rules import FactoredArray, is_weight
        >>> is_weight(jnp.ones(3)), is_weight(FactoredArray(jnp.ones(3), ()))
        (False, True)
    """
    return isinstance(value, FactoredArray)


def base_of(value: Any) -> Any:
    """Returns the base of a weight; a plain array is its own base."""
    return value.base if is_weight(value) else value


def terms_of(value: Any) -> tuple[Term, ...]:
    """Returns the terms of a weight; a plain array has none."""
    return value.terms if is_weight(value) else ()
