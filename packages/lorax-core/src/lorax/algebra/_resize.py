"""Lowers the rank of adapters, and converts other kinds to plain LoRA."""

from typing import Any

import jax
import jax.numpy as jnp

from .._adapter import Adapter
from .._errors import ArgumentError, PairError
from .._pair import ABSENT, Leaf, flatten_pair, two_trees
from ..kinds.lora import LoraWeight
from ._matrices import (
    Approximation,
    Matrices,
    energy_of,
    flatten_adapters,
    matrices_of_term,
    plus,
    rank_for,
    relative_error,
    singular_values,
    truncated,
)


def resize_adapter(
    tunable: Any,
    rank: int | None = None,
    *,
    energy: float | None = None,
    tolerance: float | None = None,
) -> Approximation:
    """Returns LoRA adapters of a lower rank: the best approximation of each delta.

        Δ = U S Vᵀ,    Δ_r = U[:, :r] · S[:r] V[:, :r]ᵀ,    ‖Δ − Δ_r‖² = Σ_{k ≥ r} S_k²

    The delta is never formed: a QR decomposition of both factors leaves a matrix of rank × rank.
    The scale of each adapter is kept.

    Args:
        tunable: the tunable tree of a pair.
        rank: the rank of each result. Adapters of this rank or a lower one are unchanged.
        energy: the fraction of `‖Δ‖²` to keep in each entry of the shared axes, from 0 to 1: each
            weight gets the lowest rank that does so, and with `rank` at most that rank.
        tolerance: the same as `energy = 1 − tolerance²`.

    Returns:
        The tree, with fully trained parameters unchanged, and the relative error of each path.

    Raises:
        ArgumentError: if neither a rank nor an energy is given, or one is out of range.
        PairError: for an adapter that is not plain LoRA.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from lorax import init_lora, resize_adapter
        >>> params = {"w": jnp.ones((30, 20))}
        >>> _, tunable = init_lora(params, {"w": 8}, jax.random.key(0), b_init="gaussian")
        >>> smaller, errors = resize_adapter(tunable, 4)
        >>> smaller["w"].rank, 0 < errors["w"] < 1
        (4, True)
    """
    share = energy_of("resize_adapter", energy, tolerance)
    if rank is None and share is None:
        raise ArgumentError("resize_adapter: give a rank, an energy or a tolerance.")
    if rank is not None and (type(rank) is not int or rank < 1):
        raise ArgumentError(f"resize_adapter: rank is {rank!r}; it must be a positive int.")
    leaves, structure = flatten_adapters(tunable)
    errors: dict[str, float] = {}
    resized = [
        _resized(path, leaf, rank, share, errors) if isinstance(leaf, Adapter) else leaf
        for path, leaf in leaves
    ]
    return Approximation(jax.tree.unflatten(structure, resized), errors)


def _resized(
    path: str, weight: Any, rank: int | None, energy: float | None, errors: dict[str, float]
) -> LoraWeight:
    if not isinstance(weight, LoraWeight):
        raise PairError(
            f"resize_adapter: the adapter at `{path}` is {weight.kind}, but only plain LoRA can "
            "be resized. `as_lora` converts other kinds to it if that is exact."
        )
    matrices = Matrices.of(weight)
    # A rank is never raised.
    most = weight.rank if rank is None else min(rank, weight.rank)
    if energy is not None:
        values = singular_values(matrices)  # [entries, rank]
        most = min(most, rank_for(values, (values**2).sum(1), energy))
    # A weight whose rank need not be lowered keeps its exact factors.
    resized = weight if most == weight.rank else truncated(matrices, most).into(weight)
    errors[path] = relative_error(Matrices.of(resized), matrices)
    return resized


def as_lora(frozen: Any, tunable: Any = ABSENT) -> Any:
    """Converts adapters of other kinds to plain LoRA, if that is exact.

    The delta of most kinds has a low rank: `rank` for VeRA, LoRA-FA, AdaLoRA, DeLoRA and MiSS,
    `rank²` for LoHa, `rank · blocks` for GraLoRA, and that of the second factor times the first
    one's size for LoKr.

    Args:
        frozen: the frozen tree of the pair, or the whole `Pair`.
        tunable: the tunable tree of the pair.

    Returns:
        The tunable tree, with a scale of 1 in each converted adapter. It needs only the base, and
        no frozen factors.

    Raises:
        PairError: for DoRA and IA³, which multiply the weight, and for an adapter whose rank is
            that of the weight. `extract_lora` finds the best adapter of a rank for these.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from lorax import MissSpec, as_lora, init_lora
        >>> pair = init_lora({"w": jnp.ones((6, 4))}, {"w": MissSpec(3)}, jax.random.key(0))
        >>> as_lora(pair)["w"].a.shape
        (6, 3)
    """
    frozen, tunable = two_trees(frozen, tunable, "as_lora")
    leaves, structure = flatten_pair(frozen, tunable, "as_lora")
    converted = [_converted(leaf) if leaf.is_adapted else leaf.tunable for leaf in leaves]
    return jax.tree.unflatten(structure, converted)


def _converted(leaf: Leaf) -> LoraWeight:
    weight: Any = leaf.tunable
    if isinstance(weight, LoraWeight):
        return weight

    def refuse(why: str) -> PairError:
        return PairError(
            f"as_lora: the {weight.kind} adapter at `{leaf.path}` {why}, so no LoRA equals it. "
            "`extract_lora(params, merge_params(pair), spec)` finds the best approximation of a "
            "given rank."
        )

    adapted = leaf.applied()
    if not adapted.is_sum:
        raise refuse("multiplies the weight")
    # [entries, in, rank] and [entries, rank, out], whose rank is the sum over all terms.
    matrices = plus(matrices_of_term(term, weight.axes) for term in adapted.terms)
    rank, most = matrices.a.shape[2], min(weight.axes.sizes(leaf.frozen.shape))
    # Two factors of full rank would have at least as many numbers as the weight itself.
    if rank >= most:
        raise refuse(f"has a delta of rank {rank} on a weight whose rank is {most}")
    dtype = jnp.result_type(*weight.factors().values())
    shared, inputs, outputs = weight.axes
    blank = LoraWeight(None, None, rank, in_axes=inputs, out_axes=outputs, shared_axes=shared)
    shapes = blank.layout(leaf.frozen.shape).shapes()
    return blank.with_factors(
        {
            name: jnp.asarray(factor.astype(dtype).reshape(shapes[name]))
            for name, factor in matrices._asdict().items()
        }
    )
