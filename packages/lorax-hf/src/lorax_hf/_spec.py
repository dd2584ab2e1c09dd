"""`spec`: which modules to adapt, in the words of PEFT."""

import dataclasses
import difflib
import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from lorax import (
    LORA_FREEZE,
    LORA_FULL,
    AdapterSpec,
    Axes,
    LoraSpec,
    SpecError,
    UnadaptedWarning,
    path_string,
)

from ._doctor import warn_of_defects
from ._modules import Parameter, ends_in, parameters_of
from ._presets import HEADS, TOKEN_TABLES

Targets = str | Sequence[str] | re.Pattern[str] | Callable[[str], bool]


def spec(
    model: Any,
    params: Any = None,
    *,
    rank: int | None = None,
    alpha: float | None = None,
    adapter: AdapterSpec | None = None,
    targets: Targets = "default",
    exclude: Targets | None = None,
    full: Sequence[str] = (),
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    layers: int | Sequence[int] | None = None,
    rslora: bool = False,
) -> Any:
    """A spec for `lorax.init_lora`, from the names that a model's modules have in PyTorch.

    Args:
        model: a Flax model of transformers, or its config.
        params: its parameters, of arrays or shapes; by default the model's own.
        rank: of every adapter, for plain LoRA; 8 by default.
        alpha: the delta is `alpha / rank · a @ b`; None means `alpha = rank`.
        adapter: instead of `rank`, `alpha` and `rslora`, the spec of any kind of adapter without
            axes, such as `lorax.DoraSpec(lorax.LoraSpec(8))`.
        targets: "default" (PEFT's choice for the architecture), "attention", "mlp", "all-linear"
            (all but the outputs of the task), "embeddings" (of tokens), a sequence of the ends of
            module names such as `["q_proj", "mlp.c_proj"]`, a regular expression for a whole name
            (a string), one for a part of it (compiled), or a function of the name.
        exclude: what not to adapt, in the same forms.
        full: the ends of the names of modules that are trained in full, such as `["classifier"]`.
        rank_pattern: other ranks, for kinds that have one, by a regular expression for the end of a
            name.
        alpha_pattern: other alphas of plain LoRA, by the same.
        layers: only modules in the layers of these indices.
        rslora: whether the scale is `alpha / √rank`.

    Returns:
        A tree with the structure of the parameters.

    Raises:
        SpecError: where a target matches nothing; the message has near misses.
        TypeError: where `adapter` meets an option that it replaces.

    Warns:
        UnadaptedWarning: where a kind of modules, such as "all-linear", has one with fewer inputs
            or outputs than the rank, such as a classifier of two classes, which stays frozen. A
            module that is asked for by its name gets the rank anyway.

    Example:
        >>> import jax, lorax, lorax_hf, transformers
        >>> config = transformers.GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=31)
        >>> spec = lorax_hf.spec(config, rank=2, alpha=4)
        >>> spec["h"]["0"]["attn"]["c_attn"]["kernel"]  # GPT-2 keeps (out, in)
        LoraSpec(rank=2, alpha=4, scaling='standard', in_axes=(1,), out_axes=(0,), shared_axes=())
    """
    kind = _kind(rank, alpha, rslora, adapter, rank_pattern, alpha_pattern)
    rows, params = parameters_of(model, params)
    warn_of_defects(model)
    by_path = {row.path: row for row in rows}
    chosen = _choose(rows, targets, "targets")
    left_out = set() if exclude is None else _choose(rows, exclude, "exclude")
    in_full = _choose(rows, full, "full", every=True) if full else set[str]()
    wanted = {layers} if isinstance(layers, int) else None if layers is None else set(layers)
    for name, patterns in (("rank_pattern", rank_pattern), ("alpha_pattern", alpha_pattern)):
        _check_patterns(rows, name, patterns or {})

    by_kind = isinstance(targets, str) and targets in _NAMED
    small: list[str] = []

    def decide(key_path: Any, _: Any) -> int | AdapterSpec:
        row = by_path[path_string(key_path)]
        if row.path in in_full:
            return LORA_FULL
        axes = row.axes
        adapted = row.path in chosen and row.path not in left_out and axes is not None
        if not adapted or (wanted is not None and _layer(row.module) not in wanted):
            return LORA_FREEZE
        assert axes is not None
        own_rank = _by_pattern(rank_pattern or {}, row.module, kind.size)
        fan_in, fan_out = (math.prod(row.leaf.shape[d] for d in group) for group in axes)
        if by_kind and own_rank is not None and own_rank > min(fan_in, fan_out):
            small.append(f"`{row.module}` ({fan_in} inputs × {fan_out} outputs)")
            return LORA_FREEZE
        own = kind
        if own_rank is not None and own_rank != kind.size:
            own = kind.with_size(own_rank)
        if isinstance(own, LoraSpec) and alpha_pattern:
            own_alpha = _by_pattern(alpha_pattern, row.module, own.alpha)
            own = dataclasses.replace(own, alpha=own_alpha)
        return own.with_axes(Axes((), *axes))

    tree = jax.tree_util.tree_map_with_path(decide, params)
    if small:
        warnings.warn(
            f"spec leaves modules frozen whose weights have no rank of {kind.size}: "
            f"{', '.join(small)}. Name such a module in `full` to train it, or in `exclude` to "
            "silence this.",
            UnadaptedWarning,
            stacklevel=2,
        )
    leaves = jax.tree.leaves(tree, is_leaf=lambda leaf: isinstance(leaf, AdapterSpec))
    if not any(isinstance(leaf, AdapterSpec) or leaf == LORA_FULL for leaf in leaves):
        raise SpecError(
            f"`exclude` and `layers` leave nothing of targets={_shown(targets)}; the layers are "
            f"{sorted({x for x in map(_layer, (row.module for row in rows)) if x is not None})}."
        )
    return tree


def _kind(
    rank: int | None,
    alpha: float | None,
    rslora: bool,
    adapter: AdapterSpec | None,
    rank_pattern: Mapping[str, int] | None,
    alpha_pattern: Mapping[str, float] | None,
) -> AdapterSpec:
    """The spec of every adapter, without axes."""
    if adapter is None:
        return LoraSpec(8 if rank is None else rank, alpha, "rslora" if rslora else "standard")
    given = {"rank": rank, "alpha": alpha, "rslora": rslora or None}
    if taken := [name for name, value in given.items() if value is not None]:
        raise TypeError(f"spec: `adapter` has its own settings; leave {taken[0]} out.")
    name = type(adapter).__name__
    if rank_pattern and adapter.size is None:
        raise TypeError(f"spec: rank_pattern needs a kind of adapter with a rank, not {name}.")
    if alpha_pattern and not isinstance(adapter, LoraSpec):
        raise TypeError(f"spec: alpha_pattern is for LoraSpec, not for {name}.")
    return adapter


def _choose(rows: list[Parameter], targets: Targets, what: str, every: bool = False) -> set[str]:
    """The paths that targets mean: of weights that can be adapted, or of every parameter."""
    able = rows if every else [row for row in rows if row.axes is not None]
    named = _NAMED.get(targets) if isinstance(targets, str) else None
    if named is not None:
        found = {row.path for row in able if named(row)}
        if not found:
            raise SpecError(f"{what}={targets!r}: this architecture has none. {_known(able)}")
        return found
    if isinstance(targets, str):
        pattern = re.compile(targets)
        accepts: Callable[[str], Any] = pattern.fullmatch
    elif isinstance(targets, re.Pattern):
        accepts = targets.search
    elif callable(targets):
        accepts = targets
    else:
        for end in targets:
            if not any(ends_in((end,), row.module) for row in able):
                raise SpecError(f"{what}: no module is called {end!r}. {_near(end, able)}")
        accepts = lambda module: ends_in(tuple(targets), module)  # noqa: E731
    found = {row.path for row in able if accepts(row.module)}
    if not found:
        raise SpecError(f"{what}={_shown(targets)} matches no module. {_near(str(targets), able)}")
    return found


# The choices that have a name, each a function of a parameter that can be adapted.
_NAMED: dict[str, Callable[[Parameter], bool]] = {
    "default": lambda row: ends_in(row.preset.default, row.module) and row.name == "kernel",
    "attention": lambda row: ends_in(row.preset.attention, row.module) and row.name == "kernel",
    "mlp": lambda row: (
        ends_in(row.preset.mlp, row.module) and not ends_in(row.preset.attention, row.module)
    ),
    "all-linear": lambda row: (
        row.name == "kernel" and len(row.leaf.shape) == 2 and not ends_in(HEADS, row.module)
    ),
    "embeddings": lambda row: ends_in(TOKEN_TABLES, row.module),
}


def _shown(targets: Any) -> str:
    return repr(targets.pattern if isinstance(targets, re.Pattern) else targets)


def _ends(rows: list[Parameter]) -> list[str]:
    return sorted({row.module.rpartition(".")[2] for row in rows})


def _known(rows: list[Parameter]) -> str:
    return f"Its modules end in: {', '.join(_ends(rows))}."


def _near(name: str, rows: list[Parameter]) -> str:
    found = difflib.get_close_matches(name.rpartition(".")[2], _ends(rows), n=3, cutoff=0.5)
    hint = f"Did you mean {' or '.join(map(repr, found))}? " if found else ""
    return f"{hint}{_known(rows)}"


def _check_patterns(rows: list[Parameter], what: str, patterns: Mapping[str, Any]) -> None:
    for key in patterns:
        if not any(_matches(key, row.module) for row in rows):
            raise SpecError(f"{what}: no module ends in {key!r}. {_near(key, rows)}")


def _by_pattern(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    return next((value for key, value in patterns.items() if _matches(key, module)), default)


def _matches(key: str, module: str) -> bool:
    return re.match(rf"(.*\.)?({key})$", module) is not None


def _layer(module: str) -> int | None:
    """The index of the layer that a module is in: the first number in its name."""
    return next((int(part) for part in module.split(".") if part.isdigit()), None)
