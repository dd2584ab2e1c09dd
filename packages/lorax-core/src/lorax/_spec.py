"""What to do with each parameter: the spec tree, and ways to make one.

A spec is a tree with the structure of the parameters whose leaves are `LORA_FREEZE`, `LORA_FULL`,
a rank, or a `LoraSpec`.
"""

import dataclasses
import fnmatch
import math
import numbers
import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ._axes import Axes, resolve_axes
from ._errors import RankWarning, SpecError
from ._pair import flatten_params, is_array, path_string
from ._statics import make_plain, plain_number
from ._weight import Scaling

LORA_FREEZE = 0
"""The parameter is not trained."""

LORA_FULL = -1
"""The parameter is trained in full, without factors."""


@dataclasses.dataclass(frozen=True)
class LoraSpec:
    """How one weight is adapted.

    Args:
        rank: the inner size of the factors.
        alpha: the delta is `alpha / rank · a @ b`; None means `alpha = rank`, a scale of 1.
        scaling: "standard", or "rslora" for `alpha / √rank` (arXiv:2312.03732).
        in_axes: the axes that meet the input; None means every axis but the outputs.
        out_axes: the axes that make the output; None means the rest, or the last axis where
            `in_axes` is None too.
        shared_axes: axes with factors of their own for each entry, such as the layers of a
            `scan` or the experts of a mixture.

    Example:
        >>> from lorax import LoraSpec
        >>> LoraSpec(rank=8, alpha=16)                     # a kernel (in, out)
        LoraSpec(rank=8, alpha=16, scaling='standard', in_axes=None, out_axes=None, shared_axes=())
        >>> attention_query = LoraSpec(rank=8, in_axes=[0])   # (D, H, K) with input D
        >>> scanned_layers = LoraSpec(rank=8, shared_axes=[0])   # (layer, in, out)
    """

    rank: int
    alpha: float | None = None
    scaling: Scaling = "standard"
    in_axes: Sequence[int] | None = None
    out_axes: Sequence[int] | None = None
    shared_axes: Sequence[int] = ()

    def __post_init__(self) -> None:
        make_plain(self)
        for name in ("in_axes", "out_axes", "shared_axes"):
            axes = getattr(self, name)
            if not isinstance(axes, tuple | None) or (name == "shared_axes" and axes is None):
                raise SpecError(f"LoraSpec has {name}={axes!r}; axes are a sequence of ints.")


SpecLeaf = int | LoraSpec
Pattern = str | re.Pattern[str] | Callable[[str], bool]


def matches(pattern: Pattern, path: str) -> bool:
    """Whether a glob (a string), a compiled regular expression or a callable accepts a path.

    In a glob `*` also matches `/`; a regular expression may match anywhere in the path.
    """
    if isinstance(pattern, str):
        return fnmatch.fnmatchcase(path, pattern)
    if isinstance(pattern, re.Pattern):
        return pattern.search(path) is not None
    return bool(pattern(path))


def simple_spec(
    params: Any,
    decision_fn: Callable[[str, Any], SpecLeaf] | None = None,
    tune_vectors: bool = False,
    is_leaf: Callable[[Any], bool] | None = None,
) -> Any:
    """A spec from a function of path and array.

    Args:
        params: the parameters.
        decision_fn: called as `decision_fn("h/0/attn/c_attn/kernel", array)` for every array of
            two or more axes; returns a rank, `LORA_FREEZE`, `LORA_FULL` or a `LoraSpec`.
        tune_vectors: whether arrays of fewer axes are trained in full; else they are frozen.
        is_leaf: as in `jax.tree.map`.

    Returns:
        The spec tree.

    Example:
        >>> import jax.numpy as jnp
        >>> from lorax import LORA_FREEZE, simple_spec
        >>> params = {"attn": {"kernel": jnp.ones((4, 4))}, "head": jnp.ones((4, 9))}
        >>> simple_spec(params, lambda path, array: 2 if "attn" in path else LORA_FREEZE)
        {'attn': {'kernel': 2}, 'head': 0}
    """

    def decide(key_path: Any, leaf: Any) -> SpecLeaf:
        if not hasattr(leaf, "ndim"):
            return LORA_FREEZE
        if leaf.ndim < 2:
            trained = tune_vectors and jnp.issubdtype(leaf.dtype, jnp.inexact)
            return LORA_FULL if trained else LORA_FREEZE
        return LORA_FREEZE if decision_fn is None else decision_fn(path_string(key_path), leaf)

    return jax.tree_util.tree_map_with_path(decide, params, is_leaf=is_leaf)


def spec_from_rules(
    params: Any, rules: Sequence[tuple[Pattern, SpecLeaf]], default: SpecLeaf = LORA_FREEZE
) -> Any:
    """A spec from patterns on the path; the first that matches wins.

    Args:
        params: the parameters.
        rules: pairs of a pattern and what to do with the parameters it matches. A pattern is a
            glob such as `"*/attn/*/kernel"` (where `*` also matches `/`), a compiled regular
            expression that may match anywhere, or a callable on the path.
        default: for arrays that no pattern matches.

    Returns:
        The spec tree.

    Raises:
        SpecError: where a pattern decides no parameter.

    Example:
        >>> import jax.numpy as jnp
        >>> from lorax import LORA_FULL, spec_from_rules
        >>> params = {"q": {"kernel": jnp.ones((4, 4)), "bias": jnp.ones(4)}}
        >>> spec_from_rules(params, [("q/kernel", 2), ("*bias", LORA_FULL)])
        {'q': {'bias': -1, 'kernel': 2}}
    """
    used = [False] * len(rules)
    shadowed: list[list[str]] = [[] for _ in rules]
    leaves, _ = flatten_params(params)

    def decide(path: str, leaf: Any) -> SpecLeaf:
        if not is_array(leaf):
            return LORA_FREEZE
        decided: SpecLeaf | None = None
        for k, (pattern, value) in enumerate(rules):
            if not matches(pattern, path):
                continue
            if decided is None:
                decided, used[k] = value, True
            else:
                shadowed[k].append(path)
        return default if decided is None else decided

    spec = jax.tree_util.tree_map_with_path(
        lambda key_path, leaf: decide(path_string(key_path), leaf), params
    )
    for k, (pattern, _) in enumerate(rules):
        if used[k]:
            continue
        reason = (
            f"earlier rules decide all that it matches (such as `{shadowed[k][0]}`)"
            if shadowed[k]
            else f"the paths are {some([path for path, leaf in leaves if is_array(leaf)])}"
        )
        raise SpecError(f"Rule {shown(pattern)} decides no parameter: {reason}.")
    return spec


def shown(pattern: Pattern) -> str:
    """A pattern as the user wrote it, for a message."""
    return repr(pattern.pattern if isinstance(pattern, re.Pattern) else pattern)


def some(paths: Sequence[str], count: int = 8) -> str:
    """The first of some paths, for a message."""
    shown = ", ".join(f"`{path}`" for path in paths[:count])
    return shown if len(paths) <= count else f"{shown} and {len(paths) - count} more"


def _is_finite(alpha: Any) -> bool:
    return isinstance(alpha, numbers.Real) and math.isfinite(alpha)


def check_leaf(path: str, leaf: Any, spec: Any) -> tuple[LoraSpec, Axes] | int:
    """A spec leaf that fits its parameter: LORA_FREEZE, LORA_FULL, or the spec and its axes."""
    spec = plain_number(spec)
    if not is_array(leaf):
        if spec is None or (type(spec) is int and spec == LORA_FREEZE):
            return LORA_FREEZE
        raise SpecError(f"`{path}` is {type(leaf).__name__}, not an array; give it LORA_FREEZE.")
    if isinstance(spec, LoraSpec):
        rank = spec.rank
        if type(rank) is int and rank < 1:
            raise SpecError(
                f"`{path}` has a LoraSpec of rank {rank}; ranks begin at 1. To freeze it give it "
                "LORA_FREEZE, to train it in full LORA_FULL."
            )
    elif type(spec) is int:
        rank = spec
    else:
        raise SpecError(
            f"`{path}` has the spec {spec!r}; a spec is LORA_FREEZE, LORA_FULL, a rank as an int, "
            "or a LoraSpec."
        )
    if rank == LORA_FREEZE:
        return LORA_FREEZE
    if type(rank) is not int or (rank < 0 and rank != LORA_FULL):
        raise SpecError(
            f"`{path}` has rank {rank!r}; a rank is a positive int (LORA_FREEZE is 0, "
            "LORA_FULL is -1)."
        )
    if not jnp.issubdtype(leaf.dtype, jnp.inexact):
        raise SpecError(f"`{path}` holds {leaf.dtype}, which has no gradient; give it LORA_FREEZE.")
    if rank == LORA_FULL:
        return LORA_FULL
    if leaf.ndim < 2:
        raise SpecError(
            f"`{path}` has {leaf.ndim} {'dimension' if leaf.ndim == 1 else 'dimensions'}, so it "
            f"cannot take rank {rank}; give it LORA_FREEZE or LORA_FULL."
        )
    spec = spec if isinstance(spec, LoraSpec) else LoraSpec(rank)
    if spec.scaling not in ("standard", "rslora"):
        raise SpecError(f"`{path}` has scaling {spec.scaling!r}; it is 'standard' or 'rslora'.")
    if spec.alpha is not None and not _is_finite(spec.alpha):
        raise SpecError(f"`{path}` has alpha {spec.alpha!r}; it is a finite number or None.")
    axes = resolve_axes(path, leaf.ndim, spec.in_axes, spec.out_axes, spec.shared_axes)
    fan_in, fan_out = axes.sizes(leaf.shape)
    if rank > min(fan_in, fan_out):
        warnings.warn(
            f"`{path}` has shape {tuple(leaf.shape)}: a matrix of {fan_in} inputs × {fan_out} "
            f"outputs, whose rank is at most {min(fan_in, fan_out)}. An adapter of rank {rank} has "
            "more numbers than it and can do no more. Lower the rank, or give it LORA_FULL.",
            RankWarning,
            stacklevel=3,
        )
    return spec, axes
