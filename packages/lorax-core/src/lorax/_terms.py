"""A weight as a base plus terms, and a term as an einsum of small factors with labeled axes.

    W[d0, …, dn]  =  base[d0, …, dn]  +  Σ_k einsum(factor_1, factor_2, …  ->  d0 … dn)

This file is the algebra alone; it contains no code for primitives. Every axis of a term shows zero
or more labels, most significant first, so that a reshape only regroups labels:

* one label: an ordinary axis, owned by every factor that carries the label;
* several labels: axes of different factors that a reshape has merged;
* a label that no factor owns: the term is constant along that axis (it was broadcast).

A label that some factor owns and no axis shows is summed over. The rank is such a label.

An operation whose result is not a term raises `Inexpressible`, and the interpreter materializes the
weight.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from . import _compat, _contract, _order


class Inexpressible(Exception):
    """The result is not a term: the factors would have to be multiplied first.

    Its text, where it has one, completes the sentence "`primitive` …" in the user's warning.
    """


class Label(NamedTuple):
    """An axis that factors share.

    `is_index` marks a label that runs over the entries of an index array, such as the tokens of an
    embedding lookup, instead of along the weight.
    """

    id: int
    size: int
    is_index: bool = False


Labels = tuple[Label, ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Term:
    """`einsum(*factors)` with `labels[k]` on the axes of factor k and `out[d]` on weight axis d."""

    factors: tuple[jax.Array, ...]
    # LoRA has ((i, r), (r, o)) on a [in, rank] and b [rank, out]. No axis shows r, so it is
    # summed over.
    labels: tuple[Labels, ...] = dataclasses.field(metadata={"static": True})
    # LoRA has ((i,), (o,)) for a weight [in, out], and ((i, o),) once a reshape made it [in · out].
    out: tuple[Labels, ...] = dataclasses.field(metadata={"static": True})
    # The parameters that the term comes from, for messages: the algebra does not read them.
    sources: tuple[Hashable, ...] = dataclasses.field(metadata={"static": True}, default=())

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight that this term is added to."""
        return tuple(math.prod(label.size for label in axis) for axis in self.out)

    @property
    def shown(self) -> Labels:
        """The labels of all axes in order."""
        return tuple(itertools.chain(*self.out))

    def owners(self, label: Label) -> list[int]:
        """Returns the positions of the factors that vary along `label`."""
        return [k for k, labels in enumerate(self.labels) if label in labels]

    @property
    def is_flat(self) -> bool:
        """Whether one factor spans all that is left of the weight's own axes.

        Keeping the factors separate then saves nothing, unless the term is dense.
        """
        owned = self._owned
        # A looked-up row, for example, has a [rank] and b [rank, out]: b alone spans [out].
        spans = any(owned <= set(labels) for labels in self.labels)
        return spans and not self.is_dense and not self._repeats

    @property
    def _repeats(self) -> bool:
        """Whether an axis consists of equal blocks, as with MiSS: one block is smaller."""
        return any(
            {bool(self.owners(label)) for label in axis if label.size != 1} == {True, False}
            for axis in self.out
        )

    @property
    def is_owned(self) -> bool:
        """Whether a factor varies along each of the weight's axes, or entries were looked up.

        A weight with a gain that is not owned cannot become an array yet.
        """
        if any(label.is_index for label in self.shown):
            return True
        return all(self.owners(label) for label in self.shown if label.size != 1)

    @property
    def is_dense(self) -> bool:
        """Whether one factor spans all axes while the others are still separate: `base ⊙ (a @ b)`.

        Such a term waits for a sum over its axes, as in a norm. A product with it would cost as
        much as a product with the whole weight.
        """
        return self.dense_factor is not None

    @property
    def dense_factor(self) -> int | None:
        """The position of the factor that spans all axes of a dense term; None for other terms."""
        owned = self._owned
        # base [i, o] · a [i, r] · b [r, o]: the base spans all, a and b only together.
        spans = [owned <= set(labels) for labels in self.labels]
        rest = [
            owned.intersection(labels)
            for labels, all_of_it in zip(self.labels, spans, strict=True)
            if not all_of_it
        ]
        is_apart = frozenset[Label]().union(*rest) not in (frozenset[Label](), *rest)
        return spans.index(True) if is_apart and True in spans else None

    @property
    def _owned(self) -> frozenset[Label]:
        """The weight's own axes that some factor varies along."""
        shown = (label for label in self.shown if self.owners(label) and not label.is_index)
        return frozenset(shown)

    def fresh(self, size: int, skip: int = 0) -> Label:
        """Returns a label that this term does not use; `skip` gives further ones."""
        used = itertools.chain(self.shown, *self.labels)
        return Label(max((label.id for label in used), default=-1) + 1 + skip, size)

    def array(
        self, dtype, *, precision=None, preferred_element_type=None, meets=None, like=None
    ) -> jax.Array:
        """Returns the term in the weight's shape; the keywords are those of `contract`."""
        owned = tuple(label for label in self.shown if self.owners(label))
        # [*owned]: labels without an owner are left to the broadcast.
        full = _contract.contract(
            tuple(zip(self.factors, self.labels, strict=True)),
            owned,
            dtype=dtype,
            precision=precision,
            preferred_element_type=preferred_element_type,
            meets=meets,
            # The sharding of `like` fits only if the contraction has the axes of the result.
            like=like if owned == self.shown and len(owned) == len(self.out) else None,
        )
        if owned != self.shown:
            # [*owned] -> [*shown]: the entries repeat along a label that no factor owns.
            sizes = tuple(label.size for label in self.shown)
            positions = tuple(i for i, label in enumerate(self.shown) if label in owned)
            full = jax.lax.broadcast_in_dim(full, sizes, positions)
        # [*shown] -> the weight's shape: all labels of an axis are one axis.
        return full.reshape(self.shape) if full.shape != self.shape else full

    def added_to(
        self, base: jax.Array, dtype, *, precision=None, preferred_element_type=None, meets=None
    ) -> jax.Array:
        """Returns `base + term`, in the dtype and sharding of `base`; keywords are those of
        `contract`.
        """
        # Source names would give equal layers different cache keys.
        term = dataclasses.replace(self, sources=())
        return _base_plus(term, base, dtype, precision, preferred_element_type, meets)

    # Changes to the axes of the weight, which leave the factors unchanged.

    def permute(self, permutation: Sequence[int]) -> "Term":
        """The term of the transposed weight."""
        return dataclasses.replace(self, out=tuple(self.out[axis] for axis in permutation))

    def drop(self, axes: Iterable[int]) -> "Term":
        """The term of the weight summed over `axes`."""
        dropped = set(axes)
        kept = tuple(axis for d, axis in enumerate(self.out) if d not in dropped)
        gone = itertools.chain(*(self.out[d] for d in dropped))
        # A label that a factor owns is summed by the einsum, now that no axis shows it. Along any
        # other label the entries are equal, so their sum is one of them times their number.
        repeats = math.prod(label.size for label in gone if not self.owners(label))
        term = dataclasses.replace(self, out=kept)
        return term.scale(repeats) if repeats != 1 else term

    def broadcast(self, shape: Sequence[int], positions: Sequence[int]) -> "Term":
        """The term of the weight broadcast to `shape`, its axis d at `positions[d]`."""
        sources = dict(zip(positions, range(len(self.out)), strict=True))
        out, skip = [], 0
        for d, size in enumerate(shape):
            axis = self.out[sources[d]] if d in sources else ()
            if math.prod(label.size for label in axis) != size:
                # A new or stretched axis: the term is constant along it, so no factor owns its
                # label.
                axis, skip = (self.fresh(size, skip=skip),), skip + 1
            out.append(axis)
        return dataclasses.replace(self, out=tuple(out))

    def reshape(self, shape: Sequence[int]) -> "Term":
        """The term of the reshaped weight: labels are split, joined or regrouped; none moves."""
        term, out = self, []
        rest = [label for label in self.shown if label.size != 1]
        # A label of size one fits any axis of size one. Taken in order, the input label of a kernel
        # with one input stays on its input axis.
        ones = [label for label in self.shown if label.size == 1]
        # [6, 4] -> [24]: out ((i,), (o,)) becomes ((i, o),), and the factors stay as they are.
        for size in shape:
            axis = [ones.pop(0)] if size == 1 and ones else []
            while size != 1:
                label = rest.pop(0)
                # `%` works for symbolic sizes; `<` may raise for them.
                if size % label.size != 0:
                    if label.size % size != 0:
                        # [6, 4] -> [8, 3]: neither of 6 and 8 divides the other. One label of 24
                        # can be cut.
                        term, label = term.join((label, rest.pop(0)))
                        rest.insert(0, label)
                        continue
                    # [24] -> [8, 3]: the high part fills this axis, the low part is left for the
                    # next.
                    term, (label, low) = term.split(label, size)
                    rest.insert(0, low)
                axis.append(label)
                size //= label.size
            out.append(tuple(axis))
        return dataclasses.replace(term, out=tuple(out))

    # Changes to labels, which every factor that owns one follows.

    def rename(self, names: Mapping[Label, Sequence[Label]]) -> "Term":
        """Replaces each label by one label per axis that the factors now have in its place."""

        def follow(labels: Labels) -> Labels:
            return tuple(itertools.chain(*(names.get(label, (label,)) for label in labels)))

        return dataclasses.replace(
            self, labels=tuple(map(follow, self.labels)), out=tuple(map(follow, self.out))
        )

    def along(
        self, label: Label, change: Callable[[jax.Array, int], jax.Array], size: int
    ) -> "tuple[Term, Label]":
        """Applies `change(factor, axis)` to every owner of `label`; returns the term and the new
        label.
        """
        new = self.fresh(size)
        factors = tuple(
            change(factor, labels.index(label)) if label in labels else factor
            for factor, labels in zip(self.factors, self.labels, strict=True)
        )
        return dataclasses.replace(self, factors=factors).rename({label: (new,)}), new

    def split(self, label: Label, size: int) -> "tuple[Term, tuple[Label, Label]]":
        """Splits `label` into an outer label of `size` and an inner label of the rest."""
        low_size = label.size // size
        high, low = self.fresh(size), self.fresh(low_size, skip=1)

        def change(factor: jax.Array, axis: int) -> jax.Array:
            # […, size · low, …] -> […, size, low, …], row-major as every reshape of JAX
            return factor.reshape(*factor.shape[:axis], size, low_size, *factor.shape[axis + 1 :])

        term, new = self.along(label, change, label.size)
        return term.rename({new: (high, low)}), (high, low)

    def fuse(self, axis: int) -> "tuple[Term, Label]":
        """Gives an axis exactly one label, which requires that its labels have the same owners.

        Raises:
            Inexpressible: if different factors own them.
        """
        labels = self.out[axis]
        if len(labels) > 1:  # Summing over a label of size one equals showing it, so it is dropped.
            labels = tuple(label for label in labels if label.size != 1) or labels[:1]
        elif not labels:
            labels = (self.fresh(1),)
        out = tuple(labels if d == axis else others for d, others in enumerate(self.out))
        term = dataclasses.replace(self, out=out)
        return (term, labels[0]) if len(labels) == 1 else term.join(labels)

    def join(self, labels: Labels) -> "tuple[Term, Label]":
        """Joins adjacent labels, most significant first, that have the same owners."""
        # Only labels that are in the same factors can be one axis in each of them.
        owners = {tuple(self.owners(label)) for label in labels}
        if len(owners) > 1:
            raise Inexpressible
        new = self.fresh(math.prod(label.size for label in labels))
        factors, factor_labels = list(self.factors), list(self.labels)
        for k in set(itertools.chain(*owners)):
            rest = tuple(label for label in self.labels[k] if label not in labels)
            order = [self.labels[k].index(label) for label in (*labels, *rest)]
            # […] -> [*labels, *rest] -> [new, *rest]
            moved = jnp.transpose(self.factors[k], order)
            factors[k] = moved.reshape(new.size, *moved.shape[len(labels) :])
            factor_labels[k] = (new, *rest)
        # In `out`, the new label takes the place of the first one, and the others disappear.
        names: dict[Label, Labels] = dict.fromkeys(labels, ()) | {labels[0]: (new,)}
        out = tuple(
            tuple(itertools.chain(*(names.get(label, (label,)) for label in axis)))
            for axis in self.out
        )
        return dataclasses.replace(
            self, factors=tuple(factors), labels=tuple(factor_labels), out=out
        ), new

    def fuse_all(self, axes: Iterable[int], own: bool = True) -> "tuple[Term, list[Label]]":
        """Gives each of `axes` exactly one label; with `own`, one that some factor owns."""
        term, axes = self, list(axes)
        for axis in axes:
            term, label = term.fuse(axis)
            term = term.own(label) if own else term
        return term, [term.out[axis][0] for axis in axes]

    def leading(self, axis: int, numbers: Iterable[int]) -> "tuple[Term, Label, int]":
        """Returns the leading label of `axis` and how many entries one step of it spans.

        An axis whose labels have different owners can still be cut or padded between two steps of
        its first label, if all `numbers` are multiples of such a step. Otherwise `Inexpressible` is
        raised.
        """
        try:
            return *self.fuse(axis), 1
        except Inexpressible:
            label, *rest = self.out[axis]
            unit = math.prod(label.size for label in rest)
            if any(n % unit != 0 for n in numbers):
                raise
            # The axis consists of `label.size` steps, each of `unit` entries.
            return self, label, unit

    # Factors.

    def own(self, label: Label) -> "Term":
        """Adds a factor of ones that owns `label`, if no factor does."""
        if self.owners(label):
            return self
        # Multiplying by ones changes nothing, and the label can now be contracted like any other.
        return self.times(jnp.ones(label.size, self.factors[0].dtype), (label,))

    def times(self, factor: jax.Array, labels: Labels) -> "Term":
        """Returns the term with one more factor."""
        return dataclasses.replace(
            self, factors=(*self.factors, factor), labels=(*self.labels, labels)
        )

    def split_factors(
        self, inputs: Sequence[Label], outputs: Sequence[Label]
    ) -> "tuple[list[_contract.Operand], list[_contract.Operand], Labels]":
        """Returns the factors that own an input, the others, and the inner labels that join both.

        Raises:
            Inexpressible: if a factor of the inputs shows an output as well.
        """
        first, second = [], []
        for factor in zip(self.factors, self.labels, strict=True):
            (second if set(inputs).isdisjoint(factor[1]) else first).append(factor)
        first_labels = dict.fromkeys(itertools.chain(*(labels for _, labels in first)))
        second_labels = set(itertools.chain(*(labels for _, labels in second)))
        # a [in, *inner] and b [*inner, out]: a factor that owns an input must not show an output.
        if not first_labels.keys().isdisjoint(outputs) or not second_labels.issuperset(outputs):
            raise Inexpressible
        inner_labels = tuple(label for label in first_labels if label in second_labels)
        return first, second, inner_labels

    def multiplied(self, positions: Sequence[int], labels: Labels) -> "Term":
        """Multiplies several factors into one, with `labels` on its axes, which becomes the last
        factor.
        """
        several = [(self.factors[k], self.labels[k]) for k in positions]
        # The product becomes a factor, so it is as wide as its widest part.
        dtype = functools.reduce(_contract.product_dtype, (factor.dtype for factor, _ in several))
        rest = [k for k in range(len(self.factors)) if k not in positions]
        term = dataclasses.replace(
            self,
            factors=tuple(self.factors[k] for k in rest),
            labels=tuple(self.labels[k] for k in rest),
        )
        return term.times(_contract.contract(several, labels, dtype=dtype), labels)

    def one_owner(self, label: Label) -> "Term":
        """Multiplies the owners of `label` into one factor, if that is as small as one of them."""
        owners = self.owners(label)
        # [i, r] ⊙ [i] -> [i, r] is as small as the widest owner; [i, r] ⊙ [i, s] -> [i, r, s] is
        # not.
        together = set(itertools.chain(*(self.labels[k] for k in owners)))
        widest = next((self.labels[k] for k in owners if together <= set(self.labels[k])), None)
        if widest is None:
            raise Inexpressible
        return self.multiplied(owners, widest)

    def complex_in(self, k: int) -> "Term":
        """Returns the same term with real factors, except that factor k may be complex.

        Another complex factor is split into its parts, f = Σ_c i^c f[c], and factor k takes the
        i^c.
        """
        factors, labels = list(self.factors), list(self.labels)
        others = [j for j, f in enumerate(factors) if j != k and jnp.iscomplexobj(f)]
        for skip, j in enumerate(others):
            part = self.fresh(2, skip=skip)
            # f [*f] -> [part, *f]
            factors[j] = jnp.stack([factors[j].real, factors[j].imag])
            dtype = _contract.product_dtype(factors[k].dtype, jnp.complex64)
            # k [*k] -> [part, *k] with 1 and i: the sum over `part` is f · k.
            factors[k] = jnp.stack([factors[k].astype(dtype), factors[k].astype(dtype) * 1j])
            labels[j], labels[k] = (part, *labels[j]), (part, *labels[k])
        return dataclasses.replace(self, factors=tuple(factors), labels=tuple(labels))

    def scale(self, scalar) -> "Term":
        """Returns the term times a scalar, which multiplies its smallest factor."""
        sizes = [math.prod(map(_order.nominal, factor.shape)) for factor in self.factors]
        k = sizes.index(min(sizes))
        factor = self.factors[k]
        if isinstance(scalar, jax.Array):
            # A Python number takes the factor's dtype. An array has a dtype of its own, which
            # strict promotion would refuse to mix with the factor's.
            dtype = _contract.product_dtype(factor.dtype, scalar.dtype)
            factor, scalar = factor.astype(dtype), scalar.astype(dtype)
        factors = (*self.factors[:k], factor * scalar, *self.factors[k + 1 :])
        return dataclasses.replace(self, factors=factors)


def _base_plus(
    term: Term, base: jax.Array, dtype, precision, preferred_element_type, meets
) -> jax.Array:
    delta = term.array(
        dtype,
        precision=precision,
        preferred_element_type=preferred_element_type,
        meets=meets,
        like=base,
    )
    # [*shape] + [*shape]
    return base + delta.astype(base.dtype)


# Jitted, so that equal layers share one trace and one derivative.
_base_plus = _compat.jit_inlined(_base_plus, static_argnums=(2, 3, 4, 5))
