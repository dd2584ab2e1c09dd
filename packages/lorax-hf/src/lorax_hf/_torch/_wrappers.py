"""Modules that only wrap another one, and those that cannot be run as a function."""

import warnings
from typing import Any

import torch
from torch import nn

from lorax import ArgumentError

from .._errors import ModuleWarning

# The attribute of a wrapper, by the name of its class, that is the module it runs.
_WRAPPED = {
    "torch._dynamo.eval_frame.OptimizedModule": "_orig_mod",  # of `torch.compile`
    "torch.nn.parallel.data_parallel.DataParallel": "module",
    "torch.nn.parallel.distributed.DistributedDataParallel": "module",
}
# Classes that do not have whole parameters, or whose forward pass is not in Python.
_REFUSED = {
    "torch.distributed.fsdp.fully_sharded_data_parallel.FullyShardedDataParallel": (
        "each of its parameters is only a shard. Pass the module from before it was wrapped"
    ),
    "torch.jit._script.ScriptModule": (
        "its forward pass is not in Python. Pass the module that it was made from"
    ),
}


def unwrapped(module: Any) -> nn.Module:
    """The module that a wrapper, such as that of `torch.compile`, runs; another one as it is.

    Raises:
        ArgumentError: if it is not a module, or it or one in it cannot be run as a function of its
            parameters.
    """
    if not isinstance(module, nn.Module):
        raise ArgumentError(f"expected a torch.nn.Module, not {type(module).__name__}.")
    while (attribute := _entry(module, _WRAPPED)) is not None:
        module = getattr(module, attribute)
    for name, owner in module.named_modules():
        if reason := _entry(owner, _REFUSED):
            where = f"`{name}`" if name else "the module"
            raise ArgumentError(f"{where} is a {type(owner).__name__}, and {reason}.")
    return module


def _entry(module: nn.Module, table: dict[str, str]) -> str | None:
    names = (f"{cls.__module__}.{cls.__qualname__}" for cls in type(module).__mro__)
    return next((table[name] for name in names if name in table), None)


def warn_of_backward_hooks(module: nn.Module) -> None:
    """Warns of hooks of PyTorch's backward pass, which JAX does not run."""
    named = [
        *module.named_modules(),
        *module.named_parameters(),
    ]
    hooked = [name or "the module" for name, owner in named if _has_backward_hooks(owner)]
    if hooked:
        more = f" and {len(hooked) - 1} more" if len(hooked) > 1 else ""
        warnings.warn(
            f"`{hooked[0]}`{more} of {type(module).__name__} has hooks of the backward pass, which "
            "are not called in JAX. Change the gradients that `jax.grad` returns instead.",
            ModuleWarning,
            stacklevel=4,
        )


_HOOKS = ("_backward_hooks", "_backward_pre_hooks", "_post_accumulate_grad_hooks")


def _has_backward_hooks(owner: nn.Module | torch.Tensor) -> bool:
    return any(getattr(owner, name, None) for name in _HOOKS)
