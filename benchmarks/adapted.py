"""A model with adapters: ours, and the same factors for hand-written LoRA."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

import lorax
from lorax.testing import random_factors
from models import Model


class Adapted(NamedTuple):
    """What `lora` and hand-written LoRA take."""

    ours: Callable[[Any, Any, Any], Any]  # (tunable, frozen, batch) -> output
    tunable: Any
    frozen: Any
    factors: Any  # {"a": …, "b": …} in the place of every adapted weight


def adapt(model: Model, kind: int | lorax.AdapterSpec) -> Adapted:
    """Random factors: those of `init_lora` have `b = 0`. A kind that is an int is a rank."""
    apply, params, batch = model.apply, model.params, model.batch
    kind = lorax.LoraSpec(kind) if isinstance(kind, int) else kind
    spec = lorax.infer_spec(apply, params, batch, spec=kind, where=model.where, skip_small=False)
    frozen, tunable = lorax.init_lora(params, spec, jax.random.key(2))
    # Small, so that many layers stay tame.
    tunable = jax.tree.map(lambda leaf: leaf / 8, random_factors(tunable, jax.random.key(3)))
    adapted = lorax.lora(apply, on_materialize="error", on_unused="error")

    def ours(tunable, frozen, batch):
        return adapted((frozen, tunable), batch)

    return Adapted(ours, tunable, frozen, as_factors(tunable))


def as_factors(tunable: Any) -> Any:
    return jax.tree.map(
        lambda weight: weight.factors(),
        tunable,
        is_leaf=lambda node: isinstance(node, lorax.Adapter),
    )


def is_pair(node: Any) -> bool:
    """Whether it is in the place of an adapted weight, or of one that is not adapted."""
    return node is None or (isinstance(node, dict) and set(node) == {"a", "b"})
