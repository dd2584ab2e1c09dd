"""A base that is held as codes, while the transformed function runs.

    W[i, o]  =  decode(codes[i, o], scales[block of i, o], …)

Codes and scales are arrays with labels, as the factors of a term are, so what moves a term moves
them. But nothing is done to them where the function says so: equations that leave a weight a weight
are recorded, and played in the equation that reads it. There, and only there, the weight is an
array. Under `jax.checkpoint` that equation keeps its operands for the backward pass, the codes as
they were given, and nothing that was made of them; behind a barrier no compiler decodes a weight
before its turn.
"""

import dataclasses
import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, NamedTuple, TypeGuard

import jax
import jax.extend.core as jex
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from . import _compat
from ._terms import Inexpressible, Label, Term

# What primitives that move or cut axes make of labelled arrays: `change(term, *others, **params)`,
# a term, or a list of them where the primitive has several results.
MOVES: dict[jex.Primitive, Callable[..., Any]] = {}

# The results of these are weights as their operand is, and as large as it at most. They are played
# on the decoded array; those whose other operands are scalars commute with moves.
_ENTRYWISE = frozenset(
    "abs add and atan2 cbrt ceil clamp convert_element_type copy cos div eq erf exp exp2 expm1 "
    "floor ge gt integer_pow is_finite le log log1p logistic lt max min mul name ne neg not or pow "
    "reduce_precision rem round rsqrt select_n sign sin sqrt square stop_gradient sub tan tanh "
    "xor".split()
)
_JOINING = frozenset(
    ["concatenate", "dynamic_update_slice", "pad", "scatter", "scatter-add", "stack"]
)

# Equations that wait on one weight; what comes after them is played on an array.
MOST_MOVES = 32


class Move(NamedTuple):
    """An equation that waits: which operand the weight is, and which of its results is meant."""

    primitive: jex.Primitive
    params: tuple[tuple[str, Hashable], ...]
    position: int
    result: int
    commutes: bool


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Spread:
    """An array that is broadcast where it is read."""

    source: Any
    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    axes: tuple[int, ...] = dataclasses.field(metadata={"static": True})

    def array(self) -> jax.Array:
        """The decoded array."""
        return jax.lax.broadcast_in_dim(self.source, self.shape, self.axes)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CodedArray:
    """A base as its arrays and the equations that wait to be played on it.

    Attributes:
        term: the arrays, with the labels of their axes; it is not an einsum, only a bundle.
        others: the other operands of each move.
        names: what each array of `term` is called.
        format: how they are decoded.
        stored: the dtype of the decoded array, before any move.
        moves: the equations that wait, in order.
        shape: of the weight after the moves.
        dtype: of the weight after the moves.
        sources: what the weight is called in messages.
    """

    term: Term
    others: tuple[tuple[Any, ...], ...] = ()
    names: tuple[str, ...] = dataclasses.field(metadata={"static": True}, default=())
    format: Any = dataclasses.field(metadata={"static": True}, default=None)
    stored: Any = dataclasses.field(metadata={"static": True}, default=None)
    moves: tuple[Move, ...] = dataclasses.field(metadata={"static": True}, default=())
    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True}, default=())
    dtype: Any = dataclasses.field(metadata={"static": True}, default=None)
    sources: tuple[Hashable, ...] = dataclasses.field(metadata={"static": True}, default=())

    @property
    def ndim(self) -> int:
        """The number of axes of the weight."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """The number of entries of the weight."""
        return math.prod(self.shape)

    @property
    def struct(self) -> jax.ShapeDtypeStruct:
        """The shape that replaces the weight while a function is traced."""
        sharding = _sharding_of(self.term.factors[0])
        if sharding is None or AxisType.Explicit not in sharding.mesh.axis_types:
            return jax.ShapeDtypeStruct(self.shape, self.dtype)
        spec = weight_spec(sharding.spec, self.term.out, self.term.labels[0])
        return jax.ShapeDtypeStruct(
            self.shape, self.dtype, sharding=NamedSharding(sharding.mesh, spec)
        )

    def array(self) -> jax.Array:
        """The weight as an array of floats, with every pending move applied to it."""
        term, waiting, array = self.term, [], None
        for move, others in zip(self.moves, self.others, strict=True):
            others = tuple(map(array_of, others))
            # An entry by entry function of one operand: it can wait until the codes are decoded.
            if array is None and move.commutes:
                waiting.append((move, others))
                continue
            if array is None:
                try:
                    # A move of axes: codes and scales are moved, which are smaller than the floats.
                    term = _moved(term, move, others)
                    continue
                except Inexpressible:
                    array = self._decoded(term, waiting)
            # From here on the floats themselves go through the equation.
            array = _bound(move, array, others)
        return self._decoded(term, waiting) if array is None else array

    def _decoded(self, term: Term, waiting: Iterable[tuple[Move, tuple[Any, ...]]]) -> jax.Array:
        array = decode(term, self.names, self.format, self.stored)
        for move, others in waiting:
            if others:  # numbers from outside of a `shard_map`
                axes = _compat.varying_axes(array)
                others = tuple(_compat.varied(number, axes) for number in others)
            array = _bound(move, array, others)
        return array

    def astype(self, dtype: Any) -> jax.Array:
        """The decoded array in another dtype."""
        return self.array().astype(dtype)

    def reshape(self, *shape: Any) -> jax.Array:
        """The decoded array in another shape."""
        return self.array().reshape(*shape)

    def unnamed(self) -> "CodedArray":
        """The same without what it is called: equal layers then are alike."""
        return dataclasses.replace(self, sources=()) if self.sources else self

    def deferred(self, eqn: jex.JaxprEqn, position: int, operands: Sequence[Any]) -> list[Any]:
        """The results of an equation, each a base on which the equation waits."""
        others = tuple(x for k, x in enumerate(operands) if k != position)
        # f(slice(W)) = slice(f(W)) for a function of the entries alone, as a cast or a scalar
        # multiple.
        scalar = all(getattr(x, "shape", ()) == () for x in others)
        commutes = eqn.primitive.name in _ENTRYWISE and scalar
        params = tuple(eqn.params.items())
        avals: list[Any] = [v.aval for v in eqn.outvars]
        return [
            dataclasses.replace(
                self,
                moves=(*self.moves, Move(eqn.primitive, params, position, k, commutes)),
                others=(*self.others, others),
                shape=tuple(aval.shape),
                dtype=aval.dtype,
            )
            for k, aval in enumerate(avals)
        ]

    def entry(self, index: Any) -> "CodedArray":
        """Entry `index` of a stack, which is picked where the weight is read."""
        # [layers, *axes] -> [1, *axes] -> [*axes]
        sizes = (1, *self.shape[1:])
        pick = Move(_primitive("dynamic_slice"), (("slice_sizes", sizes),), 0, 0, False)
        drop = Move(_primitive("squeeze"), (("dimensions", (0,)),), 0, 0, False)
        starts = (index, *[jnp.zeros((), index.dtype)] * (self.ndim - 1))
        return dataclasses.replace(
            self,
            moves=(*self.moves, pick, drop),
            others=(*self.others, starts, ()),
            shape=self.shape[1:],
        )

    @property
    def first(self) -> Any:
        """The codes, whose type says on which devices the weight is."""
        return self.term.factors[0]

    def changed(self, change: Callable[[Term], Term]) -> "CodedArray":
        """The base whose arrays `change` has moved at once, after all that waits on them.

        What waits and moves no axis waits on.
        """
        term, moves, kept = self.term, [], []
        for move, others in zip(self.moves, self.others, strict=True):
            # f(entries) waits, and a slice or a transpose goes past it to the codes.
            if move.commutes:
                moves.append(move)
                kept.append(others)
            else:
                term = _moved(term, move, others)
        term = change(term)
        return dataclasses.replace(
            self, term=term, moves=tuple(moves), others=tuple(kept), shape=term.shape
        )


def _primitive(name: str) -> jex.Primitive:
    primitive = _compat.find_primitive(name)
    assert primitive is not None, name
    return primitive


def _sharding_of(array: Any) -> Any:
    """The sharding in the type of an array; none of a shape that has no sharding."""
    return array.sharding if isinstance(array, jax.ShapeDtypeStruct) else jax.typeof(array).sharding


def is_coded(value: Any) -> TypeGuard[CodedArray]:
    """Whether a base is held as codes."""
    return isinstance(value, CodedArray)


def array_of(value: Any) -> Any:
    """A plain array for a base, or for a whole weight; an array as it is."""
    if isinstance(value, jax.Array):
        return value
    return value.array() if hasattr(value, "array") else value


def decode(term: Term, names: Sequence[str], format: Any, dtype: Any) -> jax.Array:
    """The array of a bundle of codes and scales.

    Every array gets an axis of one entry for each label that it lacks, in the order in which the
    codes are stored; one function of their entries follows, and only then are axes exchanged: what
    reads the array can do that for nothing. Scales are frozen as the codes are: a barrier gives all
    that passes it a derivative, which would cost a product as large as the weight.
    """
    shown = [label for axis in term.out for label in axis]
    # Decoded in the order in which the codes are stored, and transposed once at the end: codes are
    # read in place.
    first = [label for label in term.labels[0] if label in shown]
    order = [*first, *(label for label in shown if label not in first)]
    arrays = [
        _spread(jax.lax.stop_gradient(factor), labels, order)
        for factor, labels in zip(term.factors, term.labels, strict=True)
    ]
    with jax.named_scope("dequantize"):
        # All arrays have the axes of `order` now, some of size one: they broadcast.
        value = format.decode(dict(zip(names, arrays, strict=False)))
        for gain in arrays[len(names) :]:  # of rows that an index out of range has asked for
            value = value * gain.astype(value.dtype)
        sizes = tuple(label.size for label in order)
        if value.shape != sizes:
            value = jnp.broadcast_to(value, sizes)
        value = value.astype(dtype)
        if order != shown:
            value = jnp.transpose(value, [order.index(label) for label in shown])
        return _joined(value, term)


def _joined(array: jax.Array, term: Term) -> jax.Array:
    """An array of labels as one of axes; one axis after the other, as explicit meshes want it."""
    for d, labels in enumerate(term.out):
        if len(labels) != 1:
            count = len(labels)
            # […, in / 64, 64, …] -> […, in, …]
            size = math.prod(label.size for label in labels)
            array = array.reshape(*array.shape[:d], size, *array.shape[d + count :])
    return array


def _spread(array: jax.Array, labels: Sequence[Label], order: Sequence[Label]) -> jax.Array:
    """An array with an axis for each label of `order`; what a squeeze dropped has one entry."""
    gone = [k for k, label in enumerate(labels) if label not in order]
    if gone:
        array = jnp.squeeze(array, gone)
        labels = [label for label in labels if label in order]
    positions = sorted(range(len(labels)), key=lambda k: order.index(labels[k]))
    if positions != list(range(len(labels))):
        array = jnp.transpose(array, positions)
    # scales [in / 64, out] -> [in / 64, 1, out], beside codes [in / 64, 64, out]
    missing = [d for d, label in enumerate(order) if label not in labels]
    return jnp.expand_dims(array, missing) if missing else array


def _moved(term: Term, move: Move, others: tuple[Any, ...]) -> Term:
    change = MOVES.get(move.primitive)
    if change is None or move.position != 0:
        raise Inexpressible
    term = change(term, *others, **dict(move.params))
    return term[move.result] if isinstance(term, list) else term


def _bound(move: Move, array: jax.Array, others: Sequence[Any]) -> jax.Array:
    operands = [*others[: move.position], array, *others[move.position :]]
    # The weight is put back among the operands, in its own position.
    return _compat.bind_params(move.primitive, dict(move.params), *operands)[move.result]


def is_deferred(eqn: jex.JaxprEqn, operands: Sequence[Any]) -> bool:
    """Whether an equation waits on the weight among its operands instead of reading it."""
    primitive = eqn.primitive
    if primitive not in MOVES and primitive.name not in _ENTRYWISE | _JOINING:
        return False
    if primitive in MOVES and any(map(is_coded, operands[1:])):
        return False
    if max(len(x.moves) for x in operands if is_coded(x)) >= MOST_MOVES or eqn.effects:
        return False
    try:
        hash(tuple(eqn.params.items()))
    except TypeError:
        return False
    return True


# Placement.


def array_spec(
    mesh: Any, spec: Any, out: Sequence[Sequence[Label]], labels: Sequence[Label]
) -> PartitionSpec:
    """The partition of one array of a bundle, for the partition of the weight.

    An axis in blocks is split between blocks, or not at all where their number does not divide.
    """
    entries: dict[Label, Any] = {}
    for axis, entry in zip(out, spec, strict=False):
        if entry is None or not axis:
            continue
        names = entry if isinstance(entry, tuple) else (entry,)
        # A block stays on one device: the axis is divided between blocks, or not at all.
        parts = math.prod(mesh.shape[name] for name in names)
        if axis[0].size % parts == 0:
            entries[axis[0]] = entry
    return PartitionSpec(*(entries.get(label) for label in labels))


def weight_spec(
    spec: Any, out: Sequence[Sequence[Label]], labels: Sequence[Label]
) -> PartitionSpec:
    """The partition of a weight, for the partition of its codes."""
    entries = dict(zip(labels, (*spec, *[None] * len(labels)), strict=False))
    return PartitionSpec(*(entries.get(axis[0]) if axis else None for axis in out))
