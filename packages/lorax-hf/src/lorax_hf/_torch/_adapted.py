"""A PyTorch module that takes the pair in place of its parameters."""

from typing import Any

import torch

import lorax

from ._function import ModuleFunction


class AdaptedModule:
    """A module as a JAX function under `lorax.lora`, called as the module is.

    What is not a call is the module's own: `adapted.config`, ….
    """

    def __init__(self, module: torch.nn.Module, *, train: bool = False, **options: Any) -> None:
        self.module = module
        self._call = lorax.lora(ModuleFunction(module, train=train), **options)

    def __call__(self, *args: Any, params: Any, **kwargs: Any) -> Any:
        """The module's outputs: `adapted(input_ids, params=(frozen, tunable)).logits`."""
        return self._call(params, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name == "module":
            raise AttributeError(name)
        return getattr(self.module, name)


def adapted(module: Any, **options: Any) -> AdaptedModule:
    """The module under `lorax.lora`, with its options and `train`."""
    if not isinstance(module, torch.nn.Module):
        raise TypeError(f"lora takes a PyTorch module, not a {type(module).__name__}.")
    return AdaptedModule(module, **options)
