"""The axes and the PyTorch names of the weights of each known class of modules.

A row of the table is a predicate on the module, the parameter's name and the parameter, and a
function that describes the weight. The axes of other classes are not known.
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
    torch_name: dict[str, Any]  # for lorax_io, without the module's name


def weight_of(module: nn.Module, name: str) -> Weight | None:
    """The axes and PyTorch name of a module's parameter; None if its class is not known."""
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
    """A parameter (experts, out, in), or (experts, in, out) if the class has `is_transposed`."""
    transposed = getattr(module, "is_transposed", False)
    axes = Axes((0,), (1,), (2,)) if transposed else Axes((0,), (2,), (1,))
    out_first = {} if transposed else {"out_first": True}
    order = order_of(module, name)
    return _of("experts", "Experts", axes, parameter=name, order=order, **out_first)


def order_of(module: nn.Module, name: str) -> int:
    """The position of a parameter among those of its module; PEFT wraps them in this order."""
    return [key for key, _ in module.named_parameters(recurse=False)].index(name)


def _of(kind: str, torch_name: str, axes: Axes, **more: Any) -> Weight:
    roles = {"in_axes": list(axes.inputs), "out_axes": list(axes.outputs)}
    if axes.shared:
        roles["shared_axes"] = list(axes.shared)
    return Weight(kind, axes, {"type": torch_name, **roles, **more})


def _is(*classes: type[nn.Module]) -> Callable[..., bool]:
    return lambda module, name, parameter: name == "weight" and isinstance(module, classes)


def _is_conv1d(module: nn.Module, name: str, parameter: torch.Tensor) -> bool:
    kind = type(module)
    return name == "weight" and (kind.__module__, kind.__name__) == (
        "transformers.pytorch_utils",
        "Conv1D",
    )


def _is_experts(module: nn.Module, name: str, parameter: torch.Tensor) -> bool:
    # transformers sets `is_transposed` on every class of experts that it can run as a grouped
    # matmul. Classes with a forward pass of their own are recognized by name.
    by_name = type(module).__name__.endswith(("ParallelExperts",))
    return parameter.ndim == 3 and (hasattr(module, "is_transposed") or by_name)


_CLASSES: tuple[tuple[Callable[..., bool], Callable[..., Weight]], ...] = (
    (_is(nn.Linear), _linear),
    (_is_conv1d, _conv1d),
    (_is(nn.Embedding, nn.EmbeddingBag), _embedding),
    (_is(nn.Conv1d, nn.Conv2d, nn.Conv3d), _conv),
    (_is_experts, _experts),
)
