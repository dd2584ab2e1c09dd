"""`quax.quaxify` of the plain model, with a `LoraArray` for every adapted weight."""

from typing import Any

import equinox as eqx
import jax
import quax
import quax.examples.lora

from adapted import Adapted, is_pair
from models import Model
from works import Lora, Work


def with_quax(work: Work, model: Model, adapted: Adapted) -> Lora:
    """Its arrays have the weights; the factors come into them where they are used."""
    arrays = jax.tree.map(array, adapted.factors, model.params, is_leaf=is_pair)

    def apply(factors, arrays, x):
        params = jax.tree.map(filled, factors, arrays, is_leaf=is_pair)
        return quax.quaxify(model.apply)(params, x)

    return Lora(apply, adapted.factors, arrays)


def array(f: Any, w: Any) -> Any:
    if f is None:
        return w
    return quax.examples.lora.LoraArray(w, rank=f["a"].shape[-1], key=jax.random.key(0))


def filled(f: Any, w: Any) -> Any:
    if f is None or (f["a"].shape, f["b"].shape) != (w.a.shape, w.b.shape):
        return w  # of other shapes, it adapts something else: let it say so itself
    return eqx.tree_at(lambda w: (w.a, w.b), w, (f["a"], f["b"]))
