"""The parameters of a module as JAX arrays."""

from typing import Any

import jax
import numpy as np
import torch

from ._arrays import numpy_of
from ._layers import Members
from ._place import Placement, placed, sharding_of
from ._state import refuse_without_values, state_of


def parameters_of(
    module: torch.nn.Module, members: Members, sharding: Placement = None, dtype: Any = None
) -> dict[str, jax.Array]:
    """A copy of each parameter, by name, with those of scanned layers stacked."""
    tensors, buffers = state_of(module)
    refuse_without_values({**tensors, **buffers})
    parameters: dict[str, jax.Array] = {}
    for name, parts in members.items():
        arrays = [numpy_of(tensors[part], dtype) for part in parts]
        array = arrays[0] if parts == (name,) else np.stack(arrays)
        parameters[name] = placed(array, sharding_of(sharding, name, array.shape))
    return parameters
