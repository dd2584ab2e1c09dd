"""Puts arrays on devices, with the sharding that the user gives for each."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding

from lorax import ArgumentError

# One sharding, shardings by name, or a function of name and shape; None leaves it to JAX.
Placement = Sharding | Mapping[str, Sharding] | Callable[[str, tuple[int, ...]], Any] | None


def sharding_of(sharding: Placement, name: str, shape: tuple[int, ...]) -> Any:
    """The sharding of one parameter."""
    if sharding is None or isinstance(sharding, Sharding):
        return sharding
    if isinstance(sharding, Mapping):
        if name not in sharding:
            raise ArgumentError(f"`sharding` has no entry for the parameter `{name}`.")
        return sharding[name]
    return sharding(name, shape)


def placed(array: np.ndarray[Any, Any], sharding: Any) -> jax.Array:
    """Puts a NumPy array on its devices; it must not be written to afterwards."""
    return jax.device_put(array, sharding)
