"""Warns of tensors that a module changes in a call, since a pure function does not keep changes."""

import warnings
from collections.abc import Collection, Mapping

import torch
from torch.nn.modules.batchnorm import _NormBase

from .._errors import ModuleWarning


def warn_of_changes(
    module: torch.nn.Module, before: Mapping[str, object], after: Mapping[str, torch.Tensor]
) -> None:
    """Warns of registered tensors whose arrays a call has replaced.

    Args:
        module: the module. The running statistics of its normalizations are left out, since
            `from_torch` has warned of them.
        before: the arrays before the call, by name.
        after: the tensors after it.
    """
    changed = [
        name
        for name, array in before.items()
        if getattr(after[name], "_elem", None) is not array and _is_kept(module, name)
    ]
    if changed:
        warnings.warn(
            f"{type(module).__name__} changes {_some(changed)} when it is called. The function is "
            "pure, so the change is used in this call and then dropped.",
            ModuleWarning,
            stacklevel=3,
        )


def _is_kept(module: torch.nn.Module, name: str) -> bool:
    """Whether PyTorch keeps a change of a tensor, and this package has not warned of it before."""
    path, _, attribute = name.rpartition(".")
    owner = module.get_submodule(path)
    registered = attribute in owner._buffers or attribute in owner._parameters
    return registered and not isinstance(owner, _NormBase)


def warn_of_derived(module: torch.nn.Module, names: Collection[str]) -> None:
    """Warns of attributes that were computed from parameters before the module was converted."""
    if names:
        warnings.warn(
            f"{_some(sorted(names))} of {type(module).__name__} was computed from parameters, and "
            "is a constant of the function. Compute it in `forward`.",
            ModuleWarning,
            stacklevel=3,
        )


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"`{names[0]}`{more}"
