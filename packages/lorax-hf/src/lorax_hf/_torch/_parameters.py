"""The parameters of a module as JAX arrays."""

from typing import Any

import jax
import torch

from ._arrays import numpy_of
from ._place import Placement, placed, sharding_of
from ._state import state_of


def parameters_of(
    module: torch.nn.Module, sharding: Placement = None, dtype: Any = None
) -> dict[str, jax.Array]:
    """A copy of each parameter, by name."""
    found: dict[str, jax.Array] = {}
    for name, tensor in state_of(module).parameters.items():
        if tensor.device.type == "meta":
            raise ValueError(
                f"`{name}` is on the meta device and has no values; `lorax_hf.load_torch` reads "
                "them from files."
            )
        wanted = sharding_of(sharding, name, tuple(tensor.shape))
        found[name] = placed(numpy_of(tensor, dtype), wanted)
    return found
