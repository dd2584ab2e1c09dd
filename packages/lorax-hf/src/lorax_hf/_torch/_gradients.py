"""What PyTorch does not differentiate, `detach` and `no_grad`, is not differentiated in JAX either.

torchax 0.0.13 takes both for the identity: values are right, and gradients are not, for instance
those of a straight-through estimator.
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
        # In place: what was changed in place under `no_grad` is the same object.
        value._elem = jax.lax.stop_gradient(elem)
    return value
