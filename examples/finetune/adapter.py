"""The adapter alone in a safetensors file: one array per factor, named by its path."""

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from lorax import LoraSpec, init_lora, spec_from_rules


def save_adapter(path, tunable, rank, alpha):
    """Write the factors, with rank and alpha as metadata."""
    factors = {
        # safetensors writes the buffer as it lies, so a transposed view would be saved wrongly.
        _name(key_path): np.ascontiguousarray(factor)
        for key_path, factor in jax.tree_util.tree_leaves_with_path(tunable)
    }
    save_file(factors, path, metadata={"rank": str(rank), "alpha": str(alpha)})


def load_adapter(path, params):
    """Read the factors and return the pair `(frozen, tunable)` for the base model `params`."""
    with safe_open(path, "numpy") as file:
        metadata = file.metadata()
        factors = {name: file.get_tensor(name) for name in file.keys()}
    leaf = LoraSpec(rank=int(metadata["rank"]), alpha=float(metadata["alpha"]))
    spec = spec_from_rules(params, [(lambda weight: f"{weight}/a" in factors, leaf)])
    frozen, blank = init_lora(params, spec, jax.random.key(0))
    tunable = jax.tree_util.tree_map_with_path(
        lambda key_path, _: jnp.asarray(factors.pop(_name(key_path))), blank
    )
    if factors:
        raise ValueError(f"{path} has factors for weights that this model lacks: {sorted(factors)}")
    return frozen, tunable


def _name(key_path):
    return jax.tree_util.keystr(key_path, simple=True, separator="/")
