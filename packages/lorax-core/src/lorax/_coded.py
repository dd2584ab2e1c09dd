"""A base that is stored as codes while the transformed function runs.

    W[i, o]  =  decode(codes[i, o], scales[block of i, o], …)

Codes and scales are arrays with labels, like the factors of a term, so anything that moves a term
moves them. Nothing is computed where the function calls for it, though: an equation whose result is
still a weight is deferred, and evaluated by the equation that reads the weight. Only there is the
weight an array. Under `jax.checkpoint`, that equation saves its operands for the backward pass,
the original codes, and nothing that was computed from them. A barrier keeps compilers from decoding
a weight before it is needed.
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

# How primitives that move or cut axes change labeled arrays: `change(term, *others, **params)`
# returns a term, or a list of terms for a primitive with several results.
MOVES: dict[jex.Primitive, Callable[..., Any]] = {}

# The result of each of these is a weight, no larger than its operand. They are evaluated on the
# decoded array; those whose other operands are scalars commute with moves of axes.
_ENTRYWISE = frozenset(
    "abs add and atan2 cbrt ceil clamp convert_element_type copy cos div eq erf exp exp2 expm1 "
    "floor ge gt integer_pow is_finite le log log1p logistic lt max min mul name ne neg not or pow "
    "reduce_precision rem round rsqrt select_n sign sin sqrt square stop_gradient sub tan tanh "
    "xor".split()
)
_JOINING = frozenset(
    ["concatenate", "dynamic_update_slice", "pad", "scatter", "scatter-add", "stack"]
)

# The most equations that are deferred on one weight; further ones are evaluated on an array.
MOST_MOVES = 32


class Move(NamedTuple):
    """A deferred equation.

    Attributes:
        primitive: its primitive.
        params: its parameters.
        position: which operand the weight is.
        result: which of its results this is.
        commutes: whether it acts on entries alone and so commutes with moves of axes.
        keeps_nan: whether a lookup that fills with NaN goes past it as well.
    """

    primitive: jex.Primitive
    params: tuple[tuple[str, Hashable], ...]
    position: int
    result: int
    commutes: bool
    keeps_nan: bool = False


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Spread:
    """An array that is broadcast when it is read."""

    source: Any
    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    axes: tuple[int, ...] = dataclasses.field(metadata={"static": True})

    def array(self) -> jax.Array:
        """Returns the broadcast array."""
        return jax.lax.broadcast_in_dim(self.source, self.shape, self.axes)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CodedArray:
    """A base as its codes and scales, with the equations that are deferred on it.

    Attributes:
        term: the arrays with the labels of their axes; a bundle, not an einsum.
        others: the other operands of each move.
        names: the name of each array of `term`.
        format: the format that decodes them.
        stored: the dtype of the decoded array, before any move.
        moves: the deferred equations, in order.
        shape: the shape of the weight after the moves.
        dtype: the dtype of the weight after the moves.
        sources: the names of the weight in messages.
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
    def is_packed(self) -> bool:
        """Whether several codes share a byte, so that they are unpacked before they are read."""
        integers = [x.dtype for x in self.term.factors if jnp.issubdtype(x.dtype, jnp.integer)]
        return any(jnp.iinfo(dtype).bits < 8 for dtype in integers)

    @property
    def size(self) -> int:
        """The number of entries of the weight."""
        return math.prod(self.shape)

    @property
    def struct(self) -> jax.ShapeDtypeStruct:
        """The shape that replaces the weight while a function is traced, with its sharding."""
        sharding = _sharding_of(self.term.factors[0])
        if sharding is None or AxisType.Explicit not in sharding.mesh.axis_types:
            return jax.ShapeDtypeStruct(self.shape, self.dtype)
        spec = weight_spec(sharding.spec, self.term.out, self.term.labels[0])
        return jax.ShapeDtypeStruct(
            self.shape, self.dtype, sharding=NamedSharding(sharding.mesh, spec)
        )

    def array(self) -> jax.Array:
        """Returns the weight as an array of floats, after every deferred equation."""
        term, waiting, array = self.term, [], None
        for move, others in zip(self.moves, self.others, strict=True):
            others = tuple(map(array_of, others))
            # Entrywise, so it commutes with moves and can be applied after decoding.
            if array is None and move.commutes:
                waiting.append((move, others))
                continue
            if array is None:
                try:
                    # A move of axes: codes and scales are moved, which are smaller than floats.
                    term = _moved(term, move, others, waiting)
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
        """Returns the same base without source names, so that equal layers are equal."""
        return dataclasses.replace(self, sources=()) if self.sources else self

    def deferred(self, eqn: jex.JaxprEqn, position: int, operands: Sequence[Any]) -> list[Any]:
        """Returns the results of an equation, each a base on which the equation is deferred."""
        others = tuple(x for k, x in enumerate(operands) if k != position)
        # f(slice(W)) = slice(f(W)) if f acts on entries alone, such as a cast or a scalar multiple.
        scalar = all(getattr(x, "shape", ()) == () for x in others)
        commutes = eqn.primitive.name in _ENTRYWISE and scalar
        # NaN ** 0 is 1, and the derivative of NaN · s by s is NaN, while that of a filled row is 0.
        is_power = eqn.primitive.name in ("integer_pow", "pow")
        keeps_nan = not is_power and not any(map(_compat.is_tracer, others))
        params = tuple(eqn.params.items())
        avals: list[Any] = [v.aval for v in eqn.outvars]
        return [
            dataclasses.replace(
                self,
                moves=(*self.moves, Move(eqn.primitive, params, position, k, commutes, keeps_nan)),
                others=(*self.others, others),
                shape=tuple(aval.shape),
                dtype=aval.dtype,
            )
            for k, aval in enumerate(avals)
        ]

    def entry(self, index: Any) -> "CodedArray":
        """Returns entry `index` of a stack, picked when the weight is read."""
        # [layers, *axes] -> [1, *axes] -> [*axes]
        sizes = (1, *self.shape[1:])
        pick = Move(_primitive("dynamic_slice"), (("slice_sizes", sizes),), 0, 0, False)
        drop = Move(_primitive("squeeze"), (("dimensions", (0,)),), 0, 0, False)
        starts = (index, *[jnp.zeros((), index.dtype)] * (self.ndim - 1))
        return dataclasses.replace(
            self,
            # `dynamic_slice` and `squeeze` as if the user had indexed the stack.
            moves=(*self.moves, pick, drop),
            others=(*self.others, starts, ()),
            shape=self.shape[1:],
        )

    @property
    def first(self) -> Any:
        """The codes, whose type and sharding are those of the weight."""
        return self.term.factors[0]

    def changed(self, change: Callable[[Term], Term]) -> "CodedArray":
        """Returns the base whose arrays `change` has moved, after the deferred moves of axes.

        Deferred equations that act on entries alone stay deferred.

        Raises:
            Inexpressible: if a deferred equation cannot be applied to codes.
        """
        term, waiting = self.term, []
        for move, others in zip(self.moves, self.others, strict=True):
            # f(entries) waits, and a slice or a transpose goes past it to the codes.
            if move.commutes:
                waiting.append((move, others))
            else:
                term = _moved(term, move, others, waiting)
        term = change(term)
        return dataclasses.replace(
            self,
            term=term,
            moves=tuple(move for move, _ in waiting),
            others=tuple(others for _, others in waiting),
            shape=term.shape,
        )


def _primitive(name: str) -> jex.Primitive:
    primitive = _compat.find_primitive(name)
    assert primitive is not None, name
    return primitive


def _sharding_of(array: Any) -> Any:
    """Returns the sharding in the type of an array, or None for a shape without one."""
    return array.sharding if isinstance(array, jax.ShapeDtypeStruct) else jax.typeof(array).sharding


def is_coded(value: Any) -> TypeGuard[CodedArray]:
    """Whether a base is stored as codes."""
    return isinstance(value, CodedArray)


def array_of(value: Any) -> Any:
    """Returns a plain array for a base or a whole weight; an array is returned unchanged."""
    if isinstance(value, jax.Array):
        return value
    return value.array() if hasattr(value, "array") else value


def decode(term: Term, names: Sequence[str], format: Any, dtype: Any) -> jax.Array:
    """Returns the array that a bundle of codes and scales encodes.

    Each array gets an axis of size one for each label that it lacks, in the order in which the
    codes are stored. One entrywise function of all arrays follows, and axes are transposed only
    after it, which fuses into the consumer. Scales are frozen like the codes: the barrier would
    give a derivative to all of its operands, which would cost a product as large as the weight.
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
        for gain in arrays[len(names) :]:  # NaN for rows whose index was out of range
            value = value * gain.astype(value.dtype)
        sizes = tuple(label.size for label in order)
        if value.shape != sizes:
            value = jnp.broadcast_to(value, sizes)
        value = value.astype(dtype)
        if order != shown:
            value = jnp.transpose(value, [order.index(label) for label in shown])
        return _joined(value, term)


def _joined(array: jax.Array, term: Term) -> jax.Array:
    """Joins the labels of each axis; one axis at a time, which explicit meshes need."""
    for d, labels in enumerate(term.out):
        if len(labels) != 1:
            count = len(labels)
            # […, in / 64, 64, …] -> […, in, …]
            size = math.prod(label.size for label in labels)
            array = array.reshape(*array.shape[:d], size, *array.shape[d + count :])
    return array


def _spread(array: jax.Array, labels: Sequence[Label], order: Sequence[Label]) -> jax.Array:
    """Returns an array with one axis per label of `order`; squeezed labels have one entry."""
    gone = [k for k, label in enumerate(labels) if label not in order]
    if gone:
        array = jnp.squeeze(array, gone)
        labels = [label for label in labels if label in order]
    positions = sorted(range(len(labels)), key=lambda k: order.index(labels[k]))
    if positions != list(range(len(labels))):
        array = jnp.transpose(array, positions)
    # scales [in / 64, out] -> [in / 64, 1, out], like codes [in / 64, 64, out]
    missing = [d for d, label in enumerate(order) if label not in labels]
    return jnp.expand_dims(array, missing) if missing else array


def _moved(
    term: Term,
    move: Move,
    others: tuple[Any, ...],
    waiting: Iterable[tuple[Move, tuple[Any, ...]]],
) -> Term:
    """Returns the codes after a move of axes that goes past the equations that wait."""
    change = MOVES.get(move.primitive)
    if change is None or move.position != 0:
        raise Inexpressible
    if dict(move.params).get("mode") == jax.lax.GatherScatterMode.FILL_OR_DROP:
        if not all(entrywise.keeps_nan for entrywise, _ in waiting):
            raise Inexpressible
    term = change(term, *others, **dict(move.params))
    return term[move.result] if isinstance(term, list) else term


def _bound(move: Move, array: jax.Array, others: Sequence[Any]) -> jax.Array:
    operands = [*others[: move.position], array, *others[move.position :]]
    # The weight is put back among the operands, in its own position.
    return _compat.bind_params(move.primitive, dict(move.params), *operands)[move.result]


def is_deferred(eqn: jex.JaxprEqn, operands: Sequence[Any]) -> bool:
    """Whether an equation is deferred on the weight among its operands instead of reading it."""
    primitive = eqn.primitive
    if primitive not in MOVES and primitive.name not in _ENTRYWISE | _JOINING:
        return False
    # A move takes its weight first; indices or starts cannot be codes.
    if primitive in MOVES and any(map(is_coded, operands[1:])):
        return False
    if max(len(x.moves) for x in operands if is_coded(x)) >= MOST_MOVES or eqn.effects:
        return False
    try:
        # Moves are static data of a pytree, so they must be hashable.
        hash(tuple(eqn.params.items()))
    except TypeError:
        return False
    return True


# Placement.


def array_spec(
    mesh: Any, spec: Any, out: Sequence[Sequence[Label]], labels: Sequence[Label]
) -> PartitionSpec:
    """Returns the partition of one array of a bundle, given the partition of the weight.

    An axis in blocks is split between blocks, or not at all if their number is not divisible.
    """
    entries: dict[Label, Any] = {}
    for axis, entry in zip(out, spec, strict=False):
        if entry is None or not axis:
            continue
        names = entry if isinstance(entry, tuple) else (entry,)
        # A block stays on one device: the axis is divided between blocks, or not at all.
        # The number of devices along this axis of the weight.
        parts = math.prod(mesh.shape[name] for name in names)
        if axis[0].size % parts == 0:
            entries[axis[0]] = entry
    return PartitionSpec(*(entries.get(label) for label in labels))


def weight_spec(
    spec: Any, out: Sequence[Sequence[Label]], labels: Sequence[Label]
) -> PartitionSpec:
    """Returns the partition of a weight, given the partition of its codes."""
    # A partition may be shorter than the number of axes: the rest is not partitioned.
    entries = dict(zip(labels, (*spec, *[None] * len(labels)), strict=False))
    return PartitionSpec(*(entries.get(axis[0]) if axis else None for axis in out))
