"""How each class of modules uses its weight: which axes are inputs, and the layout on disk.

A row of the table is a class, the parameter that it concerns, and a function of the module and the
parameter. A class that is in no row says nothing about its axes.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from lorax import Axes


class Weight(NamedTuple):
    """A parameter that is multiplied or looked up."""

    kind: str  # "linear", "embedding", "conv" or "experts"
    axes: Axes
    layout: dict[str, Any]  # less the module


def weight_of(module: nn.Module, name: str) -> Weight | None:
    """The role of a module's parameter; None where the class is not known."""
    parameter = getattr(module, name)
    for matches, describe in _CLASSES:
        if matches(module, name, parameter):
            return describe(module, name, parameter)
    return None


def _linear(module: nn.Module, name: str, parameter: torch.Tensor) -> Weight:
    """A weight (out, in)."""
    return _of("linear", "Linear", Axes((), (1,), (0,)))


def _conv1d(module: nn.Module, name: str, parameter: torch.Tensor) -> Weight:
    """A weight (in, out)."""
    return _of("linear", "Conv1D", Axes((), (0,), (1,)))


def _embedding(module: nn.Module, name: str, parameter: torch.Tensor) -> Weight:
    """A weight (vocabulary, features)."""
    return _of("embedding", "Embedding", Axes((), (0,), (1,)))


def _conv(module: Any, name: str, parameter: torch.Tensor) -> Weight:
    """A weight (out, in / groups, *window)."""
    window = tuple(range(2, parameter.ndim))
    grouped = {"grouped": True} if module.groups > 1 else {}
    return _of("conv", "Conv", Axes((), (1, *window), (0,)), channel_axis=1, **grouped)


def _experts(module: Any, name: str, parameter: torch.Tensor) -> Weight:
    """A parameter (experts, out, in), or (experts, in, out) where the class says so."""
    transposed = getattr(module, "is_transposed", False)
    axes = Axes((0,), (1,), (2,)) if transposed else Axes((0,), (2,), (1,))
    out_first = {} if transposed else {"out_first": True}
    order = order_of(module, name)
    return _of("experts", "Experts", axes, parameter=name, order=order, **out_first)


def order_of(module: nn.Module, name: str) -> int:
    """Where a parameter is among those of its module, which PEFT wraps in this order."""
    return [key for key, _ in module.named_parameters(recurse=False)].index(name)


def _of(kind: str, layout: str, axes: Axes, **more: Any) -> Weight:
    roles = {"in_axes": list(axes.inputs), "out_axes": list(axes.outputs)}
    if axes.shared:
        roles["shared_axes"] = list(axes.shared)
    return Weight(kind, axes, {"layout": layout, **roles, **more})


def _is(*classes: type[nn.Module]) -> Callable[..., bool]:
    return lambda module, name, parameter: name == "weight" and isinstance(module, classes)


def _is_conv1d(module: nn.Module, name: str, parameter: torch.Tensor) -> bool:
    kind = type(module)
    return name == "weight" and (kind.__module__, kind.__name__) == (
        "transformers.pytorch_utils",
        "Conv1D",
    )


def _is_experts(module: nn.Module, name: str, parameter: torch.Tensor) -> bool:
    # transformers gives `is_transposed` to every class of experts that it may run as a grouped
    # product; the other names are of classes whose forward pass is their own.
    by_name = type(module).__name__.endswith(("ParallelExperts",))
    return parameter.ndim == 3 and (hasattr(module, "is_transposed") or by_name)


_CLASSES: tuple[tuple[Callable[..., bool], Callable[..., Weight]], ...] = (
    (_is(nn.Linear), _linear),
    (_is_conv1d, _conv1d),
    (_is(nn.Embedding, nn.EmbeddingBag), _embedding),
    (_is(nn.Conv1d, nn.Conv2d, nn.Conv3d), _conv),
    (_is_experts, _experts),
)
