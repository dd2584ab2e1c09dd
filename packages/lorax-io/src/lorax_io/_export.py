"""A tunable tree as PEFT's tensors and config, whatever file they go to."""

import collections
import math
import re
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from lorax import Adapter, Axes, DoraWeight, LoraWeight

from ._config import HEADS, PeftConfig, prefixes, suffixes
from ._errors import AdapterMismatchError, AdapterWarning, UnsupportedAdapterError
from ._host import to_host
from ._layouts import RANK, Array, Embedding, Experts, Layout, Layouts, pack
from ._progress import track
from ._tree import is_array, near, param_leaves, tunable_rows

# What PEFT reads.
DTYPES = ("float16", "bfloat16", "float32", "float64")


class Export(NamedTuple):
    """What is written."""

    tensors: dict[str, Array]  # by module and key: `model.layers.0.q_proj.lora_A.weight`
    config: PeftConfig
    unsaid: dict[str, dict[str, Any]]  # alpha and scaling, where the config has another form of it


class _Module(NamedTuple):
    """One adapted module, by the name that PEFT matches patterns with."""

    name: str
    layout: Layout
    weight: LoraWeight


def export(
    file: object,
    tunable: Any,
    names: Layouts,
    *,
    params: Any = None,
    task_type: str | None = None,
    fold_scale: bool = False,
    target_modules: Sequence[str] | None = None,
    dora: bool = False,
) -> Export:
    """The tensors and the config of a tunable tree.

    Args:
        file: where they will go, for messages.
        tunable: the tree.
        names: the layout of each parameter.
        params: the base's parameters, for frozen ones in a module that is saved whole.
        task_type: PEFT's; some have a head that is saved whole.
        fold_scale: whether the fan-out factors are multiplied by the scale.
        target_modules: ends of module names, to be written instead of full names.
        dora: whether the reader knows DoRA.
    """
    rows = tunable_rows(file, tunable)
    found: dict[str, Any] = {row.path: row.leaf for row in rows if isinstance(row.leaf, Adapter)}
    adapted = {path: _plain(file, path, weight, dora) for path, weight in found.items()}
    magnitudes = {path: x.magnitude for path, x in found.items() if isinstance(x, DoraWeight)}
    if attached := [p for p, x in found.items() if isinstance(x, DoraWeight) and not x.detached]:
        warnings.warn(
            f"{file}: the norm of `{attached[0]}` has a gradient, and PEFT detaches it: outputs "
            "are the same, but training goes on in another way.",
            AdapterWarning,
            stacklevel=3,
        )
    if mixed := sorted(adapted.keys() - magnitudes.keys()) if magnitudes else []:
        raise UnsupportedAdapterError(
            file,
            f"`{mixed[0]}` has plain LoRA and `{min(magnitudes)}` has DoRA. PEFT has one of them "
            "for all modules. Use `save_adapter` or `save_merged`.",
        )
    layouts = {row.path: layout_of(file, names, row.path) for row in rows}
    if not adapted:
        raise UnsupportedAdapterError(
            file, "no parameter has factors; PEFT needs one. Use `save_adapter` or `save_merged`."
        )
    stacks = [
        (module, layouts[path], weight)
        for path, weight in adapted.items()
        for module in _stack(file, path, layouts[path], weight).values()
    ]
    modules = [_Module(pattern_name(layout, name), layout, w) for name, layout, w in stacks]
    config, unsaid = _scaling(modules, fold_scale)
    tensors: dict[str, Array] = {}
    depths = wrapper_depths((module, layout) for module, layout, _ in stacks)
    for path, weight in track(adapted.items(), "Gathering the adapter"):
        gain = weight.scale * weight.rank / config.lora_alpha if fold_scale else 1.0
        arrays = {"a": to_host(weight.a), "b": _times(to_host(weight.b), gain)}
        if path in magnitudes:
            arrays["magnitude"] = to_host(magnitudes[path])
        for name, tensor in _factors(file, path, layouts[path], weight, depths, arrays):
            _add(file, tensors, name, tensor)
    targets = _targets(file, modules, names, target_modules)
    leaves = {row.path: row.leaf for row in rows}
    saved, bias = _add_full(file, tensors, leaves, names, params, task_type, modules)
    config = config.replace(**targets, modules_to_save=saved, bias=bias, use_dora=bool(magnitudes))
    return Export(tensors, config, unsaid)


def _plain(file: object, path: str, weight: Any, dora: bool) -> LoraWeight:
    """Plain LoRA, or that within DoRA where the reader knows it."""
    is_dora = dora and isinstance(weight, DoraWeight)
    plain = weight.delta if is_dora else weight
    if not isinstance(plain, LoraWeight):
        raise UnsupportedAdapterError(
            file,
            f"the adapter of `{path}` is of the kind {weight.kind!r}, and this form has "
            f"{'LoRA and DoRA' if dora else 'plain LoRA'} alone. Save it with `save_adapter`, or "
            "merge it with `save_merged`.",
        )
    return plain


def layout_of(file: object, names: Layouts, path: str) -> Layout:
    """The layout of a parameter."""
    if path not in names:
        raise AdapterMismatchError(
            file, f"`names` has no module for `{path}`.{near(path, names)} Add its layout."
        )
    return names[path]


def pattern_name(layout: Layout, module: str) -> str:
    """The name by which PEFT targets a module, or one parameter of a module of experts."""
    return f"{module}.{layout.parameter}" if isinstance(layout, Experts) else module


def wrapper_depths(layouts: Iterable[tuple[str, Layout]]) -> dict[str, int]:
    """How many of PEFT's wrappers stand around each parameter of experts, by its pattern name.

    PEFT wraps a module once for each parameter, the first of them innermost.

    Args:
        layouts: of the parameters that have factors, each with its module.
    """
    of_module: dict[str, dict[int, str]] = collections.defaultdict(dict)
    for module, layout in layouts:
        if isinstance(layout, Experts):
            of_module[module][layout.order] = pattern_name(layout, module)
    return {
        parameters[order]: depth
        for parameters in of_module.values()
        for depth, order in enumerate(sorted(parameters, reverse=True))
    }


def factor_prefix(layout: Layout, module: str, depths: Mapping[str, int]) -> str:
    """What a module's keys begin with."""
    return module + ".base_layer" * depths.get(pattern_name(layout, module), 0)


def _stack(
    file: object, path: str, layout: Layout, weight: LoraWeight
) -> dict[tuple[int, ...], str]:
    roles = _roles(file, path, layout, weight)
    sizes = dict(zip(roles.shared, weight.a.shape, strict=False))
    return layout.modules(roles, sizes)


def _roles(file: object, path: str, layout: Layout, weight: LoraWeight) -> Axes:
    roles = weight.axes
    wanted = layout.roles(sum(map(len, roles)))
    if roles != wanted:
        raise AdapterMismatchError(
            file,
            f"the adapter of `{path}` has in_axes={roles.inputs}, out_axes={roles.outputs}, "
            f"shared_axes={roles.shared}, but its layout in `names` has in_axes={wanted.inputs}, "
            f"out_axes={wanted.outputs}, shared_axes={wanted.shared}.",
        )
    if not layout.factors(roles):
        raise AdapterMismatchError(
            file, f"`{path}` is adapted, but `names` has {type(layout).__name__} for it."
        )
    return roles


def _factors(
    file: object,
    path: str,
    layout: Layout,
    weight: LoraWeight,
    depths: Mapping[str, int],
    arrays: Mapping[str, Array],
) -> list[tuple[str, Array]]:
    if isinstance(layout, Embedding) and layout.tied:
        warnings.warn(
            f"{file}: the head shares the embedding `{path}`. PEFT adapts the look-up alone until "
            "the adapter is merged, so that its outputs differ from these.",
            AdapterWarning,
            stacklevel=4,
        )
    roles = _roles(file, path, layout, weight)
    axes = factor_axes(roles)
    factors = layout.factors(roles)
    if "magnitude" in arrays:
        factors += layout.magnitude(roles)
    if len(factors) < len(arrays):
        raise UnsupportedAdapterError(
            file,
            f"`{path}` has DoRA, which PEFT does not have for a layout {type(layout).__name__}. "
            "Use `save_adapter` or `save_merged`.",
        )
    stacked = len(layout.stack(roles))
    return [
        (
            f"{factor_prefix(layout, module, depths)}.{factor.key}",
            pack(arrays[factor.name][index], axes[factor.name][stacked:], factor.groups),
        )
        for index, module in _stack(file, path, layout, weight).items()
        for factor in factors
    ]


def factor_axes(roles: Axes) -> dict[str, tuple[int, ...]]:
    """The parameter's axis of each axis of a factor."""
    return {
        "a": (*roles.shared, *roles.inputs, RANK),
        "b": (*roles.shared, RANK, *roles.outputs),
        "magnitude": (*roles.shared, *roles.outputs),
    }


def _times(array: Array, gain: float) -> Array:
    return array if gain == 1 else (array.astype(np.float64) * gain).astype(array.dtype)


def _add(file: object, tensors: dict[str, Array], name: str, tensor: Array) -> None:
    if name in tensors:
        raise AdapterMismatchError(file, f"`names` gives two parameters the tensor `{name}`.")
    if tensor.dtype.name not in DTYPES:
        raise UnsupportedAdapterError(
            file, f"`{name}` is {tensor.dtype}; PEFT reads {', '.join(DTYPES)}. Cast the tree."
        )
    # A copy of its own, so that what it was gathered from can go.
    tensors[name] = np.asarray(tensor, order="C")


def _scaling(
    modules: Sequence[_Module], fold_scale: bool
) -> tuple[PeftConfig, dict[str, dict[str, Any]]]:
    """Rank and scale of every module: the most frequent ones, and patterns for the others."""
    ranks = {module.name: module.weight.rank for module in modules}
    r = _most_frequent(ranks)
    unsaid: dict[str, dict[str, Any]] = {}
    if fold_scale:
        alphas, rslora = dict.fromkeys(ranks, r), False
    else:
        rslora = {m.weight.scaling for m in modules if m.weight.alpha is not None} == {"rslora"}
        alphas = {module.name: _alpha(module.weight, rslora) for module in modules}
        said = "rslora" if rslora else "standard"
        for name, _, weight in modules:
            if (weight.alpha, weight.scaling) != (alphas[name], said):
                unsaid[name] = {"alpha": weight.alpha, "scaling": weight.scaling}
    alpha = _most_frequent(alphas)
    config = PeftConfig(
        r=r,
        lora_alpha=alpha,
        use_rslora=rslora,
        rank_pattern=_pattern(ranks, r),
        alpha_pattern=_pattern(alphas, alpha),
        fan_in_fan_out=any(module.layout.fan_in_fan_out for module in modules),
    )
    return config, unsaid


def _most_frequent(values: Mapping[str, Any]) -> Any:
    return collections.Counter(values.values()).most_common(1)[0][0]


def _alpha(weight: LoraWeight, rslora: bool) -> float:
    """The alpha that gives the weight's scale; an integer where it is one, as PEFT writes it."""
    if weight.alpha is not None and (weight.scaling == "rslora") == rslora:
        alpha = weight.alpha
    else:
        alpha = weight.scale * (math.sqrt(weight.rank) if rslora else weight.rank)
    return int(alpha) if float(alpha).is_integer() else alpha


def _pattern(values: Mapping[str, Any], default: Any) -> dict[str, Any]:
    """An entry for each module that has another value, by its full name.

    PEFT matches a key with the ends of names, so one that ends another name is tied to its begin.
    """
    longer = {end for name in values for end in suffixes(name)[1:]}
    return {
        f"^{re.escape(name)}" if name in longer else name: value
        for name, value in values.items()
        if value != default
    }


def _targets(
    file: object, modules: Sequence[_Module], names: Layouts, ends: Sequence[str] | None
) -> dict[str, Any]:
    parameters = sorted(m.name for m in modules if isinstance(m.layout, Experts))
    adapted = {module.name for module in modules} - set(parameters)
    targets = sorted(adapted if ends is None else ends)
    config = PeftConfig(target_modules=targets)
    plain = {layout.module for layout in names.values() if "{" not in layout.module}
    # Names that end in a target's: `aux.head`, where `head` is adapted.
    more = sorted(filter(config.targets, plain - adapted))
    if more and ends is None:
        config = config.replace(exclude_modules=more)
    if missed := sorted(name for name in adapted if not config.targets(name)):
        raise AdapterMismatchError(file, f"target_modules={targets} misses `{missed[0]}`.")
    if more and ends is not None:
        raise AdapterMismatchError(
            file, f"target_modules={targets} matches `{more[0]}`, which has no adapter."
        )
    return {
        "target_modules": targets,
        "target_parameters": parameters or None,
        "exclude_modules": config.exclude_modules,
    }


def _add_full(
    file: object,
    tensors: dict[str, Array],
    rows: Mapping[str, Any],
    names: Layouts,
    params: Any,
    task_type: str | None,
    modules: Sequence[_Module],
) -> tuple[list[str] | None, str]:
    """Adds the parameters that are trained in full; returns `modules_to_save` and `bias`.

    PEFT saves such a module whole, with all that is in it. The bias of an adapted module is the
    exception: it stands beside the factors.
    """
    adapted = {module.name for module in modules}
    saved: dict[str, set[str]] = collections.defaultdict(set)  # by the module in `names`
    bias = "none"
    for path, leaf in rows.items():
        if isinstance(leaf, Adapter):
            continue
        for name, parameter, tensor in whole_tensors(path, names[path], leaf):
            if not name:
                raise UnsupportedAdapterError(
                    file,
                    f"`{path}` is trained in full and is in no module, and PEFT saves modules. Use "
                    "`save_adapter` or `save_merged`.",
                )
            if name in adapted and parameter == "bias":
                bias = "lora_only"
                _add(file, tensors, f"{name}.base_layer.bias", tensor)
            elif name in adapted:
                raise UnsupportedAdapterError(
                    file,
                    f"`{path}` is trained in full in the module `{name}`, which has factors too; "
                    "PEFT has no place for that. Use `save_adapter` or `save_merged`.",
                )
            else:
                saved[names[path].module].add(name)
                _add(file, tensors, f"{name}.{parameter}", tensor)
    heads = HEADS.get(task_type, ())
    _add_rest(file, tensors, rows, names, params, saved, heads)
    # Of modules within each other, PEFT wants the outermost alone.
    in_head = PeftConfig(modules_to_save=heads).saves
    outer = {
        name
        for module, entries in saved.items()
        if not in_head(module) and saved.keys().isdisjoint(prefixes(module)[:-1])
        for name in entries
    }
    found = [layout.module for layout in names.values() if in_head(layout.module)]
    outer |= {h for h in heads if any(map(PeftConfig(modules_to_save=[h]).saves, found))}
    return sorted(outer) or None, bias


def _add_rest(
    file: object,
    tensors: dict[str, Array],
    rows: Mapping[str, Any],
    names: Layouts,
    params: Any,
    saved: Collection[str],
    heads: Sequence[str],
) -> None:
    """Adds the frozen parameters of modules that are saved whole."""
    leaves = {} if params is None else param_leaves(params)[0]
    config, in_head = (PeftConfig(modules_to_save=m) for m in ([*saved, *heads], heads))
    for path, layout in names.items():
        module, row = layout.module, rows.get(path)
        if not config.saves(module) or (row is not None and not isinstance(row, Adapter)):
            continue
        if not in_head.saves(module) and not any(outer in saved for outer in prefixes(module)):
            caught = next(m for m in saved if PeftConfig(modules_to_save=[m]).saves(module))
            raise UnsupportedAdapterError(
                file,
                f"PEFT would save `{module}` with `{caught}`, since it compares the ends of names "
                "only. Use `save_adapter` or `save_merged`.",
            )
        if row is not None:
            raise UnsupportedAdapterError(
                file,
                f"`{path}` has factors, and PEFT saves `{module}` whole: for another parameter in "
                "it, or for `task_type`. Use `save_adapter` or `save_merged`.",
            )
        if not is_array(leaves.get(path)):
            raise AdapterMismatchError(
                file,
                f"PEFT saves the module `{module}` whole, and `{path}` in it is frozen. Give "
                "`params=`, the base's parameters, or train it in full, too.",
            )
        for name, parameter, tensor in whole_tensors(path, layout, leaves[path]):
            _add(file, tensors, f"{name}.{parameter}", tensor)


def whole_tensors(path: str, layout: Layout, leaf: Any) -> list[tuple[str, str, Array]]:
    """A parameter as PyTorch has it: module, name in the module, and tensor, for each entry."""
    roles = layout.roles(len(leaf.shape))
    stack = layout.stack(roles)
    rest = [d for d in range(len(leaf.shape)) if d not in stack]
    array = to_host(leaf).transpose([*stack, *rest])
    return [
        (module, layout.parameter, pack(array[index], rest, layout.whole(roles)))
        for index, module in layout.modules(roles, dict(enumerate(leaf.shape))).items()
    ]
