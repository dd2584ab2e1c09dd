"""Infers the names and shapes of an adapter's parameters from its file, without a base."""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from .._errors import AdapterFileError, AdapterMismatchError, UnsupportedAdapterError
from .._places import RANK
from .._torch_names import (
    MAGNITUDE,
    Conv,
    Embedding,
    Experts,
    Linear,
    Parameter,
    Tensor,
    TorchName,
    TorchNames,
)
from .._tree import absent, is_array, param_leaves
from .peft.patterns import distrusted, suffixes
from .peft.tuners import FACTOR
from .peft.tuners.lora import BIAS
from .source import Source, shapes_of


def own_names(source: Source) -> dict[str, TorchName]:
    """A PyTorch name for each module of the adapter, by a path in Flax's convention."""
    if source.own:
        return {path: own.torch_name for path, own in source.own.items()}
    names: dict[str, TorchName] = {}
    experts = _experts(source)
    for key in source.tensors:
        match = FACTOR.search(key)
        if key in source.tuner.common or (match is not None and match[1] == MAGNITUDE):
            continue  # shared by all modules, or next to factors that are found anyway
        module = key[: match.start()] if match else key.rpartition(".")[0]
        module = module.removesuffix(".base_layer")
        path = module.replace(".", "/")
        adapted = next((experts[end] for end in suffixes(module) if end in experts), None)
        if match is not None and match[1] == BIAS:
            names[f"{path}/bias"] = Tensor(module)
        elif match is None:
            parameter = key.rpartition(".")[2]
            if not key.endswith(".base_layer.weight"):  # of an embedding, and as it is in the base
                names[f"{path}/{parameter}"] = Tensor(module, parameter=parameter)
        elif adapted is not None:
            of = key[: match.start()]
            names[f"{path}/{adapted}"] = _of_parameter(source, of, module, adapted)
        elif match[1] in source.tuner.tables:
            names[f"{path}/embedding"] = Embedding(module)
        elif f"{path}/kernel" not in names:
            shapes = shapes_of(source.tensors, module, source.tuner.marks)
            with distrusted():
                _, inputs = source.tuner.sides(shapes, source.config, module)
            names[f"{path}/kernel"] = Linear(module) if len(inputs) == 1 else Conv(module)
    return names


def names_on(source: Source, params: Any) -> dict[str, TorchName]:
    """The PyTorch names for a file that contains paths, with axes that fit the parameters."""
    if not source.own:
        raise AdapterMismatchError(
            "has the names of modules. Give `names`, which has them by path."
        )
    leaves, _ = param_leaves(params)
    torch_names: dict[str, TorchName] = {}
    for path, own in source.own.items():
        leaf: Any = leaves.get(path)
        if not is_array(leaf):
            raise AdapterMismatchError(f"adapts `{path}`, {absent(path, leaves)}")
        axes = own.axes(leaf.shape)
        if axes is None:
            raise AdapterMismatchError(
                f"has factors of `{path}` for axes {own.shape}, and it has {tuple(leaf.shape)}."
            )
        torch_names[path] = dataclasses.replace(own.torch_name, in_axes=axes[0], out_axes=axes[1])
    return torch_names


def _experts(source: Source) -> dict[str, str]:
    """The adapted parameter of each module of experts, by the end of the module's name."""
    parameters: dict[str, str] = {}
    for target in source.config.target_parameters or ():
        module, _, parameter = target.rpartition(".")
        if parameters.setdefault(module, parameter) != parameter:
            raise UnsupportedAdapterError(
                f"adapts several parameters of `{module}`, and does not say which factors are "
                "whose. Give names (`lorax_io.write_names`), with the order of each."
            )
    return parameters


def _of_parameter(source: Source, wrapped: str, module: str, parameter: str) -> TorchName:
    """The name of a parameter: a matrix, or a stack of experts, whose factors have more ranks."""
    shape = shapes_of(source.tensors, wrapped, source.tuner.marks).get("lora_A.weight", ())
    if shape and shape[0] == source.config.rank(f"{module}.{parameter}"):
        return Parameter(module, parameter=parameter)  # A stack of one expert looks the same.
    return Experts(module, parameter=parameter, shared_axes=(0,), swapped=False)


def own_shapes(source: Source, names: TorchNames) -> dict[str, Any]:
    """The shapes of the parameters that the adapter has tensors for, by path."""
    shapes = {
        path: own.shape
        if (own := source.own.get(path)) is not None and own.torch_name == torch_name
        else _own_shape(source, torch_name)
        for path, torch_name in names.items()
    }
    return {
        path: jax.ShapeDtypeStruct(shape, np.float32)
        for path, shape in shapes.items()
        if shape is not None
    }


def _own_shape(source: Source, torch_name: TorchName) -> tuple[int, ...] | None:
    """The shape of a named parameter, from its tensors; None if the file has none of them."""
    stack = _stack_sizes(source, torch_name)
    if stack is None:
        return None
    module = torch_name.first_module

    # PEFT wraps a module with a bias once, and a module of experts once for each parameter.
    most = 2 + len(source.config.target_parameters or ())
    wrapped = [module + ".base_layer" * k for k in range(most)]
    marks = () if isinstance(torch_name, Tensor) else source.tuner.marks
    shapes = next((s for m in wrapped if (s := shapes_of(source.tensors, m, marks))), None)
    if shapes is None:
        keys = [f"{m}.{torch_name.parameter}" for m in (*wrapped, f"{module}.lora_B")]
        whole = next((source.tensors[key].shape for key in keys if key in source.tensors), None)
        return (
            None if whole is None else _sized(torch_name, stack, whole, lambda place: place.whole)
        )
    with distrusted():
        if isinstance(torch_name, Experts):
            return _of_experts(source, torch_name, module, stack, shapes)
        out, inputs = source.tuner.sides(shapes, source.config, module)
    return _sized(torch_name, stack, (out, *inputs), lambda place: (place.outputs, *place.inputs))


def _of_experts(
    source: Source,
    torch_name: Experts,
    module: str,
    stack: tuple[int, ...],
    shapes: Mapping[str, Any],
) -> tuple[int, ...]:
    rank = source.config.rank(f"{module}.{torch_name.parameter}")
    sizes: dict[int, int] = {}
    place = torch_name.at(module, (1,) * (len(stack) + 3))
    for factor in place.factors:
        shape = shapes.get(factor.key, ())
        if len(shape) != len(factor.groups):
            raise AdapterFileError(
                f"has no two factors of `{module}` that fit each other and {torch_name}."
            )
        for size, group in zip(shape, factor.groups, strict=True):
            axes = [axis for axis in group if axis != RANK]
            if len(axes) == 1:
                sizes[axes[0]] = size // rank if RANK in group else size
    sizes |= dict(zip(place.stack, stack, strict=True))
    return tuple(_unsure(module, sizes, len(place.shape)))


def _sized(
    torch_name: TorchName, stack: tuple[int, ...], shape: tuple[int, ...], groups: Any
) -> Any:
    """The parameter's shape, from a tensor each of whose axes is one axis of the parameter."""
    try:
        place = torch_name.at(torch_name.module, (1,) * (len(stack) + len(shape)))
        axis_groups = groups(place)
    except AdapterMismatchError as error:  # The parameter has more axes than its tensors.
        raise _unknown_sizes(torch_name.module) from error
    sizes = dict(zip(place.stack, stack, strict=True))
    if len(axis_groups) == len(shape):
        for size, group in zip(shape, axis_groups, strict=True):
            if len(group) == 1:
                sizes[group[0]] = size
    return tuple(_unsure(torch_name.module, sizes, len(place.shape)))


def _unsure(module: str, sizes: Mapping[int, int], ndim: int) -> list[int]:
    if sorted(sizes) != list(range(ndim)):
        raise _unknown_sizes(module)
    return [sizes[axis] for axis in sorted(sizes)]


def _unknown_sizes(module: str) -> AdapterMismatchError:
    return AdapterMismatchError(
        f"does not say how large each of the axes is that are one in `{module}`. Load it in Python "
        "(`lorax_io.load_peft`), with the parameters."
    )


def _stack_sizes(source: Source, torch_name: TorchName) -> tuple[int, ...] | None:
    """How many modules of the file a name stacks along each axis; None if it has none of them."""
    parts = map(re.escape, torch_name.module.split("{}"))
    pattern = re.compile(r"(\d{1,9})".join(parts) + r"\.")
    matches = [match for key in source.tensors if (match := pattern.match(key))]
    if not matches:
        return None
    numbers = [tuple(map(int, match.groups())) for match in matches]
    if torch_name.numbers is not None:
        if lacking := set(torch_name.numbers) - {number for (number,) in numbers}:
            raise AdapterFileError(f"lacks `{torch_name.module.format(min(lacking))}`.")
        return (len(torch_name.numbers),)
    sizes = tuple(1 + max(group) for group in zip(*numbers, strict=True))
    if math.prod(sizes) > len(matches):
        raise AdapterFileError(f"lacks some of the modules `{torch_name.module}`.")
    return sizes
