"""A tunable tree as PEFT's tensors and config, whatever file they go to."""

import collections
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from lorax import Adapter, DoraWeight

from .._disk.arrays import to_host
from .._disk.progress import track
from .._errors import AdapterMismatchError, UnsupportedAdapterError, warn
from .._layouts import Embedding, Layout, Layouts
from .._places import Array, Place, axes_of, pack
from .._shapes import padded_shape
from .._tree import is_array, near, param_leaves, tunable_rows
from .peft.config import HEADS, PeftConfig
from .peft.patterns import prefixes
from .peft.tuners import TUNERS, Module, Tuner, tuner_of
from .wrappers import factor_prefix, wrapper_depths

# What PEFT reads.
DTYPES = ("float16", "bfloat16", "float32", "float64")


class Export(NamedTuple):
    """What is written."""

    tensors: dict[str, Array]  # by module and key: `model.layers.0.q_proj.lora_A.weight`
    config: PeftConfig
    unsaid: Mapping[str, Mapping[str, Any]]  # alpha and scaling, where the config has another form


def export(
    tunable: Any,
    names: Layouts,
    *,
    params: Any = None,
    task_type: str | None = None,
    fold_scale: bool = False,
    target_modules: Sequence[str] | None = None,
    plain: bool = False,
) -> Export:
    """The tensors and the config of a tunable tree.

    Args:
        tunable: the tree.
        names: the layout of each parameter.
        params: the base's parameters, for frozen ones in a module that is saved whole.
        task_type: PEFT's; some have a head that is saved whole.
        fold_scale: whether a factor is multiplied by the scale.
        target_modules: ends of module names, to be written instead of full names.
        plain: whether the reader knows plain LoRA alone.
    """
    rows = {row.path: row.leaf for row in tunable_rows(tunable)}
    adapted = {path: leaf for path, leaf in rows.items() if isinstance(leaf, Adapter)}
    tuner = _one_tuner(adapted, plain)
    layouts = {path: layout_of(names, path) for path in rows}
    if not adapted:
        raise UnsupportedAdapterError(
            "no parameter has factors; PEFT needs one. Use `save_adapter` or `save_merged`."
        )
    places = {path: _place(layouts[path], path, weight) for path, weight in adapted.items()}
    stacks = [
        (name, place, adapted[path])
        for path, place in places.items()
        for name in place.modules.values()
    ]
    modules = [Module(place.pattern_name(name), place, weight) for name, place, weight in stacks]
    config, unsaid = tuner.scaling(modules, fold_scale)
    for place in places.values():
        tuner.check(config, names, place)
    tensors: dict[str, Array] = {}
    depths = wrapper_depths((name, place) for name, place, _ in stacks)
    for path, weight in track(adapted.items(), "Gathering the adapter"):
        arrays = {name: to_host(factor) for name, factor in weight.factors().items()}
        if fold_scale and tuner.folded is not None:
            gain = _gain(weight, config)
            arrays[tuner.folded] = _times(arrays[tuner.folded], gain)
        for name, tensor in _factors(places[path], weight, tuner, depths, arrays):
            _add(tensors, name, tensor)
    targets = _targets(modules, names, target_modules)
    saved, bias = _add_full(tensors, rows, names, params, task_type, modules)
    return Export(tensors, config.replace(**targets, modules_to_save=saved, bias=bias), unsaid)


def _one_tuner(adapted: Mapping[str, Any], plain: bool) -> Tuner:
    """The kind that all adapters are of, for a reader that has it."""
    tuners: dict[str, Tuner] = {}
    for path, weight in adapted.items():
        tuner = tuner_of(weight)
        if tuner is None or (plain and weight.kind != "lora"):
            form = "plain LoRA alone" if plain else "not that kind"
            raise UnsupportedAdapterError(
                f"the adapter of `{path}` is of the kind {weight.kind!r}, and this form has "
                f"{form}. Save it with `save_adapter`, or merge it with `save_merged`."
            )
        tuners[weight.kind] = tuner
    attached = [p for p, x in adapted.items() if isinstance(x, DoraWeight) and not x.detached]
    if attached:
        warn(
            f"the norm of `{attached[0]}` has a gradient, and PEFT detaches it: outputs are the "
            "same, but training goes on in another way."
        )
    if len(tuners) > 1:
        first, second = ((p, w.kind) for p, w in _of_each_kind(adapted)[:2])
        raise UnsupportedAdapterError(
            f"`{first[0]}` has a {first[1]} adapter and `{second[0]}` a {second[1]} adapter. PEFT "
            "has one kind for all modules. Use `save_adapter` or `save_merged`."
        )
    return next(iter(tuners.values()), TUNERS["LORA"])


def _gain(weight: Any, config: PeftConfig) -> float:
    """What is left of the scale where alpha is the rank."""
    within = weight.delta if isinstance(weight, DoraWeight) else weight
    return within.scale * within.rank / config.lora_alpha


def _of_each_kind(adapted: Mapping[str, Adapter]) -> list[tuple[str, Adapter]]:
    return list({weight.kind: (path, weight) for path, weight in adapted.items()}.values())


def layout_of(names: Layouts, path: str) -> Layout:
    """The layout of a parameter."""
    if path not in names:
        raise AdapterMismatchError(
            f"`names` has no module for `{path}`.{near(path, names)} Add its layout."
        )
    return names[path]


def _place(layout: Layout, path: str, weight: Adapter) -> Place:
    """Where an adapted parameter is, of which only what its factors run along is known."""
    place = layout.fitted(weight.axes).at(path, padded_shape(weight))
    if place.axes != weight.axes:
        ours, theirs = weight.axes, place.axes
        raise AdapterMismatchError(
            f"the adapter of `{path}` has in_axes={ours.inputs}, out_axes={ours.outputs}, "
            f"shared_axes={ours.shared}, but its layout in `names` has in_axes={theirs.inputs}, "
            f"out_axes={theirs.outputs}, shared_axes={theirs.shared}."
        )
    if not place.factors:
        raise AdapterMismatchError(
            f"`{path}` is adapted, but `names` has {type(layout).__name__} for it."
        )
    return place


def _factors(
    place: Place,
    weight: Adapter,
    tuner: Tuner,
    depths: Mapping[str, int],
    arrays: Mapping[str, Array],
) -> list[tuple[str, Array]]:
    if isinstance(place.layout, Embedding) and place.layout.tied:
        warn(
            f"the head shares the embedding `{place.path}`. PEFT adapts the look-up alone until "
            "the adapter is merged, so that its outputs differ from these."
        )
    axes, stacked = axes_of(weight, place.shape).of, len(place.stack)
    return [
        (
            f"{factor_prefix(place, module, depths)}.{factor.key}",
            pack(arrays[factor.name][index], axes[factor.name][stacked:], factor.groups),
        )
        for index, module in place.modules.items()
        for factor in tuner.factors(place, weight)
    ]


def _times(array: Array, gain: float) -> Array:
    return array if gain == 1 else (array.astype(np.float64) * gain).astype(array.dtype)


def _add(tensors: dict[str, Array], name: str, tensor: Array) -> None:
    if name in tensors:
        raise AdapterMismatchError(f"`names` gives two parameters the tensor `{name}`.")
    if tensor.dtype.name not in DTYPES:
        raise UnsupportedAdapterError(
            f"`{name}` is {tensor.dtype}; PEFT reads {', '.join(DTYPES)}. Cast the tree."
        )
    # A copy of its own, so that what it was gathered from can go.
    tensors[name] = np.asarray(tensor, order="C")


def _targets(
    modules: Sequence[Module], names: Layouts, ends: Sequence[str] | None
) -> dict[str, Any]:
    parameters = sorted(m.name for m in modules if m.place.layout.by_parameter)
    adapted = {module.name for module in modules} - set(parameters)
    targets = sorted(adapted if ends is None else ends)
    config = PeftConfig(target_modules=targets)
    plain = {layout.module for layout in names.values() if "{" not in layout.module}
    # Names that end in a target's: `aux.head`, where `head` is adapted.
    more = sorted(filter(config.targets, plain - adapted))
    if more and ends is None:
        config = config.replace(exclude_modules=more)
    if missed := sorted(name for name in adapted if not config.targets(name)):
        raise AdapterMismatchError(f"target_modules={targets} misses `{missed[0]}`.")
    if more and ends is not None:
        raise AdapterMismatchError(
            f"target_modules={targets} matches `{more[0]}`, which has no adapter."
        )
    return {
        "target_modules": targets,
        "target_parameters": parameters or None,
        "exclude_modules": config.exclude_modules,
    }


def _add_full(
    tensors: dict[str, Array],
    rows: Mapping[str, Any],
    names: Layouts,
    params: Any,
    task_type: str | None,
    modules: Sequence[Module],
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
        for name, parameter, tensor in whole_tensors(names[path].at(path, leaf.shape), leaf):
            if not name:
                raise UnsupportedAdapterError(
                    f"`{path}` is trained in full and is in no module, and PEFT saves modules. Use "
                    "`save_adapter` or `save_merged`.",
                )
            if name in adapted and parameter == "bias":
                bias = "lora_only"
                _add(tensors, f"{name}.base_layer.bias", tensor)
            elif name in adapted:
                raise UnsupportedAdapterError(
                    f"`{path}` is trained in full in the module `{name}`, which has factors too; "
                    "PEFT has no place for that. Use `save_adapter` or `save_merged`.",
                )
            else:
                saved[names[path].module].add(name)
                _add(tensors, f"{name}.{parameter}", tensor)
    heads = HEADS.get(task_type, ())
    _add_rest(tensors, rows, names, params, saved, heads)
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
                f"PEFT would save `{module}` with `{caught}`, since it compares the ends of names "
                "only. Use `save_adapter` or `save_merged`.",
            )
        if row is not None:
            raise UnsupportedAdapterError(
                f"`{path}` has factors, and PEFT saves `{module}` whole: for another parameter in "
                "it, or for `task_type`. Use `save_adapter` or `save_merged`.",
            )
        if not is_array(leaves.get(path)):
            raise AdapterMismatchError(
                f"PEFT saves the module `{module}` whole, and `{path}` in it is frozen. Give "
                "`params=`, the base's parameters, or train it in full, too.",
            )
        for name, parameter, tensor in whole_tensors(
            layout.at(path, leaves[path].shape), leaves[path]
        ):
            _add(tensors, f"{name}.{parameter}", tensor)


def whole_tensors(place: Place, leaf: Any) -> list[tuple[str, str, Array]]:
    """A parameter as PyTorch has it: module, name in the module, and tensor, for each entry."""
    rest = [d for d in range(len(place.shape)) if d not in place.stack]
    array = to_host(leaf).transpose([*place.stack, *rest])
    return [
        (module, place.layout.parameter, pack(array[index], rest, place.whole))
        for index, module in place.modules.items()
    ]
