"""Converts ordinary PyTorch tensors that a module creates or holds to constants in JAX."""

from typing import Any

import jax.numpy as jnp
import torch
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree

from ._arrays import numpy_of


class Constants(TorchFunctionMode):
    """If an operator is called on tensors of both torchax and PyTorch, converts the latter."""

    def __init__(self, env: Any) -> None:
        super().__init__()
        self._env = env

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves = _pytree.tree_leaves((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        ours = [tensor for tensor in tensors if hasattr(tensor, "jax")]
        if ours and len(ours) < len(tensors):
            args, kwargs = _pytree.tree_map(self._constant, (args, kwargs))
        return func(*args, **kwargs)

    def _constant(self, value: Any) -> Any:
        # Scalars are left as they are: torchax treats them as numbers.
        is_other = isinstance(value, torch.Tensor) and not hasattr(value, "jax")
        if not is_other or value.ndim == 0 or value.device.type == "meta":
            return value
        return self._env.j2t_iso(jnp.asarray(numpy_of(value)))
