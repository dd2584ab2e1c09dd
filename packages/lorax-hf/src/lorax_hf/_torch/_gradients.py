"""Stops gradients in JAX where PyTorch does: at `detach`, `data` and under `no_grad`.

torchax 0.0.13 treats these as the identity. Values are then correct but gradients are not, for
instance those of a straight-through estimator.
"""

from typing import Any

import jax
import torch
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree

OPERATORS = {torch.ops.aten.detach: jax.lax.stop_gradient}


class NoGradients(TorchFunctionMode):
    """Stops the gradient of everything that is computed under `torch.no_grad`."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        return result if torch.is_grad_enabled() else _pytree.tree_map(_stopped, result)


def _stopped(value: Any) -> Any:
    elem = getattr(value, "_elem", None)
    if isinstance(elem, jax.Array) and value.is_floating_point():
        # In place, since an operator that works in place has returned an existing tensor.
        value._elem = jax.lax.stop_gradient(elem)
    return value


def keep_types() -> None:
    """Makes `type_as` of torchax's tensors return a tensor; that of torchax converts its own."""
    from torchax.tensor import Tensor

    def converted(self: Any, other: torch.Tensor) -> Any:
        return self.to(other.dtype)

    Tensor.type_as = converted
