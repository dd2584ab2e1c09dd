"""Biases that change with the adapter of their layer's weight, such as under IA³.

`lorax` adapts weights only, so such a bias becomes a parameter that is trained in full. Its value
depends on the base's bias, which must therefore be given.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from .._errors import UnsupportedAdapterError
from .._places import Array, Place, unpack
from .._torch_names import Tensor
from .source import Source
from .whole import whole_tensors


def is_bias(place: Place) -> bool:
    """Whether a parameter is the bias of a module."""
    return isinstance(place.torch_name, Tensor) and place.torch_name.parameter == "bias"


def changed_biases(
    source: Source, places: Mapping[str, Place], leaves: Mapping[str, Any], alone: bool
) -> dict[str, dict[tuple[int, ...], Array]]:
    """The changed biases by path, each by its index into the stack.

    Args:
        source: the adapter.
        places: the places of all parameters that it may adapt.
        leaves: the base's parameters.
        alone: whether there is no base; changed biases are then left out.

    Raises:
        UnsupportedAdapterError: if only the shape of a changed bias is given.
    """
    changed: dict[str, dict[tuple[int, ...], Array]] = {}
    for path, place in places.items():
        if not is_bias(place) or not any(_is_changed(source, m) for m in place.modules.values()):
            continue
        if isinstance(leaves[path], jax.ShapeDtypeStruct):
            if alone:
                continue
            raise UnsupportedAdapterError(
                f"changes the bias `{path}` by its value in the base, but got only its shape. "
                "Pass the parameters themselves."
            )
        own = {module: tensor for module, _, tensor in whole_tensors(place, leaves[path])}
        rest = [d for d in range(len(place.shape)) if d not in place.stack]
        changed[path] = {
            index: unpack(
                _changed(source, module, own[module]).astype(leaves[path].dtype),
                rest,
                place.whole,
                place.sizes,
            )
            for index, module in place.modules.items()
        }
    return changed


def _is_changed(source: Source, module: str) -> bool:
    return source.tuner.bias(source.tensors, source.config, module) is not None


def _changed(source: Source, module: str, bias: Array) -> Array:
    """The bias that PEFT uses: the file's or else the base's, changed by the adapter."""
    keys = (f"{module}.base_layer.bias", f"{module}.bias")
    tensor = next((source.tensors[key] for key in keys if key in source.tensors), None)
    if tensor is not None:
        bias = tensor.view()
    change = source.tuner.bias(source.tensors, source.config, module)
    return bias if change is None else change(bias.astype(np.float64))
