"""Spec trees, which define how each parameter is trained, and functions that make them.

A spec has the structure of the parameters. Each leaf is `LORA_FREEZE`, `LORA_FULL`, a rank of plain
LoRA, or the spec of another kind of adapter, such as a `DoraSpec`.
"""

import fnmatch
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ._adapter_spec import AdapterSpec
from ._arrays import Encoded, is_array, path_string
from ._axes import Axes
from ._errors import ArgumentError, SpecError
from ._pair import flatten_params
from ._statics import plain_number
from .kinds.lora import LoraSpec

LORA_FREEZE = 0
"""The parameter is not trained."""

LORA_FULL = -1
"""The parameter is trained in full, without factors."""


SpecLeaf = int | AdapterSpec
Pattern = str | re.Pattern[str] | Callable[[str], bool]


def matches(pattern: Pattern, path: str) -> bool:
    """Whether a glob (a string), a compiled regular expression or a callable accepts a path.

    In a glob `*` also matches `/`; a regular expression may match anywhere in the path.
    """
    if isinstance(pattern, str):
        return fnmatch.fnmatchcase(path, pattern)
    if isinstance(pattern, re.Pattern):
        return pattern.search(path) is not None
    if not callable(pattern):
        raise ArgumentError(
            f"A filter on paths is a glob, a compiled regular expression or a callable, not "
            f"{pattern!r}."
        )
    return bool(pattern(path))


def simple_spec(
    params: Any,
    decision_fn: Callable[[str, Any], SpecLeaf] | None = None,
    tune_vectors: bool = False,
    is_leaf: Callable[[Any], bool] | None = None,
) -> Any:
    """Returns a spec that is decided by a function of path and array.

    Args:
        params: the parameters.
        decision_fn: called as `decision_fn("h/0/attn/c_attn/kernel", array)` for every array of
            two or more axes; returns a rank, `LORA_FREEZE`, `LORA_FULL` or a `LoraSpec`.
        tune_vectors: whether arrays of fewer axes are fully trained; otherwise they are frozen.
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
    """Returns a spec that is decided by patterns on paths; the first match wins.

    Args:
        params: the parameters.
        rules: pairs of a pattern and the spec of the parameters that it matches. A pattern is a
            glob such as `"*/attn/*/kernel"` (where `*` also matches `/`), a compiled regular
            expression that may match anywhere, or a callable on the path.
        default: the spec of arrays that no pattern matches.

    Returns:
        The spec tree.

    Raises:
        SpecError: if a rule matches no parameter.

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
            f"earlier rules match all of its paths (such as `{shadowed[k][0]}`)"
            if shadowed[k]
            else f"the paths are {some([path for path, leaf in leaves if is_array(leaf)])}"
        )
        raise SpecError(f"Rule {shown(pattern)} matches no parameter: {reason}.")
    return spec


def shown(pattern: Pattern) -> str:
    """Returns a pattern as the user wrote it, for a message."""
    return repr(pattern.pattern if isinstance(pattern, re.Pattern) else pattern)


def some(paths: Sequence[str], count: int = 8) -> str:
    """Lists the first of some paths, for a message."""
    shown = ", ".join(f"`{path}`" for path in paths[:count])
    return shown if len(paths) <= count else f"{shown} and {len(paths) - count} more"


def check_leaf(path: str, leaf: Any, spec: Any) -> tuple[AdapterSpec, Axes] | int:
    """Validates a spec leaf for its parameter.

    Returns:
        LORA_FREEZE, LORA_FULL, or the spec of an adapter and the roles of the axes.

    Raises:
        SpecError: if it does not fit.
    """
    spec = plain_number(spec)
    if not is_array(leaf):
        if spec is None or (type(spec) is int and spec == LORA_FREEZE):
            return LORA_FREEZE
        raise SpecError(f"`{path}` is {type(leaf).__name__}, not an array; give it LORA_FREEZE.")
    if not isinstance(spec, AdapterSpec | int) or isinstance(spec, bool):
        raise SpecError(
            f"`{path}` has the spec {spec!r}; a spec is LORA_FREEZE, LORA_FULL, a rank as an int, "
            "or a LoraSpec or another spec of an adapter."
        )
    if isinstance(spec, int) and spec == LORA_FREEZE:
        return LORA_FREEZE
    if isinstance(spec, int) and spec < 0 and spec != LORA_FULL:
        raise SpecError(
            f"`{path}` has rank {spec!r}; a rank is a positive int (LORA_FREEZE is 0, LORA_FULL is "
            "-1)."
        )
    if not jnp.issubdtype(leaf.dtype, jnp.inexact):
        raise SpecError(f"`{path}` holds {leaf.dtype}, which has no gradient; give it LORA_FREEZE.")
    if isinstance(spec, int):
        if spec == LORA_FULL and isinstance(leaf, Encoded):
            raise SpecError(
                f"`{path}` is quantized, and codes have no gradient; it cannot be LORA_FULL. Give "
                "it an adapter, or call dequantize on it first."
            )
        if spec == LORA_FULL:
            return LORA_FULL
        spec = LoraSpec(spec)
    if leaf.ndim < 2:
        raise SpecError(
            f"`{path}` has {leaf.ndim} {'dimension' if leaf.ndim == 1 else 'dimensions'}, so it "
            f"cannot take {spec.size and f'rank {spec.size}' or type(spec).__name__}; give it "
            "LORA_FREEZE or LORA_FULL."
        )
    axes = spec.axes(path, leaf.ndim)
    if 0 in axes.sizes(leaf.shape):
        raise SpecError(
            f"`{path}` has shape {tuple(leaf.shape)} and no entries to adapt; give it LORA_FREEZE."
        )
    spec.check(path, tuple(leaf.shape), axes)
    return spec, axes
