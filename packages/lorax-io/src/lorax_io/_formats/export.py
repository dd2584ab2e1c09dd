"""Converts a tunable tree to PEFT's tensors and config, which every writer starts from."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from lorax import Adapter, DoraWeight, Pair, TokensWeight

from .._disk.arrays import to_host
from .._disk.progress import track
from .._errors import AdapterMismatchError, UnsupportedAdapterError, warn
from .._places import Array, Factor, Place, axes_of, pack
from .._shapes import complete, padded_shape
from .._torch_names import Embedding, TorchName, TorchNames
from .._tree import FrozenFactors, is_array, pair_rows, param_leaves, suggestion
from .peft.config import PeftConfig
from .peft.patterns import suffixes
from .peft.tuners import TUNERS, Module, Tuner, tuner_of
from .whole import add, add_full, has_numbers, without_changed
from .wrappers import factor_prefix, wrapper_depths


class Export(NamedTuple):
    """An adapter in PEFT's form: its tensors and its config."""

    tensors: dict[str, Array]  # by module and key: `model.layers.0.q_proj.lora_A.weight`
    config: PeftConfig
    # The alpha and scaling of modules whose config expresses the same scale differently.
    original_scaling: Mapping[str, Mapping[str, Any]]


def export(
    tunable: Any,
    names: TorchNames,
    *,
    params: Any = None,
    task_type: str | None = None,
    fold_scale: bool = False,
    target_modules: Sequence[str] | None = None,
    plain: bool = False,
    lycoris: bool = False,
    frozen: FrozenFactors | None = None,
) -> Export:
    """Converts a tunable tree to PEFT's tensors and config.

    Args:
        tunable: the tree, or a pair.
        names: the PyTorch name of each parameter, by path.
        params: the base's parameters, for the frozen ones in a module that is saved whole.
        task_type: PEFT's task type; for some, PEFT saves a head whole.
        fold_scale: whether to multiply a factor by the scale.
        target_modules: ends of module names to write in the config instead of full names.
        plain: whether the reader supports only plain LoRA.
        lycoris: whether the reader supports LyCORIS, which has Tucker cores and blocks of any size.
        frozen: the frozen factors, if `tunable` is not a pair that has them.

    Raises:
        AdapterMismatchError: if `names` does not fit the tree, or frozen factors are lacking.
        UnsupportedAdapterError: if PEFT, or the reader, has no form for an adapter.
    """
    found_rows, own = pair_rows(tunable)
    frozen = own if frozen is None else frozen
    rows = {row.path: row.leaf for row in found_rows}
    adapted = {path: leaf for path, leaf in rows.items() if isinstance(leaf, Adapter)}
    tuner = _one_tuner(adapted, plain, lycoris)
    torch_names = {path: torch_name_of(names, path) for path in rows}
    if not adapted:
        raise UnsupportedAdapterError(
            "no parameter has factors; PEFT needs one. Use `save_adapter` or `save_merged`."
        )
    bases = _bases(tunable, params)
    places = {
        path: _place(torch_names[path], path, weight, bases.get(path))
        for path, weight in adapted.items()
    }
    stacks = [
        (name, place, adapted[path])
        for path, place in places.items()
        for name in place.modules.values()
    ]
    modules = [Module(place.pattern_name(name), place, weight) for name, place, weight in stacks]
    config, original_scaling = tuner.scaling(modules, fold_scale)
    if not lycoris:
        config = tuner.in_peft(config, modules)
    tensors: dict[str, Array] = {}
    parts: dict[str, list[tuple[str, Array]]] = {key: [] for key in tuner.common}
    depths = wrapper_depths((name, place) for name, place, _ in stacks)
    for path, weight in track(adapted.items(), "Gathering the adapter"):
        factors = tuner.factors(places[path], weight)
        own_frozen = _frozen(path, weight, factors, frozen.get(path, {}), bases)
        arrays = {name: to_host(factor) for name, factor in (weight.factors() | own_frozen).items()}
        if fold_scale and tuner.folded is not None:
            gain = _gain(weight, config)
            arrays[tuner.folded] = _times(arrays[tuner.folded], gain)
        for module, key, tensor in _tensors(places[path], weight, factors, arrays):
            if key in parts:
                parts[key].append((path, tensor))
            else:
                add(tensors, f"{factor_prefix(places[path], module, depths)}.{key}", tensor)
    for key, tensor in tuner.gathered(parts).items():
        add(tensors, key, tensor)
    targets = _targets(modules, names, target_modules, tuner)
    rows = without_changed(rows, names, bases, tensors, config, tuner)
    saved, bias = add_full(tensors, rows, names, params, task_type, modules)
    if saved and "modules_to_save" in tuner.lacking:
        raise UnsupportedAdapterError(
            f"trains `{saved[0]}` in full, and {tuner.called} has no `modules_to_save` in PEFT. "
            "Freeze it, or use `save_adapter` or `save_merged`."
        )
    if bias != "none" and "bias" not in tuner.fields:
        raise UnsupportedAdapterError(
            f"trains the bias of an adapted module, and {tuner.called} has no key for it in PEFT. "
            "Freeze it, or use `save_adapter` or `save_merged`."
        )
    return Export(
        tensors, config.replace(**targets, modules_to_save=saved, bias=bias), original_scaling
    )


def _one_tuner(adapted: Mapping[str, Any], plain: bool, lycoris: bool) -> Tuner:
    """The tuner that writes all adapters; raises if one of them or the mixture is not supported."""
    tuners: dict[str, Tuner] = {}
    for path, weight in adapted.items():
        tuner = tuner_of(weight)
        lacking = not lycoris and weight.kind == "locon"
        if tuner is None or lacking or (plain and weight.kind not in ("lora", "lora_fa")):
            form = "plain LoRA alone" if plain else "not that kind"
            raise UnsupportedAdapterError(
                f"the adapter of `{path}` is of the kind {weight.kind!r}, and this form has "
                f"{form}. Save it with `save_adapter`, or merge it with `save_merged`."
            )
        tuners[weight.kind] = tuner
    attached = [p for p, x in adapted.items() if isinstance(x, DoraWeight) and not x.detached]
    if attached:
        warn(
            f"the norm of `{attached[0]}` has a gradient, but PEFT detaches it: outputs are the "
            "same, but further training differs."
        )
    for tuner in tuners.values():
        if tuner.mixes(tuners.keys()):
            return tuner
    if tuners:
        first, second = ((p, w.kind) for p, w in _of_each_kind(adapted)[:2])
        raise UnsupportedAdapterError(
            f"`{first[0]}` has a {first[1]} adapter and `{second[0]}` a {second[1]} adapter. PEFT "
            "has one kind for all modules. Use `save_adapter` or `save_merged`."
        )
    return TUNERS["LORA"]


def _frozen(
    path: str,
    weight: Adapter,
    factors: Sequence[Factor],
    frozen: Mapping[str, Any],
    bases: Mapping[str, Any],
) -> dict[str, Any]:
    """The frozen factors to store: the pair's, or computed from the base."""
    wanted = {factor.name for factor in factors} - weight.factors().keys()
    if lacking := sorted(wanted - frozen.keys()):
        if not has_numbers(bases.get(path)):
            raise AdapterMismatchError(
                f"keeps `{path}/{lacking[0]}` in the frozen tree, but PEFT's file needs it. Pass "
                "the whole pair, `lorax.Pair(frozen, tunable)`, or `params=`."
            )
        frozen = complete(path, weight, bases[path], frozen)
    return {name: frozen[name] for name in wanted}


def _gain(weight: Any, config: PeftConfig) -> float:
    """What is left of the scale when `lora_alpha / rank` of the config is divided out."""
    within = weight.delta if isinstance(weight, DoraWeight) else weight
    return within.scale * within.rank / config.lora_alpha


def _of_each_kind(adapted: Mapping[str, Adapter]) -> list[tuple[str, Adapter]]:
    return list({weight.kind: (path, weight) for path, weight in adapted.items()}.values())


def torch_name_of(names: TorchNames, path: str) -> TorchName:
    """The PyTorch name of a parameter."""
    if path not in names:
        raise AdapterMismatchError(
            f"`names` has no module for `{path}`.{suggestion(path, names)} Add it."
        )
    return names[path]


def _bases(tunable: Any, params: Any) -> dict[str, Any]:
    """The base's leaves by path; empty if no base was given."""
    base = tunable.frozen if params is None and isinstance(tunable, Pair) else params
    return {} if base is None else param_leaves(base)[0]


def _place(torch_name: TorchName, path: str, weight: Adapter, base: Any) -> Place:
    """The place of an adapted parameter.

    Without its base, axes that the factors do not determine have size 1.
    """
    shape = base.shape if is_array(base) else padded_shape(weight)
    place = torch_name.fitted(weight.axes).at(path, shape)
    if place.axes != weight.axes:
        ours, theirs = weight.axes, place.axes
        raise AdapterMismatchError(
            f"the adapter of `{path}` has in_axes={ours.inputs}, out_axes={ours.outputs}, "
            f"shared_axes={ours.shared}, but its entry in `names` has in_axes={theirs.inputs}, "
            f"out_axes={theirs.outputs}, shared_axes={theirs.shared}."
        )
    if not place.factors:
        raise AdapterMismatchError(
            f"`{path}` is adapted, but `names` has {type(torch_name).__name__} for it."
        )
    return place


def _tensors(
    place: Place, weight: Adapter, factors: Sequence[Factor], arrays: Mapping[str, Array]
) -> Iterator[tuple[str, str, Array]]:
    """Yields the tensors of one parameter: the module, the key in it, and the array."""
    is_tied = isinstance(place.torch_name, Embedding) and place.torch_name.tied
    if is_tied and not isinstance(weight, TokensWeight):  # of rows, PEFT ties both
        warn(
            f"the head shares the embedding `{place.path}`. PEFT adapts only the lookup until the "
            "adapter is merged, so its outputs differ from these."
        )
    axes_by_name = axes_of(weight, place.shape).of
    for index, module in place.modules.items():
        at = dict(zip(place.stack, index, strict=True))
        for factor in factors:
            # A frozen factor may lack the stacked axes: all modules then share it.
            axes = axes_by_name[factor.name]
            inner = [axis for axis in axes if axis not in at]
            array = arrays[factor.name][tuple(at[axis] for axis in axes if axis in at)]
            yield module, factor.key, pack(array, inner, factor.groups)


def _times(array: Array, gain: float) -> Array:
    return array if gain == 1 else (array.astype(np.float64) * gain).astype(array.dtype)


def _targets(
    modules: Sequence[Module], names: TorchNames, ends: Sequence[str] | None, tuner: Tuner
) -> dict[str, Any]:
    rows = tuner.separately_listed(modules)
    modules = [module for module in modules if module not in rows]
    parameters = sorted(m.name for m in modules if m.place.torch_name.by_parameter)
    adapted = {module.name for module in modules} - set(parameters)
    targets = sorted(adapted if ends is None else ends)
    config = PeftConfig(target_modules=targets)
    plain = {torch_name.module for torch_name in names.values() if "{" not in torch_name.module}
    # Modules that PEFT would adapt too, by the ends of their names: `aux.head` besides `head`.
    more = sorted(filter(config.targets, plain - adapted))
    if more and "exclude_modules" in tuner.lacking:
        raise UnsupportedAdapterError(
            f"adapts `{_ending(more[0], targets)}`, but PEFT would also adapt `{more[0]}`: "
            f"{tuner.called} has no `exclude_modules` there. Use `save_adapter` or `save_merged`."
        )
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


def _ending(name: str, targets: Sequence[str]) -> str:
    return next(end for end in suffixes(name) if end in targets)
