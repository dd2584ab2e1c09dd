"""Combines several adapters of one base into one."""

import dataclasses
import math
import numbers
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .._adapter import Adapter
from .._errors import ArgumentError, PairError, SpecError
from ..kinds.lora import LoraWeight
from ._matrices import Approximation, Matrices, flatten_adapters, plus, relative_error, truncated


class Method(NamedTuple):
    """How entries of factors or deltas are merged.

    Attributes:
        prune: which entries are dropped first: "magnitude", "random" or None.
        elects: whether entries with the minority sign are dropped next, and the rest averaged.
    """

    prune: str | None
    elects: bool


METHODS = {
    "linear": Method(None, False),
    "magnitude_prune": Method("magnitude", False),
    "ties": Method("magnitude", True),
    "dare_linear": Method("random", False),
    "dare_ties": Method("random", True),
}
"""Methods that act entrywise, on both factors, or on deltas with the suffix `_svd`."""


class _Options(NamedTuple):
    method: str
    rank: int | None
    density: float
    signs: str
    key: jax.Array | None


def combine_adapters(
    adapters: Mapping[str, tuple[Any, float]],
    method: str = "concatenate",
    *,
    rank: int | None = None,
    density: float | None = None,
    signs: str = "total",
    key: jax.Array | None = None,
) -> Approximation:
    """Combines LoRA adapters of one base into a single one, with a weight for each.

        delta  =  Σ_k weight_k · delta_k                       "concatenate": exact, ranks added
        delta  =  best approximation of that sum, of one rank  "svd"
        a = Σ_k √|w_k| sign(w_k) a_k,   b = Σ_k √|w_k| b_k     "linear", w_k = weight_k · scale_k

    "linear" needs equal ranks and differs from the sum of the deltas, by the errors that are
    returned. The other methods act on the entries of both factors like "linear", but drop some
    first. "magnitude_prune" keeps the largest entries, and "dare_linear" keeps random ones and
    divides them by `density` (Yu et al. 2023, arXiv:2311.03099). "ties" and "dare_ties" then drop
    entries with the minority sign and average the rest (Yadav et al. 2023, arXiv:2306.01708). With
    the suffix "_svd", a method acts on the deltas, one weight at a time, and the result is the best
    approximation of rank `rank`. The methods are those of PEFT's `add_weighted_adapter`.

    A weight that only some of the trees adapt is combined from those.

    Args:
        adapters: by name, a tunable tree and its weight, any finite number.
        method: "concatenate", "svd", "linear", "magnitude_prune", "ties", "dare_linear",
            "dare_ties", or one of the last four with the suffix "_svd".
        rank: the rank of the result, for "svd" and "…_svd"; by default, for each weight, the
            highest of its ranks.
        density: the fraction of entries that pruning methods keep, above 0 and at most 1.
        signs: how "ties" and "dare_ties" find the majority sign: by the "total" of the values, or
            by the "frequency" of each sign.
        key: a PRNG key, for "dare_linear" and "dare_ties".

    Returns:
        The combined tree, with a scale of 1 in each adapter, and by path the relative error of its
        delta against `Σ weight · delta`.

    Raises:
        ArgumentError: for invalid settings.
        PairError: if the trees are not adapters of one base, are not plain LoRA, or several of
            them train one parameter in full.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from lorax import combine_adapters, init_lora
        >>> params, keys = {"w": jnp.ones((5, 4))}, jax.random.split(jax.random.key(0))
        >>> one, two = (init_lora(params, {"w": 2}, key, b_init="gaussian")[1] for key in keys)
        >>> both, errors = combine_adapters({"one": (one, 0.7), "two": (two, 0.3)})
        >>> both["w"].a.shape, errors["w"] < 1e-6
        ((5, 4), True)
    """
    options = _check(adapters, method, rank, density, signs, key)
    names = list(adapters)
    flat = [flatten_adapters(tree) for tree, _ in adapters.values()]
    structure = flat[0][1]
    for name, (_, other) in zip(names, flat, strict=True):
        if other != structure:
            raise PairError(
                f"combine_adapters: the tree of {name!r} has the structure {other}, but that of "
                f"{names[0]!r} has {structure}. Both must be for the same base."
            )
    weights = [float(weight) for _, weight in adapters.values()]
    errors: dict[str, float] = {}
    combined = []
    for leaves in zip(*(leaves for leaves, _ in flat), strict=True):
        parts = [
            _Part(name, weight, leaf)
            for name, weight, (_, leaf) in zip(names, weights, leaves, strict=True)
            if leaf is not None
        ]
        combined.append(_combined(leaves[0][0], parts, options, errors))
    return Approximation(jax.tree.unflatten(structure, combined), errors)


class _Part(NamedTuple):
    """The leaf of one of the trees at some path, with the name and the weight of the tree."""

    name: str
    weight: float
    leaf: Any


def _check(adapters: Any, method: str, rank: Any, density: Any, signs: str, key: Any) -> _Options:
    def refuse(why: str) -> ArgumentError:
        return ArgumentError(f"combine_adapters: {why}")

    if not isinstance(adapters, Mapping):
        raise ArgumentError(
            f"combine_adapters takes a mapping from names to (adapter, weight), not "
            f"{type(adapters).__name__}."
        )
    if not adapters:
        raise refuse("there are no adapters to combine.")
    for name, weight in ((name, weight) for name, (_, weight) in adapters.items()):
        if not isinstance(weight, numbers.Real) or not math.isfinite(weight):
            raise refuse(f"the weight of {name!r} is {weight!r}; it must be a finite number.")
    entrywise = METHODS.get(method.removesuffix("_svd"))
    if method not in ("concatenate", "svd") and (entrywise is None or method == "linear_svd"):
        pruning = [name for name in METHODS if name != "linear"]
        known = ["concatenate", "svd", *METHODS, *(f"{name}_svd" for name in pruning)]
        raise refuse(f"method={method!r} is not one of {', '.join(known)}.")
    if rank is not None and not method.endswith("svd"):
        raise refuse(f"rank={rank} is only for methods that end in 'svd', not for {method!r}.")
    if rank is not None and (type(rank) is not int or rank < 1):
        raise refuse(f"rank={rank!r}; it must be a positive int.")
    prunes = entrywise is not None and entrywise.prune is not None
    if prunes and (density is None or not 0 < density <= 1):
        raise refuse(f"{method!r} needs a density above 0 and at most 1, not {density!r}.")
    if not prunes and density is not None:
        raise refuse(f"{method!r} prunes nothing; leave density={density!r} out.")
    if signs not in ("total", "frequency"):
        raise refuse(f"signs={signs!r}; it must be 'total' or 'frequency'.")
    if entrywise is not None and entrywise.prune == "random" and key is None:
        raise refuse(f"{method!r} drops random entries, so it needs `key`.")
    return _Options(method, rank, 1.0 if density is None else float(density), signs, key)


def _combined(
    path: str, parts: Sequence[_Part], options: _Options, errors: dict[str, float]
) -> Any:
    if not parts:
        return None
    if not any(isinstance(part.leaf, Adapter) for part in parts):
        return _parameter(path, parts)
    for part in parts:
        _check_part(path, part, parts[0])
    like: LoraWeight = parts[0].leaf
    matrices = [Matrices.of(part.leaf) for part in parts]
    # Σ_k w_k Δ_k exactly, as [w1 a1, w2 a2, …] · [b1; b2; …], whose rank is the sum of the ranks
    wanted = plus(m.times(part.weight) for m, part in zip(matrices, parts, strict=True))
    if options.method == "concatenate":
        product = wanted
    else:
        rank = options.rank or max(part.leaf.rank for part in parts)
        if options.method == "svd":
            product = truncated(wanted, rank)
        elif options.method.endswith("_svd"):
            product = _of_deltas(path, parts, matrices, rank, options)
        else:
            product = _of_factors(path, parts, options)
    # Adapters may have different dtypes: the result has the widest.
    dtype = jnp.result_type(*(x for part in parts for x in (part.leaf.a, part.leaf.b)))
    # A scale of 1: the scales of the parts are in the product.
    plain = dataclasses.replace(
        like, a=like.a.astype(dtype), b=like.b.astype(dtype), alpha=None, scaling="standard"
    )
    combined = product.into(plain)
    errors[path] = relative_error(Matrices.of(combined), wanted)
    return combined


def _parameter(path: str, parts: Sequence[_Part]) -> Any:
    """Returns a fully trained parameter, which is not a delta and therefore cannot be summed."""
    if len(parts) > 1:
        names = ", ".join(repr(part.name) for part in parts)
        raise PairError(
            f"combine_adapters: {names} train `{path}` in full, but only deltas can be combined. "
            "Use `extract_lora` on it, or set it to None in all trees but one."
        )
    if parts[0].weight != 1:
        raise PairError(
            f"combine_adapters: {parts[0].name!r} trains `{path}` in full and has the weight "
            f"{parts[0].weight}; a parameter without its base cannot be scaled. Give it the weight "
            "1, set the parameter to None, or use `extract_lora` on it."
        )
    return parts[0].leaf


def _check_part(path: str, part: _Part, first: _Part) -> None:
    if not isinstance(part.leaf, LoraWeight):
        kind = part.leaf.kind if isinstance(part.leaf, Adapter) else "full parameter"
        raise PairError(
            f"combine_adapters: {part.name!r} has a {kind} at `{path}`, but only plain LoRA can "
            "be combined. `as_lora` converts other kinds to it if that is exact; otherwise, use "
            "`extract_lora`."
        )
    mine, other = (_fans(leaf.leaf) for leaf in (part, first))
    if (part.leaf.axes, mine) != (first.leaf.axes, other):
        raise PairError(
            f"combine_adapters: `{path}` has {part.leaf.axes} of sizes {mine} in {part.name!r} "
            f"and {first.leaf.axes} of sizes {other} in {first.name!r}. All adapters must be for "
            "the same base."
        )


def _fans(weight: LoraWeight) -> tuple[tuple[int, ...], tuple[int, ...]]:
    shared = len(weight.shared_axes)
    return tuple(weight.a.shape[:-1]), tuple(weight.b.shape[shared + 1 :])


def _of_factors(path: str, parts: Sequence[_Part], options: _Options) -> Matrices:
    """Merges both factors entry by entry, as if they were deltas."""
    ranks = {part.name: part.leaf.rank for part in parts}
    if len(set(ranks.values())) > 1:
        listed = ", ".join(f"{name!r} has {rank}" for name, rank in ranks.items())
        raise ArgumentError(
            f"combine_adapters: {options.method!r} adds factors, which needs equal ranks, but at "
            f"`{path}` {listed}. Use 'concatenate' or 'svd'"
            + (f", or '{options.method}_svd'." if options.method != "linear" else ".")
        )
    # The scales are part of the weights instead, whose root goes to each of the two factors.
    bare = [Matrices.of(dataclasses.replace(p.leaf, alpha=None, scaling="standard")) for p in parts]
    scales = np.asarray([part.weight * part.leaf.scale for part in parts])
    # w · scale = (±√|w · scale|) · √|w · scale|: a takes the sign
    roots = np.sqrt(np.abs(scales))
    a = _merge(np.stack([m.a for m in bare]), roots * np.sign(scales), parts, f"{path}/a", options)
    b = _merge(np.stack([m.b for m in bare]), roots, parts, f"{path}/b", options)
    return Matrices(a, b)


def _of_deltas(
    path: str, parts: Sequence[_Part], matrices: Sequence[Matrices], rank: int, options: _Options
) -> Matrices:
    # This forms [in, out]: methods that act on entries of deltas need all of them.
    deltas = np.stack([m.a @ m.b for m in matrices])  # [adapters, entries, in, out]
    weights = np.asarray([part.weight for part in parts])
    merged = _merge(deltas, weights, parts, path, options)  # [entries, in, out]
    # As the product I [entries, in, in] · merged [entries, in, out], for `truncated`.
    identity = np.broadcast_to(np.eye(merged.shape[1]), (merged.shape[0], *[merged.shape[1]] * 2))
    return truncated(Matrices(identity, merged), rank)


def _merge(
    stacked: np.ndarray, weights: np.ndarray, parts: Sequence[_Part], path: str, options: _Options
) -> np.ndarray:
    """Merges arrays entry by entry: [adapters, entries, m, n] -> [entries, m, n]."""
    method = METHODS[options.method.removesuffix("_svd")]
    if method.prune == "magnitude":
        stacked = _largest(stacked, int(options.density * stacked[0, 0].size))
    elif method.prune == "random":
        assert options.key is not None
        keys = [
            # A mask of its own for each adapter and each factor.
            jax.random.fold_in(options.key, zlib.crc32(f"{path}\n{part.name}".encode()))
            for part in parts
        ]
        kept = [jax.random.bernoulli(key, options.density, stacked.shape[1:]) for key in keys]
        # Kept entries are divided by the density, which leaves the expected value unchanged.
        stacked = np.where(np.stack(kept), stacked / options.density, 0)
    # [adapters, entries, m, n] ⊙ [adapters, 1, 1, 1]
    weighted = stacked * weights[:, None, None, None]
    if not method.elects:
        return weighted.sum(0)
    if np.iscomplexobj(stacked):
        raise SpecError(
            f"combine_adapters: `{path}` is complex, and {options.method!r} compares signs. Use a "
            "method that does not, such as 'concatenate' or 'linear'."
        )
    votes = np.sign(stacked) if options.signs == "frequency" else stacked
    # TIES: each entry elects a sign, and the mean is over the adapters that agree with it. The
    # votes are unweighted, as in PEFT.
    majority = np.where(votes.sum(0) >= 0, 1, -1)  # [entries, m, n]
    agrees = np.sign(stacked) == majority
    return (weighted * agrees).sum(0) / np.maximum(agrees.sum(0), 1)


def _largest(stacked: np.ndarray, keep: int) -> np.ndarray:
    """Zeroes all but the `keep` entries of largest magnitude in each matrix."""
    # The smallest entries are dropped; the stable sort makes ties deterministic.
    flat = stacked.reshape(*stacked.shape[:2], -1)  # [adapters, entries, m · n]
    dropped = np.argsort(np.abs(flat), axis=-1, kind="stable")[..., : flat.shape[-1] - keep]
    pruned = flat.copy()
    np.put_along_axis(pruned, dropped, 0, -1)
    return pruned.reshape(stacked.shape)
