"""`spec`: a spec for `lorax.init_lora`, with targets named as in PEFT."""

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from lorax import (
    LORA_FREEZE,
    LORA_FULL,
    AdapterSpec,
    ArgumentError,
    LoraSpec,
    SpecError,
    UnadaptedWarning,
    path_string,
)

from ._choose import (
    Targets,
    by_pattern,
    check_patterns,
    choose,
    is_named,
    matches_any,
    shown,
)
from ._doctor import warn_of_defects
from ._library import described
from ._rows import Row, layers_of


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
    inputs: Any = None,
) -> Any:
    """Builds a spec for `lorax.init_lora` from the PyTorch names of a model's modules.

    Args:
        model: a PyTorch module or the function that `from_torch` returns, a Flax model of
            transformers, or the config of one.
        params: the model's parameters, as arrays or shapes; by default its own.
        rank: the rank of every LoRA adapter; 8 by default.
        alpha: the delta is `alpha / rank · a @ b`; None means `alpha = rank`.
        adapter: instead of `rank`, `alpha` and `rslora`, the spec of any kind of adapter without
            axes, such as `lorax.DoraSpec(lorax.LoraSpec(8))`.
        targets: "default" (PEFT's choice for the architecture), "attention", "mlp", "all-linear"
            (except the task's output layer), "embeddings" (of tokens), "experts" (the stacked
            weights of a mixture of experts), a sequence of ends of module names such as
            `["q_proj", "mlp.c_proj"]`, a string that is a regular expression for the whole name, a
            compiled one for any part of it, or a predicate on the name.
        exclude: modules not to adapt, in the same forms.
        full: the ends of the names of modules to train in full, such as `["classifier"]`.
        rank_pattern: ranks that differ, by a regular expression for the end of a module's name, for
            kinds of adapters that have a rank.
        alpha_pattern: alphas of LoRA that differ, in the same form.
        layers: the indices of the layers to adapt; by default all.
        rslora: whether the scale is `alpha / √rank`.
        inputs: example arguments of a PyTorch module, a tuple or a dict of arrays or shapes. The
            module is traced with them, by `lorax.infer_spec`, to find the input axes of weights
            whose class does not determine them, such as a router's.

    Returns:
        A tree with the structure of the parameters, for `lorax.init_lora`.

    Raises:
        SpecError: if a target matches nothing (the message suggests similar names), the model does
            not have one of the `layers`, the input axes of a weight that is targeted by name are
            not known, or a PyTorch module already has adapters of PEFT.
        ArgumentError: if `adapter` is combined with an option that it replaces.

    Warns:
        UnadaptedWarning: if a module that a named choice such as "all-linear" includes has fewer
            inputs or outputs than the rank, such as a classifier of two classes; it stays frozen. A
            module that is targeted by its own name gets the rank anyway. Also if a pattern of
            `rank_pattern` or `alpha_pattern` matches no module that is adapted, or the axes of a
            weight that a parametrization uses are not known.

    Example:
        >>> import jax, lorax, lorax_hf, transformers
        >>> config = transformers.GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=31)
        >>> spec = lorax_hf.spec(config, rank=2, alpha=4)
        >>> spec["h"]["0"]["attn"]["c_attn"]["kernel"]  # GPT-2 keeps (out, in)
        LoraSpec(rank=2, alpha=4, scaling='standard', in_axes=(1,), out_axes=(0,), shared_axes=())
    """
    kind = _kind(rank, alpha, rslora, adapter, rank_pattern, alpha_pattern)
    rows, params, infer, no_default = described(model, params)
    if no_default and targets == "default":
        raise SpecError(f'targets="default": {no_default}. Name the modules, or a kind of them.')
    warn_of_defects(model)
    if inputs is not None:
        axes = infer([row.path for row in rows if row.unsure], inputs)
        # A weight of a named choice stays unsure if the trace does not find its axes.
        rows = [
            row._replace(
                axes=axes.get(row.path, row.axes),
                unsure=row.unsure and row.path not in axes and bool(row.words),
            )
            for row in rows
        ]
    by_path = {row.path: row for row in rows}
    weights = [row for row in rows if row.axes is not None or row.unsure]
    chosen = _with_axes(by_path, choose(weights, targets, "targets"), targets)
    left_out = set[str]() if exclude is None else choose(weights, exclude, "exclude")
    in_full = choose(rows, full, "full") if full else set[str]()
    wanted = _wanted(rows, layers)
    for name, patterns in (("rank_pattern", rank_pattern), ("alpha_pattern", alpha_pattern)):
        check_patterns(rows, name, patterns or {})
    small: list[str] = []
    adapted_modules: list[str] = []

    def decide(key_path: Any, _: Any) -> int | AdapterSpec:
        row = by_path[path_string(key_path)]
        if row.path in in_full:
            return LORA_FULL
        adapted = row.path in chosen and row.path not in left_out and row.axes is not None
        if not adapted or not _is_in(row, wanted):
            return LORA_FREEZE
        assert row.axes is not None
        own_rank = by_pattern(rank_pattern or {}, row.module, kind.size)
        fan_in, fan_out = row.axes.sizes(row.shape)
        if is_named(targets) and own_rank is not None and own_rank > min(fan_in, fan_out):
            small.append(f"`{row.module}` ({fan_in} inputs × {fan_out} outputs)")
            return LORA_FREEZE
        adapted_modules.append(row.module)
        own = kind
        if own_rank is not None and own_rank != kind.size:
            own = kind.with_size(own_rank)
        if isinstance(own, LoraSpec) and alpha_pattern:
            own_alpha = by_pattern(alpha_pattern, row.module, own.alpha)
            own = dataclasses.replace(own, alpha=own_alpha)
        return own.with_axes(row.axes)

    tree = jax.tree_util.tree_map_with_path(decide, params)
    if small:
        warnings.warn(
            f"spec leaves modules frozen whose weights are too small for rank {kind.size}: "
            f"{', '.join(small)}. Name such a module in `full` to train it, or in `exclude` to "
            "silence this warning.",
            UnadaptedWarning,
            stacklevel=2,
        )
    leaves = jax.tree.leaves(tree, is_leaf=lambda leaf: isinstance(leaf, AdapterSpec))
    if not any(isinstance(leaf, AdapterSpec) or leaf == LORA_FULL for leaf in leaves):
        raise SpecError(
            f"`exclude` and `layers` leave nothing of targets={shown(targets)}; the layers are "
            f"{sorted({layer for row in rows for layer in layers_of(row.module)})}."
        )
    for name, patterns in (("rank_pattern", rank_pattern), ("alpha_pattern", alpha_pattern)):
        if unused := [key for key in patterns or {} if not matches_any(key, adapted_modules)]:
            warnings.warn(
                f"spec: {name} has {unused[0]!r}, which matches no module that is adapted.",
                UnadaptedWarning,
                stacklevel=2,
            )
    return tree


def _wanted(rows: Sequence[Row], layers: int | Sequence[int] | None) -> set[int] | None:
    """The indices of the wanted layers; None for all.

    Raises:
        SpecError: if the model does not have one of them.
    """
    if layers is None:
        return None
    wanted = {layers} if isinstance(layers, int) else set(layers)
    known = {layer for row in rows for layer in layers_of(row.module)}
    if unknown := sorted(wanted - known, key=str):
        raise SpecError(
            f"layers={layers!r}: there is no layer {unknown[0]!r}; the layers are {sorted(known)}."
        )
    return wanted


def _is_in(row: Row, wanted: set[int] | None) -> bool:
    """Whether a weight is in one of the wanted layers.

    Raises:
        SpecError: if it stacks layers of which only some are wanted.
    """
    layers = layers_of(row.module)
    chosen = wanted is None or not wanted.isdisjoint(layers)
    if chosen and wanted is not None and not wanted.issuperset(layers):
        raise SpecError(
            f"layers={sorted(wanted)}: `{row.path}` is one parameter for the layers "
            f"{list(layers)}, since they are scanned. Choose all of them or none, or create the "
            "function without `scan_layers`."
        )
    return chosen


def _with_axes(rows: Mapping[str, Row], chosen: set[str], targets: Targets) -> set[str]:
    """The chosen weights whose axes are known; others are an error if named, else a warning."""
    known = {path for path in chosen if not rows[path].unsure}
    if unknown := sorted(chosen - known):
        by_name = not isinstance(targets, str) and isinstance(targets, Sequence)
        listed = ", ".join(f"`{path}` of {rows[path].owner}" for path in unknown)
        if by_name or not known:
            raise SpecError(
                f"targets={shown(targets)}: the input axes of {listed} are not known. Pass "
                "`inputs=`, the arguments of a call, to find them."
            )
        warnings.warn(
            f"spec leaves weights frozen, because their input axes are not known: {listed}. Pass "
            "`inputs=`, the arguments of a call, to find them, or narrow `targets`.",
            UnadaptedWarning,
            stacklevel=3,
        )
    return known


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
        raise ArgumentError(f"spec: `adapter` has its own settings; leave {taken[0]} out.")
    name = type(adapter).__name__
    if rank_pattern and adapter.size is None:
        raise ArgumentError(f"spec: rank_pattern needs a kind of adapter with a rank, not {name}.")
    if alpha_pattern and not isinstance(adapter, LoraSpec):
        raise ArgumentError(f"spec: alpha_pattern is for LoraSpec, not for {name}.")
    return adapter
