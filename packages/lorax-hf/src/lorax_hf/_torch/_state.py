"""The parameters and buffers of a module, and a copy of the module without them."""

import copy
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch

from lorax import ArgumentError


class State(NamedTuple):
    """The tensors of a module, by name."""

    parameters: dict[str, torch.Tensor]  # a tied parameter has only its first name
    buffers: dict[str, torch.Tensor]  # including tensors that are plain attributes


def state_of(module: torch.nn.Module) -> State:
    """The registered parameters of a module, and all of its other tensors as buffers."""
    parameters: dict[str, torch.Tensor] = {
        names[0]: parameter for names, parameter in _named(module)
    }
    for name, parameter in parameters.items():
        if isinstance(parameter, torch.nn.parameter.UninitializedParameter):
            raise ArgumentError(
                f"`{name}` of a lazy module has no shape yet; call the module once in PyTorch."
            )
    known = {id(parameter) for parameter in parameters.values()}
    buffers = {k: v for k, v in module.named_buffers() if id(v) not in known}
    known |= {id(buffer) for buffer in buffers.values()}
    for name, tensor in _attributes(module):
        if id(tensor) not in known:
            buffers[name] = tensor
            known.add(id(tensor))
    return State(parameters, buffers)


def refuse_without_values(tensors: Mapping[str, torch.Tensor]) -> None:
    """Raises if a tensor is on the meta device."""
    for name, tensor in tensors.items():
        if tensor.device.type == "meta":
            raise ArgumentError(
                f"`{name}` is on the meta device and has no values; `lorax_hf.load_torch` reads "
                "them from files."
            )


def _attributes(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors that are plain attributes of a module, not registered as parameters or buffers."""
    for prefix, owner in module.named_modules():
        for name, value in vars(owner).items():
            if isinstance(value, torch.Tensor):
                yield f"{prefix}.{name}" if prefix else name, value


def without_weights(module: torch.nn.Module, state: State) -> torch.nn.Module:
    """A copy of a module with its tensors on the meta device, where they take no memory."""
    memo: dict[int, Any] = {}
    for tensor in state.parameters.values():
        empty = torch.empty_like(tensor.detach(), device="meta")
        memo[id(tensor)] = torch.nn.Parameter(empty, requires_grad=tensor.requires_grad)
    for tensor in state.buffers.values():
        memo[id(tensor)] = torch.empty_like(tensor.detach(), device="meta")
    return copy.deepcopy(module, memo)


def tied_names(module: torch.nn.Module) -> dict[str, list[str]]:
    """The further names of each tied parameter, by its first name."""
    return {first: others for (first, *others), _ in _named(module) if others}


def _named(module: torch.nn.Module) -> list[tuple[list[str], torch.nn.Parameter]]:
    """Each parameter with all of its names; the name in an embedding comes first."""
    names: dict[int, list[str]] = {}
    parameters: dict[int, torch.nn.Parameter] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
        parameters[id(parameter)] = parameter

    def is_not_a_table(name: str) -> bool:
        owner = module.get_submodule(name.rpartition(".")[0])
        return not isinstance(owner, torch.nn.Embedding)

    return [(sorted(names[key], key=is_not_a_table), parameters[key]) for key in names]
