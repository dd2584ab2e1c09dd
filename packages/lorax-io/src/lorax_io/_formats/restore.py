"""Converts a `Source` to a pair of trees, after checking all of it."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from lorax import Adapter, LoraWeight, Pair

from .._disk.arrays import place as put, placements, shape_of
from .._disk.progress import track
from .._disk.tensors import check_finite, check_width
from .._errors import AdapterFileError, AdapterMismatchError, UnsupportedAdapterError
from .._places import Array, Axed, Factor, Groups, Place, axes_of, packed_shape, unpack
from .._shapes import blank_rows, complete
from .._torch_names import Experts, TorchNames
from .._tree import absent, filled, frozen_of, is_array, param_leaves, with_leaves
from .biases import changed_biases
from .peft.patterns import distrusted
from .slots import WHOLE, Slot, SlotTensors, find, is_of_vocabulary
from .source import Source, Stored
from .whole import DTYPES


class Restored(NamedTuple):
    """An adapter as rows of a tree, with the frozen factors that its file has."""

    rows: dict[str, Any]
    frozen: dict[str, dict[str, Any]]
    leaves: Mapping[str, Any]
    structure: Any

    def pair(self) -> Pair:
        """The pair `(frozen, tunable)`, including the frozen factors computed from the base."""
        frozen = {
            path: complete(path, row, self.leaves[path], self.frozen.get(path, {}))
            for path, row in self.rows.items()
            if isinstance(row, Adapter)
        }
        leaves = frozen_of(self.leaves, self.structure, self.rows, frozen)
        return Pair(leaves, with_leaves(self.structure, self.leaves, self.rows))


def restore(
    source: Source, params: Any, names: TorchNames, sharding: Any = None, *, alone: bool = False
) -> Restored:
    """Reads the adapter's arrays, and places them by `sharding`, or like their base.

    Args:
        source: the adapter.
        params: the base's parameters, or their shapes.
        names: the PyTorch name of each parameter, by path.
        sharding: as in `load_peft`.
        alone: whether the shapes come from the adapter, without a base; biases that depend on the
            base are then left out.
    """
    leaves, structure = param_leaves(params)
    places: dict[str, Place] = {}
    for path, torch_name in names.items():
        if not is_array(leaves.get(path)):
            raise AdapterMismatchError(f"`names` has `{path}`, {absent(path, leaves)}")
        places[path] = torch_name.at(path, leaves[path].shape)
    source = source._replace(tensors=source.tuner.spread(source.tensors, source.config, places))
    with distrusted():
        slots_of = find(source, places)
        specs = _specs(source, slots_of, places)
        biases = changed_biases(source, places, leaves, alone)
    weights, held_shapes = blank_rows(leaves, specs)
    readers: dict[str, _Reader] = {}
    for path, slots in slots_of.items():
        readers |= _readers(source, places[path], specs.get(path), slots)
    for path, views in biases.items():
        place = places[path]
        axes, dtype = tuple(range(len(place.shape))), leaves[path].dtype
        readers[path] = _Reader(place.shape, dtype, axes, place.stack, views, path)
    paths = dict.fromkeys((*slots_of, *biases))
    rows = {path: weights[path] if path in weights else shape_of(leaves[path]) for path in paths}
    frozen = {
        path: {name: shape for name, shape in shapes.items() if f"{path}/{name}" in readers}
        for path, shapes in held_shapes.items()
    }
    where = placements(rows, frozen, structure, leaves, sharding)
    loaded = {
        name: put(reader.shape, reader.dtype, reader.read, where[name])
        for name, reader in track(readers.items(), "Loading the adapter")
    }
    rows = {path: filled(path, row, loaded) for path, row in rows.items()}
    of = {
        path: {name: loaded[f"{path}/{name}"] for name in names} for path, names in frozen.items()
    }
    return Restored(rows, of, leaves, structure)


def _specs(
    source: Source, slots_of: SlotTensors, places: Mapping[str, Place]
) -> dict[str, Adapter]:
    """The adapter, without arrays, of each parameter with factors, by path."""
    specs: dict[str, Adapter] = {}
    for path, slots in slots_of.items():
        place, keys = places[path], {slot.key for slot in slots}
        if keys == {WHOLE}:
            _check_complete(place, slots, [WHOLE])
            continue
        if WHOLE in keys:
            raise AdapterFileError(f"has factors and a whole weight for `{path}`.")
        weight = _blank(source, place, slots)
        _check_complete(place, slots, [f.key for f in source.tuner.factors(place, weight)])
        specs[path] = weight
    return specs


def _blank(source: Source, place: Place, slots: Mapping[Slot, Stored]) -> Adapter:
    """The adapter without arrays; it must be the same for all stacked modules."""
    shapes: dict[tuple[int, ...], dict[str, tuple[int, ...]]] = {}
    for slot, tensor in slots.items():
        shapes.setdefault(slot.entry, {})[slot.key] = tensor.shape
    blanks = [
        _with_original_scaling(
            source,
            place.pattern_name(module),
            source.tuner.blank(place, source.config, module, shapes.get(entry, {})),
        )
        for entry, module in place.modules.items()
        if entry in shapes
    ]
    if any(other != blanks[0] for other in blanks):
        raise UnsupportedAdapterError(
            f"has other ranks or alphas for some modules that `{place.path}` stacks; they must be "
            "the same in all of them."
        )
    return blanks[0]


def _with_original_scaling(source: Source, name: str, weight: Any) -> Adapter:
    """The adapter with the alpha and scaling that `save_peft` was given."""
    settings = source.original_scaling.get(name)
    if settings is None or not isinstance(weight, LoraWeight):
        return weight
    form = settings["alpha"], settings["scaling"]
    original = LoraWeight(None, None, weight.rank, *form, *_sides(weight))
    if not math.isclose(original.scale, weight.scale, rel_tol=1e-9):
        raise AdapterFileError(f"its header and its config disagree on the scale of `{name}`.")
    return original


def _sides(weight: Adapter) -> tuple[Any, Any, Any]:
    shared, inputs, outputs = weight.axes
    return inputs, outputs, shared


def _check_complete(place: Place, tensors: Mapping[Slot, Stored], keys: Sequence[str]) -> None:
    """Checks that every stacked module has all of its tensors, and no others."""
    first = next(iter(tensors.values())).name
    for index, module in place.modules.items():
        for key in keys:
            if Slot(place.path, index, key) not in tensors:
                lacking = place.torch_name.parameter if key == WHOLE else key
                raise AdapterFileError(f"lacks `{module}.{lacking}`, but has `{first}`.")
    for slot, tensor in tensors.items():
        if slot.key not in keys:
            raise AdapterFileError(f"has `{tensor.name}`, which does not fit its other tensors.")


class _Reader(NamedTuple):
    """Reads any part of one array of the tree from the tensors that it stacks."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    axes: tuple[int, ...]
    stack: tuple[int, ...]
    views: Mapping[tuple[int, ...], Array]  # one for each entry of the stack
    name: str

    def read(self, index: Sequence[slice]) -> Array:
        """A copy of a part of the array, checked to be finite."""
        size = dict(zip(self.axes, self.shape, strict=True))
        part = dict(zip(self.axes, index, strict=True))
        inner = tuple(part[d] for d in self.axes if d not in self.stack)
        picks = [range(*part[d].indices(size[d])) for d in self.stack]
        # Copies: the file may be replaced while the array lives.
        parts = [np.array(self.views[pick][inner]) for pick in itertools.product(*picks)]
        for array in parts:
            check_finite(self.name, array)
        if not self.stack:
            return parts[0]
        stacked = np.stack(parts).reshape(*map(len, picks), *parts[0].shape)
        order = [*self.stack, *(d for d in self.axes if d not in self.stack)]
        return stacked.transpose([order.index(d) for d in self.axes])


def _readers(
    source: Source, place: Place, spec: Adapter | None, tensors: Mapping[Slot, Stored]
) -> dict[str, _Reader]:
    """The readers of one parameter's arrays, by name."""
    path = place.path
    if spec is None:
        axed = Axed({path: tuple(range(len(place.shape)))}, {})
        factors: tuple[Factor, ...] = (Factor(WHOLE, path, place.whole),)
    else:
        axes_in = axes_of(spec, place.shape)
        axed = Axed({f"{path}/{name}": axes for name, axes in axes_in.of.items()}, axes_in.sizes)
        place = _with_sides(source, place, tensors)
        factors = tuple(
            factor._replace(name=f"{path}/{factor.name}")
            for factor in source.tuner.factors(place, spec)
        )
    sizes = place.sizes | axed.sizes
    readers: dict[str, _Reader] = {}
    for key, name, groups in factors:
        axes = axed.of[name]
        # A frozen factor may lack the stacked axes: all modules then share it.
        kept = [k for k, d in enumerate(place.stack) if d in axes]
        rest = [d for d in axes if d not in place.stack]
        views = {
            tuple(slot.entry[k] for k in kept): unpack(
                _checked(tensor, groups, sizes), rest, groups, sizes
            )
            for slot, tensor in tensors.items()
            if slot.key == key
        }
        dtypes = {view.dtype for view in views.values()}
        if len(dtypes) > 1:
            raise UnsupportedAdapterError(
                f"has several types for the modules that `{path}` stacks."
            )
        shape = tuple(sizes[d] for d in axes)
        stack = tuple(place.stack[k] for k in kept)
        readers[name] = _Reader(shape, dtypes.pop(), axes, stack, views, name)
    return readers


def _checked(tensor: Stored, groups: Groups, sizes: Mapping[int, int]) -> Array:
    """A view of a tensor, checked to have a supported dtype and the expected shape."""
    if tensor.dtype.name not in DTYPES:
        raise AdapterFileError(f"has `{tensor.name}` in {tensor.dtype}, not {', '.join(DTYPES)}.")
    check_width(tensor.name, tensor.dtype)
    wanted = packed_shape(groups, sizes)
    if tensor.shape != wanted:
        inner = [sizes[axis] for group in groups for axis in group if axis < 0]
        note = f" at the rank {inner[0]} of its config" if inner else ""
        if is_of_vocabulary(tensor.name) and tensor.shape[1:] == wanted[1:]:
            note += (
                ": its vocabulary was resized. Resize the base's embedding and head to the same "
                "size"
            )
        raise AdapterMismatchError(
            f"has `{tensor.name}` of shape {tensor.shape}; the parameter takes {wanted}{note}."
        )
    return tensor.view()


def _with_sides(source: Source, place: Place, tensors: Mapping[Slot, Stored]) -> Place:
    """The place; for experts, with PEFT's swap of inputs and outputs, by the shape of `lora_A`."""
    torch_name = place.torch_name
    if not isinstance(torch_name, Experts) or torch_name.swapped is not None or source.written_here:
        return place
    fan_in, fan_out = place.axes.sizes(place.shape)
    if fan_in == fan_out:
        raise UnsupportedAdapterError(
            f"`{place.path}` has as many inputs as outputs, so it is ambiguous whether PEFT "
            "swapped them. Specify it in `names`: Experts(…, swapped=True), or False."
        )
    shape = next(tensor.shape for slot, tensor in tensors.items() if slot.key == "lora_A.weight")
    return place.with_torch_name(torch_name.with_swapped(bool(shape) and shape[-1] == fan_out))
