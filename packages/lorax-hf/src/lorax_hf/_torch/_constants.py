"""Tensors that a module makes or holds without the JAX device are constants of its function."""

from typing import Any

import jax.numpy as jnp
import torch
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree

from ._arrays import numpy_of


class Constants(TorchFunctionMode):
    """Where an operator meets tensors of both kinds, those of PyTorch become arrays."""

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
        # Those of no axes go on as numbers.
        is_other = isinstance(value, torch.Tensor) and not hasattr(value, "jax")
        if not is_other or value.ndim == 0 or value.device.type == "meta":
            return value
        return self._env.j2t_iso(jnp.asarray(numpy_of(value)))
