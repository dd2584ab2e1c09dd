"""Converts ordinary PyTorch tensors that a module creates or holds to constants in JAX."""

import warnings
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import torch
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree

from .._errors import ModuleWarning
from ._arrays import numpy_of


class Constants(TorchFunctionMode):
    """If an operator is called on tensors of both torchax and PyTorch, converts the latter.

    A parameter that is used under another reference than the module's attribute, such as a list or
    a closure, is replaced by its array.

    Args:
        env: the torchax environment.
        values: torchax's tensors, by the id of the parameter that they replace.
    """

    def __init__(self, env: Any, values: Mapping[int, torch.Tensor]) -> None:
        super().__init__()
        self._env = env
        self._values = values

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves = _pytree.tree_leaves((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        if any(id(tensor) in self._values for tensor in tensors):
            args, kwargs = _pytree.tree_map(
                lambda leaf: self._values.get(id(leaf), leaf), (args, kwargs)
            )
            tensors = [self._values.get(id(tensor), tensor) for tensor in tensors]
        ours = [tensor for tensor in tensors if hasattr(tensor, "jax")]
        if ours and len(ours) < len(tensors):
            args, kwargs = _pytree.tree_map(self._constant, (args, kwargs))
        return func(*args, **kwargs)

    def _constant(self, value: Any) -> Any:
        is_other = isinstance(value, torch.Tensor) and not hasattr(value, "jax")
        if not is_other or value.device.type == "meta":
            return value
        if value.requires_grad:
            warnings.warn(
                f"a tensor {tuple(value.shape)} that requires a gradient is used, and is not a "
                "parameter of the module: it is a constant of the function. Register it, or the "
                "module that has it, as an attribute of the module.",
                ModuleWarning,
                stacklevel=2,
            )
        # Scalars are left as they are: torchax treats them as numbers.
        return value if value.ndim == 0 else self._env.j2t_iso(jnp.asarray(numpy_of(value)))
