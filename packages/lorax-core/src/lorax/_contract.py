"""Emits all einsums with factors: chooses their order, form and dtype.

Rules say *which* labels meet. `contract` decides how: pairwise, in the order with the fewest
multiplications, each pair as one `dot_general`, or as an elementwise product if one side only
scales the other. Factors are cast to the operand's dtype. Everything is under the named scope
`lora`. On one CPU, adjacent axes are joined into one for the product.

A label is any hashable with a `size`; it names one axis of an operand.
"""

import collections
import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.export
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ._order import pairwise_order

# An array and a label for each of its axes: a [in, rank] is (a, (i, r)).
Operand = tuple[jax.Array, tuple[Any, ...]]


def holds_factors(dtype) -> bool:
    """Whether a dtype can hold factors: integers cannot, and 8-bit floats would lose them."""
    return jnp.issubdtype(dtype, jnp.inexact) and jnp.dtype(dtype).itemsize >= 2


def product_dtype(*dtypes, out=jnp.float32):
    """Returns the dtype in which an equation computes with operands of `dtypes`.

    This is the promoted dtype of those operands that can hold factors, even under strict promotion.
    If none can, it is the dtype `out` of the result, or float32. The dtype of the factors is
    ignored: float32 factors would otherwise turn every product of a bfloat16 model into float32.
    """
    wide = [dtype for dtype in dtypes if holds_factors(dtype)]
    if wide:
        with jax.numpy_dtype_promotion("standard"):
            return functools.reduce(jnp.promote_types, wide, jnp.dtype(wide[0]))
    return jnp.dtype(out if holds_factors(out) else jnp.float32)


def wide_dtype(dtype):
    """Returns the dtype in which a weight and its terms are summed: float32 or wider."""
    return product_dtype(dtype, jnp.float32)


def contract(
    operands: Sequence[Operand],
    out: tuple[Any, ...],
    *,
    dtype,
    precision=None,
    preferred_element_type=None,
    meets: int | None = None,
    like: jax.Array | None = None,
) -> jax.Array:
    """Computes an einsum over labels.

    Args:
        operands: (array, one label for each of its axes).
        out: the labels of the result, in order; each is carried by some operand.
        dtype: the dtype of the products. Factors are cast to it; the operand that meets the weight
            is not, because that would copy it.
        precision: as in `jax.lax.dot_general`.
        preferred_element_type: of the last product, as in `jax.lax.dot_general`.
        meets: the position of the operand that meets the weight, or None if the factors are
            multiplied among themselves.
        like: an array with the axes of the result whose sharding the result takes, where the
            mesh has explicit axes.

    Returns:
        An array with the axes `out`.
    """
    with jax.named_scope("lora"):
        # Factors are small, so they are cast. The operand that meets the weight can be large.
        arrays = [a if k == meets else a.astype(dtype) for k, (a, _) in enumerate(operands)]
        labels = [labels for _, labels in operands]
        # Off an explicit mesh, this adds no sharding.
        mesh = _Mesh(operands, out, like)
        joins = is_for_one_cpu(arrays)
        operand = None if meets is None else arrays[meets]
        met = [k == meets for k in range(len(arrays))]
        for left, right in pairwise_order(tuple(labels), out, meets):
            # Only the last product has the axes and the dtype of the result.
            last = len(arrays) == 2
            # Labels that are still needed after this product: they must not be summed over in it.
            rest = [pair_labels for k, pair_labels in enumerate(labels) if k not in (left, right)]
            elsewhere = {*out}.union(*rest)
            array, pair_labels = _pair(
                (arrays[left], labels[left]),
                (arrays[right], labels[right]),
                elsewhere,
                mesh,
                dtype,
                _precisions(precision, meets, met[left], met[right]),
                preferred_element_type if last else None,
                out if last else None,
                joins,
                operand,
            )
            meeting = met[left] or met[right]
            # x [n, i], a [i, r], b [r, o]  ->  b [r, o], x·a [n, r]  ->  x·a·b [n, o]
            for k in sorted((left, right), reverse=True):
                del arrays[k], labels[k], met[k]
            # The product takes the place of its operands, at the end: `pairwise_order` counts this
            # way.
            arrays.append(array)
            labels.append(pair_labels)
            met.append(meeting)
        # A single operand took part in no product, so it is summed and cast here.
        array, pair_labels = _sum_out(arrays[0], labels[0], set(out), dtype)
        array = array.astype(dtype) if len(operands) == 1 else array
        if pair_labels != out:
            # [*pair_labels] -> [*out]
            array = jnp.transpose(array, [pair_labels.index(label) for label in out])
        return array


def _pair(left, right, elsewhere, mesh, dtype, precision, preferred, out, joins, shared) -> Operand:
    """Emits one product; `out`, if given, decides which operand comes first.

    With `joins`, adjacent axes are joined, except those of `shared`, an operand with other uses:
    JAX would keep both forms of it for the backward pass.
    """
    (x, xs), (y, ys) = left, right
    # A label of one side that nothing else needs is summed out first: less to multiply.
    x, xs = _sum_out(x, xs, elsewhere.union(ys), dtype)
    y, ys = _sum_out(y, ys, elsewhere.union(xs), dtype)
    # The operand was not cast, so the two dtypes may differ; the result has the common one.
    if preferred is None and x.dtype != y.dtype:
        preferred = dtype
    # x [*batch, *x_free, *summed] · y [*batch, *summed, *y_free] -> [*batch, *x_free, *y_free],
    # where the axes of x and y may be in any order.
    both = [label for label in xs if label in ys]
    batch = tuple(label for label in both if label in elsewhere)
    summed = tuple(label for label in both if label not in elsewhere)
    x_free = tuple(label for label in xs if label not in both)
    y_free = tuple(label for label in ys if label not in both)
    if mesh.mesh is None and x.dtype == y.dtype == (preferred or x.dtype):
        is_scaled = not (x_free and y_free) and not summed
        is_row_by_row = not (x_free or y_free) and wide_dtype(x.dtype) == x.dtype
        if is_scaled or is_row_by_row:
            return _elementwise((x, xs), (y, ys), summed)
    if out is None:
        # The left operand is read along its last axis and the right one along its first. This
        # matters for the operand that meets the weight, which may be as large as the weight.
        leads = xs[len(batch) :][: len(summed)] == summed
        turned = bool(x_free and summed) and leads and (shared is None or x is shared)
    else:
        # With the operands in this order, the last axis of the result is already in place. If the
        # result must be transposed, whole rows are moved.
        turned = bool(x_free and y_free) and x_free[-1] == out[-1]
    if turned:
        x, xs, x_free, y, ys, y_free = y, ys, y_free, x, xs, x_free
        # A pair of precisions has one for each operand, so it is exchanged with them.
        if isinstance(precision, tuple):
            precision = precision[::-1]
    out_labels = (*batch, *x_free, *y_free)
    if joins and shared is not x and shared is not y:
        # x [batch, seq, in] · a [in, rank]: batch and seq are one axis of batch · seq entries.
        followers = _followers((xs, ys, out_labels))
        xs, ys, summed, batch = (_join(labels, followers) for labels in (xs, ys, summed, batch))
        x, y = _reshape(x, xs), _reshape(y, ys)
    dimension_numbers = (
        ([xs.index(label) for label in summed], [ys.index(label) for label in summed]),
        ([xs.index(label) for label in batch], [ys.index(label) for label in batch]),
    )
    result = jax.lax.dot_general(
        x,
        y,
        dimension_numbers,
        precision=precision,
        preferred_element_type=preferred,
        **mesh.out_sharding(out_labels),
    )
    # Joined axes are separated again: [batch · seq, rank] -> [batch, seq, rank].
    return _reshape(result, out_labels), out_labels


def _elementwise(left: Operand, right: Operand, summed: Sequence[Any]) -> Operand:
    """Multiplies an operand by one whose labels it has all; sums over `summed`.

    As a `dot_general`, this is a batch of products of single numbers or rows, which XLA on CPU
    computes one by one, and whose result has its axes in another order.
    """
    (x, xs), (y, ys) = sorted((left, right), key=lambda operand: -len(operand[1]))
    # y [*ys] -> [*xs], with size 1 along the labels that it does not have
    order = [ys.index(label) for label in xs if label in ys]
    y = jnp.transpose(y, order)
    y = jnp.expand_dims(y, [k for k, label in enumerate(xs) if label not in ys])
    return _sum_out(x * y, xs, set(xs) - set(summed), x.dtype)


def is_for_one_cpu(arrays: Sequence[jax.Array]) -> bool:
    """Whether a program is traced for a single CPU, where some forms of a product are faster.

    The gradient of `b` in `(x @ a) @ b` contracts all axes that x keeps, such as batch and
    sequence. XLA on CPU copies the whole cotangent for that, unless they are one axis, so axes are
    joined there. (For `a` it copies the cotangent of `x @ a`, which is only a rank wide.) On other
    platforms nothing is gained: joined axes cost memory on TPU, and collectives where several of
    them are sharded. The rule for convolutions uses this as well, to join the groups of features
    with the batch.

    The mesh is in the type of the array, or in the context, and may be of another platform than
    this host's. A trace does not show what `jax.jit(in_shardings=…)` or `jax.export(platforms=…)`
    compile for, nor the device of a `SingleDeviceSharding`: a host without an accelerator that
    compiles for one should put a mesh on its arguments, or call `jax.set_mesh`. A symbolic size
    means that the program is exported, for any platform; JAX also cannot always tell that a product
    of such sizes is one.
    """
    if any(map(jax.export.is_symbolic_dim, itertools.chain(*(array.shape for array in arrays)))):
        return False
    meshes = [jax.typeof(array).sharding.mesh for array in arrays]
    off_mesh = all(mesh.empty for mesh in (*meshes, jax.sharding.get_abstract_mesh()))
    return off_mesh and jax.default_backend() == "cpu"


class _Joined(NamedTuple):
    """Several labels that are joined into one axis."""

    size: int
    labels: tuple[Any, ...]


def _followers(sequences: Sequence[tuple[Any, ...]]) -> dict[Any, Any]:
    """Maps each label to the one right behind it, if that holds in every sequence with either.

    A reshape can then join the two in every array without moving data.
    """
    # Two labels can be joined only if every array that has one has both, in this order.
    uses = collections.Counter(itertools.chain(*sequences))
    pairs = collections.Counter(itertools.chain(*map(itertools.pairwise, sequences)))
    return {one: two for (one, two), count in pairs.items() if count == uses[one] == uses[two]}


def _join(labels: tuple[Any, ...], followers: Mapping[Any, Any]) -> tuple[Any, ...]:
    runs: list[tuple[Any, ...]] = []
    for label in labels:
        if runs and followers.get(runs[-1][-1]) == label:
            runs[-1] += (label,)
        else:
            runs.append((label,))
    return tuple(
        run[0] if len(run) == 1 else _Joined(math.prod(label.size for label in run), run)
        for run in runs
    )


def _reshape(array: jax.Array, labels: Sequence[Any]) -> jax.Array:
    return array if array.ndim == len(labels) else array.reshape([label.size for label in labels])


def _precisions(precision, meets, left_met: bool, right_met: bool):
    """Returns the precision of one product; a pair has one for each side of the equation."""
    if not isinstance(precision, tuple) or meets is None:
        return precision
    of_met, of_factor = precision if meets == 0 else precision[::-1]
    return tuple(of_met if met else of_factor for met in (left_met, right_met))


def _sum_out(array, labels, kept, dtype) -> Operand:
    axes = [axis for axis, label in enumerate(labels) if label not in kept]
    ones = [axis for axis in axes if array.shape[axis] == 1]
    if ones and len(ones) == len(axes):
        # A sum over one entry would copy a base, which may be among the operands.
        array = jnp.squeeze(array, ones)
    elif axes:
        array = jnp.sum(array, axes, dtype=dtype)
    return array, tuple(label for label in labels if label in kept)


class _Mesh:
    """Output shardings of products on a mesh with explicit axes, where `dot_general` needs them.

    A label is sharded as in the first operand that carries it, and the result as `like` is. If two
    labels of one array are sharded over the same mesh axis, only the first one is.
    """

    def __init__(self, operands: Sequence[Operand], out: tuple[Any, ...], like: Any):
        shardings = [jax.typeof(array).sharding for array, _ in operands]
        meshes = [s.mesh for s in shardings if AxisType.Explicit in s.mesh.axis_types]
        self.mesh = meshes[0] if meshes else None
        self.entries: dict[Any, Any] = {}
        if self.mesh is None:
            return
        if like is not None:
            self.entries |= zip(out, jax.typeof(like).sharding.spec, strict=True)
        for (_, labels), sharding in zip(operands, shardings, strict=True):
            for label, entry in zip(labels, sharding.spec, strict=True):
                fixed = like is not None and label in out
                if self.entries.get(label) is None and not fixed:
                    self.entries[label] = entry

    def out_sharding(self, labels: Sequence[Any]) -> dict[str, NamedSharding]:
        """The keyword for `dot_general`, or none off an explicit mesh."""
        if self.mesh is None:
            return {}
        spec: list[Any] = []
        taken: set[Any] = set()
        for label in labels:
            entry = self.entries.get(label)
            # An axis of the mesh can shard only one axis of an array.
            names = set(entry if isinstance(entry, tuple) else (entry,)) - {None}
            spec.append(None if names & taken else entry)
            taken |= names
        return {"out_sharding": NamedSharding(self.mesh, PartitionSpec(*spec))}
