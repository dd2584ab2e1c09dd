"""A weight while the transformed function runs: a base, terms that are added, gains that multiply.

    W  =  Π gains  ⊙  turn · (base + Σ terms)

A gain is a term that owns few of the weight's labels. One gain may wait for its divisor, the norm
of the sum: it is computed when the weight is used, and not for what a slice leaves behind. A turn
is a block-diagonal matrix along one axis.

All these pieces are terms of one shape, so whatever moves a term moves each of them.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from typing import Any, TypeGuard

import jax

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
    """Dropout on what meets the terms: PRNG keys of the weight, one for each shared entry.

    Attributes:
        term: one factor of key data, `[*shared, words]`, along the axes of the weight.
        rate: which share of the entries is dropped.
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
        terms: what is added to it.
        gains: what multiplies the sum.
        norm: one more gain, whose divisor is still to be computed.
        keys: the PRNG keys of dropout on the input of the terms, as a term of integers.
        turn: a block-diagonal matrix that multiplies the sum along one axis.
        meter: where the inputs of the weight are summed up; it changes nothing.
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
        """Whether it is a base and terms alone."""
        rest = (self.norm, self.keys, self.turn, self.meter)
        return not self.gains and all(piece is None for piece in rest)

    @property
    def is_flat(self) -> bool:
        """Whether nothing is gained by keeping the pieces apart.

        That is where one factor of each term spans all that is left of the weight, and the gains
        vary along all of it.
        """
        of_gains = (*self.gains, *([self.norm.term] if self.norm else ()))
        flat = all(term.is_flat for term in self.terms) and self.meter is None
        turned = self.turn is None or self.turn.is_owned
        return flat and turned and all(gain.is_owned for gain in of_gains)

    @property
    def pieces(self) -> tuple[Term, ...]:
        """Everything but the base: terms, gains, and what else there is one of."""
        rest = (self.norm, self.keys, self.turn, self.meter)
        pending = [piece.term for piece in rest if piece is not None]
        return (*self.terms, *self.gains, *pending)

    def steps_through(self, axis: int) -> bool:
        """Whether entries of an axis belong together: a step of a `scan` has one of them."""
        turned = self.turn is not None and self.turn.axis == axis
        return turned or (self.meter is not None and axis in self.meter.axes)

    @property
    def is_bare(self) -> bool:
        """Whether it is a base that is held as codes, and nothing else."""
        return is_coded(self.base) and not self.pieces

    @property
    def sources(self) -> list[tuple[Hashable, ...]]:
        """The names of each piece, after those of a base that is held as codes."""
        of_base = [self.base.sources] if is_coded(self.base) else []
        return of_base + [piece.sources for piece in self.pieces]

    def with_sources(self, names: Iterator[tuple[Hashable, ...]]) -> "FactoredArray":
        """The same weight, its pieces called otherwise."""
        base = self.base
        if is_coded(base):
            base = dataclasses.replace(base, sources=next(names))
        return self.with_pieces(
            base, [dataclasses.replace(piece, sources=next(names)) for piece in self.pieces]
        )

    def unnamed(self) -> "FactoredArray":
        """The same weight without what it is called: equal layers then are alike."""
        return self.with_sources(itertools.repeat(()))

    def with_pieces(self, base: Any, pieces: Iterable[Term]) -> "FactoredArray":
        """The weight of another base and of as many other pieces."""
        rest = iter(pieces)
        terms = tuple(next(rest) for _ in self.terms)
        gains = tuple(next(rest) for _ in self.gains)
        norm = self.norm and dataclasses.replace(self.norm, term=next(rest))
        keys = self.keys and dataclasses.replace(self.keys, term=next(rest))
        turn = self.turn and self.turn.moved_to(next(rest))
        meter = self.meter and self.meter.moved_to(next(rest))
        return FactoredArray(base, terms, gains, norm, keys, turn, meter)

    def moved(self, change: Callable[[Term], Term]) -> "FactoredArray":
        """Every piece as `change` moves or cuts it, beside the base as it is.

        A norm that would lose some of its entries is computed before.
        """
        weight = self
        if weight.norm is not None:
            norm = dataclasses.replace(weight.norm, term=change(weight.norm.term))
            if not norm.is_whole():
                weight = weight.resolved()
        return weight.with_pieces(weight.base, map(change, weight.pieces))

    def resolved(self) -> "FactoredArray":
        """The same weight, whose norm is computed."""
        if self.norm is None:
            return self
        gain = self.norm.gain(self.base, self.terms)
        return dataclasses.replace(self, gains=(*self.gains, gain), norm=None)

    def replace_terms(self, terms: Iterable[Term]) -> "FactoredArray":
        """The same weight with other terms."""
        return dataclasses.replace(self, terms=tuple(terms))

    def replace_base(self, base: jax.Array | CodedArray) -> "FactoredArray":
        """The same weight with another base."""
        return dataclasses.replace(self, base=base)

    def array(self) -> jax.Array:
        """The materialized weight: computed in float32 or wider, then cast to the base's dtype."""
        wide = _contract.wide_dtype(self.base.dtype)
        total = self.base.astype(wide)
        # A merged weight is computed once and used often: spend the precision.
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
        """The operand that meets the weight, read by its meter if it has one; see `Meter.read`."""
        return operand if self.meter is None else self.meter.read(operand, places, **keywords)

    def turned(self, array: jax.Array) -> jax.Array:
        """An array of the weight's axes times the turn."""
        return array if self.turn is None else self.turn.applied_to(array, self._axes)

    def removed(self) -> jax.Array:
        """The base of which `base` is the merged weight: gains, turn and terms are undone."""
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
    """An array times a gain, in the dtype of the array.

    The gain is float32 or wider. For the backward pass a narrower array is kept as it is. On a mesh
    with explicit axes the gain goes where the array is.

    Args:
        array: any array.
        gain: of as many axes; those of size one are broadcast.
        joins: whether neighboring axes may be one axis in the product, on one CPU. The gain's
            gradient is a sum over all that the gain is constant along, and XLA on CPU fuses such a
            sum only over one axis. Of an array that others share, JAX would keep both forms.
    """
    if joins and _contract.is_for_one_cpu([array]):
        return times_gain(*_joined(array, gain)).reshape(array.shape)
    # [*axes] ⊙ [*axes, 1 where it is constant]
    gain = sharded_like(gain, array)

    def times(array: jax.Array, gain: jax.Array) -> jax.Array:
        return (array.astype(gain.dtype) * gain).astype(array.dtype)

    with jax.named_scope("lora"):
        wide = array.dtype == gain.dtype
        return times(array, gain) if wide else jax.checkpoint(times)(array, gain)


def _joined(array: jax.Array, gain: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Both with one axis for neighbors that the gain is constant along, and for other ones."""
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
    """The base of a weight; a plain array is its own."""
    return value.base if is_weight(value) else value


def terms_of(value: Any) -> tuple[Term, ...]:
    """The terms of a weight; a plain array has none."""
    return value.terms if is_weight(value) else ()
