"""`quax.quaxify` of the plain model, with a `LoraArray` for each adapted weight."""

from typing import Any

import equinox as eqx
import jax
import quax
import quax.examples.lora

from adapted import Adapted, is_pair
from models import Model
from workloads import Lora, Workload


def with_quax(workload: Workload, model: Model, adapted: Adapted) -> Lora:
    """Keeps the weights in quax's arrays, and inserts the factors at each use."""
    arrays = jax.tree.map(as_lora_array, adapted.factors, model.params, is_leaf=is_pair)

    def apply(factors, arrays, x):
        params = jax.tree.map(with_factors, factors, arrays, is_leaf=is_pair)
        return quax.quaxify(model.apply)(params, x)

    return Lora(apply, adapted.factors, arrays)


def as_lora_array(f: Any, w: Any) -> Any:
    if f is None:
        return w
    return quax.examples.lora.LoraArray(w, rank=f["a"].shape[-1], key=jax.random.key(0))


def with_factors(f: Any, w: Any) -> Any:
    if f is None or (f["a"].shape, f["b"].shape) != (w.a.shape, w.b.shape):
        return w  # for other shapes, it adapts something else; let it raise its own error
    return eqx.tree_at(lambda w: (w.a, w.b), w, (f["a"], f["b"]))
