"""PEFT's tensors and config as a pair of trees, believed only after all of it has been checked.

The names say which tensors there may be. What a file has beside those is an error, and so is what
it lacks: PEFT itself ignores the one, warns of the other, and lets a file replace base weights.
"""

import dataclasses
import itertools
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from lorax import Adapter, Axes, DoraWeight, LoraWeight, Pair

from ._config import PeftConfig, distrusted
from ._errors import (
    AdapterFileError,
    AdapterMismatchError,
    AdapterWarning,
    UnsupportedAdapterError,
)
from ._export import DTYPES, factor_axes, factor_prefix, pattern_name, wrapper_depths
from ._host import place, placements, shape_of
from ._layouts import (
    MAGNITUDE,
    RANK,
    Array,
    Embedding,
    Experts,
    Factor,
    Groups,
    Layout,
    Layouts,
    packed_shape,
    tensor_name,
    unpack,
)
from ._missing import check_any
from ._progress import track
from ._shapes import blank_rows, complete
from ._tensors import TensorFile, check_finite, check_width
from ._ties import is_embedding, is_head
from ._tree import (
    absent,
    filled,
    frozen_of,
    is_array,
    near,
    param_leaves,
    with_leaves,
)

_ADAPTER_NAME = re.compile(r"\.(lora_A|lora_B|lora_embedding_[AB])\.(?!weight$|bias$)([^.]+)")
FACTOR = re.compile(
    rf"\.(lora_A\.weight|lora_B\.weight|lora_embedding_A|lora_embedding_B|{MAGNITUDE})$"
)
_COPY_OF_BIAS = re.compile(r"\.(modules_to_save|original_module)\.(.+\.)?bias$")
_SAVED_AGAIN = ("embed_tokens", "lm_head")
_WHOLE = "whole"
_NOT_PLAIN = {
    MAGNITUDE: "DoRA, with a magnitude for each output",
    "lora_B.bias": "LoRA with a bias in its factors",
    "trainable_tokens_delta": "one that replaces rows of the embedding",
    "lora_E": "AdaLoRA",
    "lora_diag": "KaSA",
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "oft_": "OFT",
    "ia3_": "IA³",
    "vera_": "VeRA",
}


class Source(NamedTuple):
    """An adapter as it was found: its tensors, and what is said of them."""

    file: TensorFile
    tensors: Mapping[str, str]  # module and key -> name in the file
    config: PeftConfig
    unsaid: Mapping[str, Mapping[str, Any]]  # alpha and scaling, where the config has another form
    written_here: bool  # so that experts are not swapped unless the layout says so


class _Slot(NamedTuple):
    """Where a tensor goes: a parameter, the entry of its stack, and which of its tensors it is."""

    path: str
    entry: tuple[int, ...]
    key: str  # of a factor, or "whole"


# The tensors of each parameter of the adapter, by where they go.
_Found = dict[str, dict[_Slot, str]]
_Shapes = Mapping[str, tuple[int, ...]]


def plain_keys(file: TensorFile, prefix: str) -> dict[str, str]:
    """The tensors of a file by module and key, without prefix and without the adapter's name."""
    found: dict[str, str] = {}
    adapters: set[str] = set()
    check_any(file.path, {name: entry.shape for name, entry in file.entries.items()})
    for name in file.entries:
        if not name.startswith(prefix):
            raise AdapterFileError(
                file.path, f"has `{name}`; every tensor of an adapter begins with `{prefix}`."
            )
        key = name.removeprefix(prefix)
        if match := _ADAPTER_NAME.search(key):
            adapters.add(match[2])
            key = key.replace(match[0], f".{match[1]}", 1)
        if key in found or len(adapters) > 1:
            other = found.get(key, next(iter(found.values())))
            raise AdapterFileError(
                file.path, f"has `{name}` and `{other}`: two adapters in one file."
            )
        found[key] = name
    return found


def without_copies(tensors: Mapping[str, str], config: PeftConfig) -> dict[str, str]:
    """The tensors without the copies of a head's bias that PEFT saves for `bias="all"`."""
    if config.bias != "all":
        return dict(tensors)
    return {key: name for key, name in tensors.items() if not _COPY_OF_BIAS.search(key)}


def restore(source: Source, params: Any, names: Layouts, sharding: Any = None) -> Pair:
    """The pair `(frozen, tunable)`: each leaf where `sharding` says, or where its base is."""
    file = source.file.path
    leaves, structure = param_leaves(params)
    for path in names:
        if not is_array(leaves.get(path)):
            raise AdapterMismatchError(file, f"`names` has `{path}`, {absent(path, leaves)}")
    shapes = {path: tuple(leaves[path].shape) for path in names}
    with distrusted(file):
        found = _find(source, names, shapes)
        _check_targets(source, found, names, shapes)
        specs = _specs(source, found, names, shapes)
    weights, _ = blank_rows(file, leaves, specs)
    readers: dict[str, _Reader] = {}
    for path, slots in found.items():
        readers |= _readers(source, path, names[path], shapes[path], specs.get(path), slots)
    rows = {path: weights[path] if path in weights else shape_of(leaves[path]) for path in found}
    places = placements(rows, {}, structure, leaves, sharding)
    loaded = {
        name: place(reader.shape, reader.dtype, reader.read, places[name])
        for name, reader in track(readers.items(), "Loading the adapter")
    }
    rows = {path: filled(path, row, loaded) for path, row in rows.items()}
    held = {
        path: complete(file, path, row, leaves[path], {})
        for path, row in rows.items()
        if isinstance(row, Adapter)
    }
    return Pair(frozen_of(leaves, structure, rows, held), with_leaves(structure, leaves, rows))


def _find(source: Source, names: Layouts, shapes: _Shapes) -> _Found:
    """The tensors that the names have a place for; all others are errors."""
    slots = _slots(source, names, shapes)
    found: _Found = {}
    for key, name in source.tensors.items():
        if key not in slots:
            _check_needless(source, key, slots, names, shapes)
            continue
        slot = slots[key]
        if slot.key == _WHOLE and not _may_be_whole(source.config, key):
            if is_of_vocabulary(key, names[slot.path]):
                warn_of_vocabulary(source.file.path, key)
            else:
                raise AdapterFileError(
                    source.file.path,
                    f"`{name}` would replace a base weight, and neither `modules_to_save` nor "
                    "`bias` of its config says so.",
                )
        found.setdefault(slot.path, {})[slot] = name
    for path, tensors in found.items():
        _check_complete(source, names[path], shapes[path], tensors)
    return found


def _slots(source: Source, names: Layouts, shapes: _Shapes) -> dict[str, _Slot]:
    """Every tensor that there may be, by module and key."""
    modules = {path: _modules(layout, shapes[path]) for path, layout in names.items()}
    experts = [
        (module, layout)
        for path, layout in names.items()
        for module in modules[path].values()
        if isinstance(layout, Experts) and _is_targeted(source.config, layout, module)
    ]
    depths = wrapper_depths(experts)
    wrapped = {module for module, _ in experts}
    slots: dict[str, _Slot] = {}
    for path, layout in names.items():
        factors = _factors(source, layout, layout.roles(len(shapes[path])))
        for index, module in modules[path].items():
            prefix = factor_prefix(layout, module, depths)
            keys = {f"{prefix}.{factor.key}": factor.key for factor in factors}
            if module in wrapped and pattern_name(layout, module) not in depths:
                keys = {}  # the factors of these experts are of another of their parameters
            keys[tensor_name(module, layout.parameter)] = _WHOLE
            if layout.parameter == "bias":
                keys[f"{module}.base_layer.bias"] = _WHOLE
            for key, kind in keys.items():
                slot = _Slot(path, index, kind)
                if slots.setdefault(key, slot) != slot:
                    raise AdapterMismatchError(
                        source.file.path,
                        f"`names` gives `{slots[key].path}` and `{path}` the same tensor `{key}`.",
                    )
    return slots


def _factors(source: Source, layout: Layout, roles: Axes) -> tuple[Factor, ...]:
    """The tensors of an adapted parameter."""
    factors = layout.factors(roles)
    return factors + layout.magnitude(roles) if source.config.use_dora else factors


def _modules(layout: Layout, shape: tuple[int, ...]) -> dict[tuple[int, ...], str]:
    return layout.modules(layout.roles(len(shape)), dict(enumerate(shape)))


def _is_targeted(config: PeftConfig, layout: Layout, module: str) -> bool | None:
    """Whether the config says that a module is adapted; None where it does not say."""
    if isinstance(layout, Experts):
        return config.targets_parameter(pattern_name(layout, module))
    return config.targets(module)


def is_of_vocabulary(key: str, layout: Layout | None = None) -> bool:
    """Whether PEFT saves a tensor where the vocabulary was resized, whatever its config says."""
    module, _, parameter = key.rpartition(".")
    is_table = isinstance(layout, Embedding) or is_embedding(module) or is_head(module)
    return parameter == "weight" and is_table and not module.endswith(".base_layer")


def warn_of_vocabulary(path: object, key: str) -> None:
    """Says that a file replaces a tensor that its config does not list."""
    warnings.warn(
        f"{path}: has the whole of `{key}`, which its config does not list. PEFT saves it so where "
        "the vocabulary was resized; it replaces that of the base.",
        AdapterWarning,
        stacklevel=4,
    )


def _may_be_whole(config: PeftConfig, key: str) -> bool:
    module, _, parameter = key.rpartition(".")
    if config.saves(module):
        return True
    adapted = module.endswith(".base_layer")
    return parameter == "bias" and (config.bias == "all" or (adapted and config.bias != "none"))


def _check_needless(
    source: Source, key: str, slots: Mapping[str, _Slot], names: Layouts, shapes: _Shapes
) -> None:
    """Lets pass what PEFT writes without need; anything else is an error."""
    name, path = source.tensors[key], source.file.path
    module = key.removesuffix(".base_layer.weight")
    factors = _factors_of(source, module) & slots.keys()
    if module != key and factors:
        parameter = slots[min(factors)].path
        _check_copy(source, name, module, names[parameter], shapes[parameter])
        return
    for mark, what in _NOT_PLAIN.items():
        if mark in key:
            raise UnsupportedAdapterError(path, f"`{name}` is of an adapter that is {what}.")
    if match := FACTOR.search(key):
        module = key[: match.start()]
        known = [slot_key.removesuffix(match[0]) for slot_key in slots if match[0] in slot_key]
        raise AdapterMismatchError(
            path, f"adapts the module `{module}`, which `names` has not.{near(module, known)}"
        )
    raise AdapterMismatchError(
        path, f"has `{name}`, which is no factor and fits no parameter in `names`."
    )


def _check_copy(
    source: Source, name: str, module: str, layout: Layout, shape: tuple[int, ...]
) -> None:
    """Lets pass an adapted embedding or head, which PEFT saves once more as it is in the base."""
    path = source.file.path
    if not isinstance(layout, Embedding) and module.rpartition(".")[2] not in _SAVED_AGAIN:
        raise AdapterFileError(path, f"`{name}` would replace a base weight.")
    found = source.file.entries[name].shape
    wanted = packed_shape(layout.whole(layout.roles(len(shape))), dict(enumerate(shape)))
    if found != wanted:
        raise AdapterMismatchError(
            path,
            f"has `{name}` of shape {found}, where the base has {wanted}: it belongs to a base of "
            "another vocabulary.",
        )


def _factors_of(source: Source, module: str) -> set[str]:
    keys = ("lora_A.weight", "lora_B.weight", "lora_embedding_A", "lora_embedding_B")
    return {f"{module}.{key}" for key in keys} & source.tensors.keys()


def _check_complete(
    source: Source, layout: Layout, shape: tuple[int, ...], tensors: Mapping[_Slot, str]
) -> None:
    """Every entry of a stack has both its factors, or is whole."""
    path = next(iter(tensors)).path
    keys = {slot.key for slot in tensors}
    roles = layout.roles(len(shape))
    if keys != {_WHOLE}:
        if _WHOLE in keys:
            raise AdapterFileError(
                source.file.path, f"has factors and a whole weight for `{path}`."
            )
        keys = {factor.key for factor in _factors(source, layout, roles)}
    for index, module in _modules(layout, shape).items():
        for key in keys:
            if _Slot(path, index, key) not in tensors:
                raise AdapterFileError(
                    source.file.path,
                    f"lacks `{module}.{layout.parameter if key == _WHOLE else key}`, beside "
                    f"`{next(iter(tensors.values()))}`.",
                )


def _check_targets(source: Source, found: _Found, names: Layouts, shapes: _Shapes) -> None:
    """What the config says is adapted, and what has tensors, are the same modules."""
    config, path = source.config, source.file.path
    for parameter, layout in names.items():
        keys = {slot.key for slot in found.get(parameter, ())}
        roles = layout.roles(len(shapes[parameter]))
        for module in _modules(layout, shapes[parameter]).values():
            if config.saves(module) and keys != {_WHOLE}:
                raise AdapterFileError(
                    path,
                    f"`modules_to_save` of its config has `{module}`, but the file lacks "
                    f"`{module}.{layout.parameter}`.",
                )
            if not layout.factors(roles) or config.saves(module):
                continue
            targeted = _is_targeted(config, layout, module)
            if targeted is False and keys - {_WHOLE}:
                raise AdapterFileError(
                    path,
                    f"has factors for `{module}`, which is no target in its config; PEFT would "
                    "ignore them.",
                )
            if targeted and not keys - {_WHOLE}:
                raise AdapterFileError(
                    path, f"lacks the factors of `{module}`, which is a target in its config."
                )


def _specs(source: Source, found: _Found, names: Layouts, shapes: _Shapes) -> dict[str, Adapter]:
    """The adapter, without arrays, of each parameter that has factors."""
    specs: dict[str, Adapter] = {}
    for path, slots in found.items():
        if any(slot.key == _WHOLE for slot in slots):
            continue
        layout = names[path]
        roles = layout.roles(len(shapes[path]))
        settings = [
            _settings(source, pattern_name(layout, module))
            for module in _modules(layout, shapes[path]).values()
        ]
        if any(other != settings[0] for other in settings):
            raise UnsupportedAdapterError(
                source.file.path,
                f"has other ranks or alphas for some modules that `{path}` stacks; they must be "
                "the same in all of them.",
            )
        rank, alpha, scaling = settings[0]
        plain = LoraWeight(
            None, None, rank, alpha, scaling, roles.inputs, roles.outputs, roles.shared
        )
        if source.config.use_dora and not layout.magnitude(roles):
            raise UnsupportedAdapterError(
                source.file.path,
                f"is DoRA, which PEFT does not have for `{path}` with a layout "
                f"{type(layout).__name__}.",
            )
        specs[path] = DoraWeight(plain, None) if source.config.use_dora else plain
    return specs


def _settings(source: Source, name: str) -> tuple[int, float | None, Any]:
    """Rank, alpha and scaling of a module."""
    config = source.config
    rank, alpha = config.rank(name), config.alpha(name)
    scaling = "rslora" if config.use_rslora else "standard"
    if name not in source.unsaid:
        return rank, alpha, scaling
    said = source.unsaid[name]
    if not math.isclose(
        _scale(rank, said["alpha"], said["scaling"]), _scale(rank, alpha, scaling), rel_tol=1e-9
    ):
        raise AdapterFileError(
            source.file.path, f"its header and its config disagree on the scale of `{name}`."
        )
    return rank, said["alpha"], said["scaling"]


def _scale(rank: int, alpha: float | None, scaling: str) -> float:
    divisor = math.sqrt(rank) if scaling == "rslora" else rank
    return 1.0 if alpha is None else alpha / divisor


class _Reader(NamedTuple):
    """One array of the tree, of which any part can be read."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    axes: tuple[int, ...]
    stack: tuple[int, ...]
    views: Mapping[tuple[int, ...], Array]  # one for each entry of the stack
    name: str
    file: TensorFile

    def read(self, index: Sequence[slice]) -> Array:
        """A part of it, checked."""
        size = dict(zip(self.axes, self.shape, strict=True))
        part = dict(zip(self.axes, index, strict=True))
        inner = tuple(part[d] for d in self.axes if d not in self.stack)
        picks = [range(*part[d].indices(size[d])) for d in self.stack]
        # Copies: the file may be replaced while the array lives.
        parts = [np.array(self.views[pick][inner]) for pick in itertools.product(*picks)]
        for array in parts:
            check_finite(self.file.path, self.name, array)
        if not self.stack:
            return parts[0]
        stacked = np.stack(parts).reshape(*map(len, picks), *parts[0].shape)
        order = [*self.stack, *(d for d in self.axes if d not in self.stack)]
        return stacked.transpose([order.index(d) for d in self.axes])


def _readers(
    source: Source,
    path: str,
    layout: Layout,
    shape: tuple[int, ...],
    spec: Any,
    tensors: Mapping[_Slot, str],
) -> dict[str, _Reader]:
    """The arrays of one parameter, each from its tensors."""
    roles = layout.roles(len(shape))
    sizes = dict(enumerate(shape))
    if spec is None:
        whole = layout.whole(roles)
        arrays = {_WHOLE: (path, tuple(range(len(shape))), whole)}
    else:
        sizes[RANK] = spec.rank
        layout = _with_sides(source, path, layout, sizes, tensors)
        axes = factor_axes(roles)
        arrays = {
            factor.key: (f"{path}/{factor.name}", axes[factor.name], factor.groups)
            for factor in _factors(source, layout, roles)
        }
    stack = layout.stack(roles)
    readers: dict[str, _Reader] = {}
    for key, (name, axes, groups) in arrays.items():
        rest = [d for d in axes if d not in stack]
        views = {
            slot.entry: unpack(_checked(source, tensor, groups, sizes), rest, groups, sizes)
            for slot, tensor in tensors.items()
            if slot.key == key
        }
        dtypes = {view.dtype for view in views.values()}
        if len(dtypes) > 1:
            raise UnsupportedAdapterError(
                source.file.path, f"has several types for the modules that `{path}` stacks."
            )
        whole_shape = tuple(sizes[d] for d in axes)
        readers[name] = _Reader(whole_shape, dtypes.pop(), axes, stack, views, name, source.file)
    return readers


def _checked(source: Source, name: str, groups: Groups, sizes: Mapping[int, int]) -> Array:
    """A tensor of the type and the shape that fit."""
    entry, path = source.file.entries[name], source.file.path
    if entry.dtype.name not in DTYPES:
        raise AdapterFileError(path, f"has `{name}` in {entry.dtype}, not {', '.join(DTYPES)}.")
    check_width(path, name, entry.dtype)
    wanted = packed_shape(groups, sizes)
    if entry.shape != wanted:
        note = f" at the rank {sizes[RANK]} of its config" if RANK in sizes else ""
        if is_of_vocabulary(name) and entry.shape[1:] == wanted[1:]:
            note += ": its vocabulary was resized. Resize the base's embedding and head likewise"
        raise AdapterMismatchError(
            path, f"has `{name}` of shape {entry.shape}; the parameter takes {wanted}{note}."
        )
    return source.file.view(name)


def _with_sides(
    source: Source,
    path: str,
    layout: Layout,
    sizes: Mapping[int, int],
    tensors: Mapping[_Slot, str],
) -> Layout:
    """The layout; for experts, with inputs and outputs as the shapes of their factors tell."""
    if not isinstance(layout, Experts) or layout.swapped is not None:
        return layout
    roles = layout.roles(len(sizes) - 1)
    fan_in, fan_out = (math.prod(sizes[d] for d in axes) for axes in (roles.inputs, roles.outputs))
    if source.written_here:
        return layout
    if fan_in == fan_out:
        raise UnsupportedAdapterError(
            source.file.path,
            f"`{path}` has as many inputs as outputs, so that nothing tells which of the two PEFT "
            "took for which. Say it in `names`: Experts(…, swapped=True), or False.",
        )
    first = next(name for slot, name in tensors.items() if slot.key == "lora_A.weight")
    shape = source.file.entries[first].shape
    return dataclasses.replace(layout, swapped=bool(shape) and shape[-1] == fan_out)
