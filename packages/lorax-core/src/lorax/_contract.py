"""The one place that emits products with factors: it decides order, form and dtype.

Rules say *which* labels meet. `contract` decides how: pairwise, in the order of least
multiplications, each pair as one `dot_general` whose operands are already in the operand's
dtype, under the named scope `lora`. On one CPU, neighbouring axes are one axis in it.

Labels are any hashable with a `size`; each names one axis of an operand.
"""

import collections
import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

Operand = tuple[jax.Array, tuple[Any, ...]]


def product_dtype(operand_dtype, out_dtype):
    """The dtype in which factors meet an operand: the operand's, at 16 bits or more.

    Factors in float32 beside a bfloat16 model would make every product a float32 one; 8-bit
    floats would lose the factors, and integers cannot hold them.
    """
    for dtype in (operand_dtype, out_dtype):
        if jnp.issubdtype(dtype, jnp.inexact) and jnp.dtype(dtype).itemsize >= 2:
            return jnp.dtype(dtype)
    return jnp.dtype(jnp.float32)


def wide_dtype(dtype):
    """The dtype in which a weight and its terms are summed: float32, or the weight's if wider."""
    dtype = jnp.dtype(dtype)
    return dtype if dtype.itemsize >= 4 else jnp.dtype(jnp.float32)


def joint_dtype(first, second):
    """The dtype that holds both, however strict the user's promotion is."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.promote_types(first, second)


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
    """`einsum` over labels.

    Args:
        operands: (array, one label for each of its axes).
        out: the labels of the result, in order; each is carried by some operand.
        dtype: the dtype in which the operands meet.
        precision: as in `jax.lax.dot_general`.
        preferred_element_type: of the last product, as in `jax.lax.dot_general`.
        meets: the position of the operand that meets the weight, where there is one; without it
            the factors are multiplied among themselves.
        like: an array with the axes of the result whose sharding the result takes, where the
            mesh has explicit axes.

    Returns:
        The array of `out`'s axes.
    """
    with jax.named_scope("lora"):
        arrays = [array.astype(dtype) for array, _ in operands]
        labels = [labels for _, labels in operands]
        mesh = _Mesh(operands, out, like)
        joins = is_for_one_cpu(arrays)
        operand = None if meets is None else arrays[meets]
        met = [k == meets for k in range(len(arrays))]
        for left, right in _path(tuple(labels), out, meets):
            last = len(arrays) == 2
            rest = [found for k, found in enumerate(labels) if k not in (left, right)]
            elsewhere = {*out}.union(*rest)
            array, found = _pair(
                (arrays[left], labels[left]),
                (arrays[right], labels[right]),
                elsewhere,
                mesh,
                _precisions(precision, meets, met[left], met[right]),
                preferred_element_type if last else None,
                out if last else None,
                # Of an operand that others share, JAX would keep both forms for the backward pass.
                joins and operand is not arrays[left] and operand is not arrays[right],
            )
            meeting = met[left] or met[right]
            for k in sorted((left, right), reverse=True):
                del arrays[k], labels[k], met[k]
            arrays.append(array)
            labels.append(found)
            met.append(meeting)
        array, found = _sum_out(arrays[0], labels[0], set(out))
        if found != out:
            array = jnp.transpose(array, [found.index(label) for label in out])
        return array


def _pair(left, right, elsewhere, mesh, precision, preferred, out, joins) -> Operand:
    """One `dot_general`; `out`, where given, decides which operand comes first."""
    (x, xs), (y, ys) = left, right
    x, xs = _sum_out(x, xs, elsewhere.union(ys))
    y, ys = _sum_out(y, ys, elsewhere.union(xs))
    both = [label for label in xs if label in ys]
    batch = tuple(label for label in both if label in elsewhere)
    summed = tuple(label for label in both if label not in elsewhere)
    x_free = tuple(label for label in xs if label not in both)
    y_free = tuple(label for label in ys if label not in both)
    if out is not None and (*batch, *y_free, *x_free) == out and x_free and y_free:
        x, xs, x_free, y, ys, y_free = y, ys, y_free, x, xs, x_free
        if isinstance(precision, tuple):
            precision = precision[::-1]
    found = (*batch, *x_free, *y_free)
    if joins:
        followers = _followers((xs, ys, found))
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
        **mesh.out_sharding(found),
    )
    return _reshape(result, found), found


def is_for_one_cpu(arrays: Sequence[jax.Array]) -> bool:
    """Whether a program is traced for a CPU, off a mesh: there some forms are faster than others.

    The gradient of `b` in `(x @ a) @ b` contracts all that x keeps, as batch and sequence. XLA on
    CPU copies the whole cotangent for that, unless it is one axis: there axes are joined. (For `a`
    it copies the cotangent of `x @ a`, a rank wide, which costs little.) Elsewhere nothing is
    gained, and the joined axes cost memory on TPU, and collectives wherever several of them are
    sharded. The rule of convolutions asks too: it joins the groups of features with the batch.

    The mesh is in the type of the array, or in the context; it may be of another platform than
    this host's. No trace shows what `jax.jit(in_shardings=…)` or `jax.export(platforms=…)` compile
    for, nor the one device of a `SingleDeviceSharding`: a host without an accelerator that
    compiles for one should put a mesh on its arguments, or call `jax.set_mesh`.
    """
    meshes = [jax.typeof(array).sharding.mesh for array in arrays]
    off_mesh = all(mesh.empty for mesh in (*meshes, jax.sharding.get_abstract_mesh()))
    return off_mesh and jax.default_backend() == "cpu"


class _Joined(NamedTuple):
    """Labels that are one axis."""

    size: int
    labels: tuple[Any, ...]


def _followers(sequences: Sequence[tuple[Any, ...]]) -> dict[Any, Any]:
    """The label right behind each label, where it is so in every sequence that has one of the two.

    A reshape can make the two one axis of every array, and nothing moves.
    """
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
    return array if array.ndim == len(labels) else array.reshape([found.size for found in labels])


def _precisions(precision, meets, left_met: bool, right_met: bool):
    """A pair of precisions is one for each side of the equation: what meets, and the weight."""
    if not isinstance(precision, tuple) or meets is None:
        return precision
    of_met, of_factor = precision if meets == 0 else precision[::-1]
    return tuple(of_met if met else of_factor for met in (left_met, right_met))


def _sum_out(array, labels, kept) -> Operand:
    axes = [axis for axis, label in enumerate(labels) if label not in kept]
    if axes:
        array = jnp.sum(array, axes)
    return array, tuple(label for label in labels if label in kept)


@functools.lru_cache(maxsize=4096)
def _path(labels: tuple[tuple[Any, ...], ...], out: tuple[Any, ...], meets: int | None):
    """The order of pairwise products with the fewest multiplications.

    Each step names two positions; its result goes to the end of the list. Where an operand meets
    the weight (`meets`), factors are not multiplied with each other into something that spans the
    weight's inputs and its outputs, or all of its axes: that would be the delta itself.
    """
    operands = tuple((labels, k == meets) for k, labels in enumerate(labels))
    if meets is None:
        return _search(operands, out, _Weight())[1]
    seen = frozenset(labels[meets])
    owned = frozenset().union(*(found for found, is_met in operands if not is_met))
    weight = _Weight(seen - set(out), frozenset(out) - seen, owned & (seen | set(out)))
    return _search(operands, out, weight)[1]


class _Weight(NamedTuple):
    """The labels of the weight whose factors are multiplied, where something meets it."""

    inputs: frozenset[Any] = frozenset()
    outputs: frozenset[Any] = frozenset()
    shown: frozenset[Any] = frozenset()

    def is_built_by(self, left: tuple[Any, ...], right: tuple[Any, ...], found: tuple[Any, ...]):
        """Whether the product of two factors would be the weight's delta, or a part as large."""
        if self.inputs.intersection(found) and self.outputs.intersection(found):
            return True
        return self.shown.issubset(found) and not any(map(self.shown.issubset, (left, right)))


def _search(operands, out, weight: _Weight) -> tuple[float, list[tuple[int, int]]]:
    if len(operands) < 2:
        return 0.0, []
    best = (math.inf, math.inf, [])
    for left in range(len(operands)):
        for right in range(left + 1, len(operands)):
            rest = tuple(o for k, o in enumerate(operands) if k not in (left, right))
            elsewhere = set(out).union(*(labels for labels, _ in rest))
            met = dict.fromkeys((*operands[left][0], *operands[right][0]))
            found = tuple(label for label in met if label in elsewhere)
            meets = operands[left][1] or operands[right][1]
            if not meets and weight.is_built_by(operands[left][0], operands[right][0], found):
                continue
            cost = math.prod(label.size for label in met)
            after, steps = _search((*rest, (found, meets)), out, weight)
            made = math.prod(label.size for label in found)
            # Equal counts: keep the smaller intermediate.
            best = min(best, (cost + after, made, [(left, right), *steps]), key=lambda b: b[:2])
    return best[0], best[2]


class _Mesh:
    """Sharding of products on a mesh with explicit axes, where `dot_general` must be told.

    A label is sharded as the first operand that carries it is, and the result as `like` is.
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
                if self.entries.get(label) is None:
                    self.entries[label] = entry

    def out_sharding(self, labels: Sequence[Any]) -> dict[str, NamedSharding]:
        """The keyword for `dot_general`, or none off an explicit mesh."""
        if self.mesh is None:
            return {}
        spec = PartitionSpec(*(self.entries.get(label) for label in labels))
        return {"out_sharding": NamedSharding(self.mesh, spec)}
