"""The delta of an adapter as a product of two matrices, and its best low-rank approximation.

    delta[entry]  =  a[entry] @ b[entry]         # [in, rank] [rank, out] -> [in, out]

No function here forms a matrix [in, out]: a QR decomposition of both factors leaves a core of
rank × rank with the same norm and the same singular values. All of it runs in NumPy, because the
matrices are small and nothing then waits for a compiler.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np

from .._arrays import path_string
from .._axes import Axes
from .._errors import ArgumentError, PairError
from .._pair import Pair, is_tunable_leaf
from .._terms import Label, Labels, Term
from .._within import Within
from ..kinds.lora import LoraWeight, at_same_scale


class Approximation(NamedTuple):
    """Adapters, and how far each is from the requested delta.

    Attributes:
        tunable: the tree of adapters.
        errors: by path, `‖delta − wanted‖ / ‖wanted‖` in the Frobenius norm.
    """

    tunable: Any
    errors: dict[str, float]


def flatten_adapters(tunable: Any) -> tuple[list[tuple[str, Any]], Any]:
    """Returns the leaves of a tunable tree with their paths, and its structure."""
    if isinstance(tunable, Pair):
        raise PairError("A bank and its functions take the tunable tree of a pair, `pair.tunable`.")
    leaves, structure = jax.tree_util.tree_flatten_with_path(tunable, is_leaf=is_tunable_leaf)
    for path, leaf in leaves:
        if isinstance(leaf, Within):
            raise PairError(
                f"The adapter at `{path_string(path)}` was returned by with_dropout, "
                "select_adapters or mix_adapters, and is for a single call. Pass the adapter "
                "that it was made from."
            )
    return [(path_string(path), leaf) for path, leaf in leaves], structure


class Matrices(NamedTuple):
    """Two factors of a delta per entry of the shared axes, in double precision."""

    a: np.ndarray  # [entries, in, rank]
    b: np.ndarray  # [entries, rank, out]

    @classmethod
    def of(cls, weight: LoraWeight) -> Self:
        """Returns the factors of a weight; the scale is multiplied into `a`."""
        shared = len(weight.shared_axes)
        entries = math.prod(weight.a.shape[:shared])
        a = _double(weight.a).reshape(entries, -1, weight.rank)
        b = _double(weight.b).reshape(entries, weight.rank, -1)
        return cls(a * weight.scale, b)

    def into(self, weight: LoraWeight) -> LoraWeight:
        """Returns a weight with these factors; its rank and alpha change, its scale does not."""
        rank = self.a.shape[-1]
        shared = len(weight.shared_axes)
        a_shape = (*weight.a.shape[:-1], rank)
        b_shape = (*weight.b.shape[:shared], rank, *weight.b.shape[shared + 1 :])
        return at_same_scale(
            weight,
            # `a` carries the scale, which the weight multiplies again.
            _beside((self.a / weight.scale).reshape(a_shape), weight.a),
            _beside(self.b.reshape(b_shape), weight.b),
        )

    def times(self, number: float) -> Self:
        """The delta times a number."""
        return self._replace(a=self.a * number)


def _double(array: Any) -> np.ndarray:
    wide = np.complex128 if jnp.issubdtype(array.dtype, jnp.complexfloating) else np.float64
    return np.asarray(array).astype(wide)


def _beside(value: np.ndarray, like: Any) -> jax.Array:
    """Returns an array with the dtype and the sharding of another one."""
    array = jnp.asarray(value.astype(like.dtype))
    placed = isinstance(like, jax.Array) and like.committed
    return jax.device_put(array, like.sharding) if placed else array


def plus(matrices: Iterable[Matrices]) -> Matrices:
    """Returns the sum of deltas; its rank is the sum of their ranks."""
    # [a1 a2] @ [b1; b2]  =  a1 b1 + a2 b2
    a, b = zip(*matrices, strict=True)
    return Matrices(np.concatenate(a, 2), np.concatenate(b, 1))


def _core(matrices: Matrices) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns Q_a, core and Q_b with `a b = Q_a core Q_bᵀ`."""
    # a b = Q_a R_a (Q_b R_b)ᵀ = Q_a (R_a R_bᵀ) Q_bᵀ. The core R_a R_bᵀ is at most rank × rank and
    # has the singular values of the product, because Q_a and Q_b are orthonormal.
    q_a, r_a = np.linalg.qr(matrices.a)  # [entries, in, k] [entries, k, rank]
    q_b, r_b = np.linalg.qr(np.swapaxes(matrices.b, 1, 2))  # [entries, out, l] [entries, l, rank]
    return q_a, r_a @ np.swapaxes(r_b, 1, 2), q_b


def singular_values(matrices: Matrices) -> np.ndarray:
    """Returns the singular values of each delta, descending: [entries, min(in, rank, out)]."""
    return np.linalg.svd(_core(matrices)[1], compute_uv=False)


def relative_error(actual: Matrices, expected: Matrices) -> float:
    """Returns `‖actual − expected‖ / ‖expected‖` in the Frobenius norm; 0 if both are zero."""
    size = float(np.linalg.norm(_core(expected)[1]))
    # The norm of the core is that of the product, so no [in, out] is formed.
    error = float(np.linalg.norm(_core(plus([actual, expected.times(-1)]))[1]))
    return error / size if size else math.copysign(math.inf, error) if error else 0.0


def truncated(matrices: Matrices, rank: int) -> Matrices:
    """Returns the best approximation of a rank: orthonormal `a`, singular values in `b`."""
    q_a, core, q_b = _core(matrices)
    left, values, right = np.linalg.svd(core, full_matrices=False)
    a = q_a @ left[:, :, :rank]  # [entries, in, k] [entries, k, rank] -> [entries, in, rank]
    b = (values[:, :, None] * right)[:, :rank] @ np.swapaxes(q_b, 1, 2)  # [entries, rank, out]
    # If the requested rank exceeds that of the core, the factors are padded with zeros.
    missing = max(rank - a.shape[2], 0)
    a = np.pad(a, ((0, 0), (0, 0), (0, missing)))
    b = np.pad(b, ((0, 0), (0, missing), (0, 0)))
    return Matrices(a, b)


def rank_for(values: Any, square: Any, energy: float) -> int:
    """Returns the lowest rank that keeps a fraction of the energy in every entry.

    Args:
        values: the singular values of each entry, descending: [entries, k].
        square: the sum of all squared singular values: [entries].
        energy: the fraction to keep, from 0 to 1.
    """
    # The energy of rank k is Σ σ² of the first k values, over that of all.
    squares = np.asarray(values, np.float64) ** 2
    kept = np.cumsum(squares, axis=1)  # [entries, k]
    # The tolerance keeps rounding in the sums from demanding one rank more.
    enough = kept >= energy * np.asarray(square, np.float64)[:, None] * (1 - 1e-12)
    ranks = np.where(enough.any(axis=1), enough.argmax(axis=1) + 1, squares.shape[1])
    return int(ranks.max())


def energy_of(function: str, energy: float | None, tolerance: float | None) -> float | None:
    """Returns the fraction of the energy to keep, given it or a relative error as `tolerance`."""
    for name, value in (("energy", energy), ("tolerance", tolerance)):
        if value is not None and not 0 <= value <= 1:
            raise ArgumentError(
                f"{function}: {name} is {value!r}; it must be a number from 0 to 1."
            )
    if energy is not None and tolerance is not None:
        raise ArgumentError(f"{function}: give energy or tolerance; energy is 1 − tolerance².")
    return energy if tolerance is None else 1 - tolerance**2


def matrices_of_term(term: Term, axes: Axes) -> Matrices:
    """Returns a term as two matrices.

    A factor that runs along inputs and outputs goes to one side. Its labels of the other side
    become part of the rank, and an identity joins them to the axis there:

        d[ρ, o]  =  Σ_ρ' eye[ρ, ρ'] · d[ρ', o]
    """
    shared, inputs, outputs = (
        tuple(label for d in group for label in term.out[d]) for group in axes
    )
    copies: dict[Label, Label] = {}

    def on_a_side(own: Labels) -> tuple[bool, Labels]:
        """Returns whether a factor goes to the left matrix, and its labels there."""
        met, made = ([x for x in own if x in group] for group in (inputs, outputs))
        # A factor of inputs goes to the left matrix, a factor of outputs to the right. A factor
        # of both goes to the side where it is larger, and its labels of the other side are
        # replaced by copies.
        is_left = bool(met) and (not made or _count(made) < _count(met))
        moved = made if is_left else met
        for label in moved:
            # One copy per label, shared by all factors that own it.
            copies.setdefault(label, term.fresh(label.size, len(copies)))
        return is_left, tuple(copies[x] if x in moved else x for x in own)

    sides: dict[bool, list[tuple[np.ndarray, Labels]]] = {True: [], False: []}
    for factor, own in zip(term.factors, term.labels, strict=True):
        is_left, labels = on_a_side(own)
        sides[is_left].append((_double(factor), labels))
    for label, copy in copies.items():
        # eye[label, copy] goes to the side of the label; the copy is part of the rank.
        sides[label in inputs].append((np.eye(label.size), (label, copy)))
    on_left, on_right = ({x for _, own in sides[side] for x in own} for side in (True, False))
    # The rank consists of the labels that both sides have and no axis shows.
    rank = tuple(sorted(on_left & on_right - {*shared, *inputs, *outputs}))
    entries, fan_in, fan_out, width = map(_count, (shared, inputs, outputs, rank))
    a = _product(sides[True], (*shared, *inputs, *rank))
    b = _product(sides[False], (*shared, *rank, *outputs))
    return Matrices(a.reshape(entries, fan_in, width), b.reshape(entries, width, fan_out))


def _count(labels: Sequence[Label]) -> int:
    return math.prod(label.size for label in labels)


def _product(factors: Sequence[tuple[np.ndarray, Labels]], wanted: Labels) -> np.ndarray:
    """Returns the einsum of factors, broadcast along labels that none of them owns."""
    # `np.einsum` takes axes as integers, so each label gets a number.
    owned = {label for _, own in factors for label in own}
    number = {label: k for k, label in enumerate([*wanted, *sorted(owned - {*wanted})])}
    operands: list[Any] = []
    for factor, own in factors:
        operands += [factor, [number[label] for label in own]]
    out_numbers = [number[label] for label in wanted if label in owned]
    # [*owned] -> broadcast to [*wanted]
    array = np.einsum(*operands, out_numbers, optimize=True) if operands else np.ones(())
    shape = [label.size if label in owned else 1 for label in wanted]
    return np.broadcast_to(array.reshape(shape), [label.size for label in wanted])
