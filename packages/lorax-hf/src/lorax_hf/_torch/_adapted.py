"""A PyTorch module that takes `(frozen, tunable)` in place of its parameters."""

from collections.abc import Collection
from typing import Any

import jax
import torch

import lorax
from lorax import ArgumentError

from .._pytorch import generate
from ._function import ModuleFunction
from ._state import refuse_without_values, state_of
from ._wrappers import unwrapped


class AdaptedModule:
    """A module as a JAX function under `lorax.lora`, called like the module.

    All other attributes are the module's: `adapted.config`, ….
    """

    def __init__(self, module: torch.nn.Module, function: ModuleFunction, **options: Any) -> None:
        self.module = module
        self.function = function
        self.options = options
        self._call = lorax.lora(function, **options)

    def __call__(self, *args: Any, params: Any, **kwargs: Any) -> Any:
        """The module's outputs: `adapted(input_ids, params=(frozen, tunable)).logits`."""
        return self._call(params, *args, **kwargs)

    def generate(self, ids: Any, *, params: Any, **options: Any) -> jax.Array:
        """`lorax_hf.generate` with the pair in place of the parameters."""
        return generate(self, params, ids, **options)

    def __getattr__(self, name: str) -> Any:
        if name == "module":
            raise AttributeError(name)
        return getattr(self.module, name)


def adapted(
    model: Any, *, train: bool = False, scan_layers: bool | Collection[str] = False, **options: Any
) -> AdaptedModule:
    """A module, or the function of one, under `lorax.lora` with these options."""
    if isinstance(model, ModuleFunction):
        if train or scan_layers:
            raise ArgumentError("lora: `train` and `scan_layers` are options of `from_torch`.")
        return AdaptedModule(model.module, model, **options)
    if not isinstance(model, torch.nn.Module):
        raise ArgumentError(f"lora takes a PyTorch module, not a {type(model).__name__}.")
    model = unwrapped(model)
    refuse_without_values(state_of(model).buffers)
    function = ModuleFunction(model, train=train, scan_layers=scan_layers)
    return AdaptedModule(model, function, **options)
