"""A model adapted by `lora`, and the same factors for hand-written LoRA."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

import lorax
from lorax.testing import random_factors
from models import Model


class Adapted(NamedTuple):
    """An adapted model, and what hand-written LoRA needs to compute the same."""

    apply: Callable[[Any, Any, Any], Any]  # (tunable, frozen, batch) -> output
    tunable: Any
    frozen: Any
    factors: Any  # {"a": …, "b": …} in place of each adapted weight


def adapt(model: Model, kind: int | lorax.AdapterSpec) -> Adapted:
    """Adapts with random factors, since `init_lora` sets `b = 0`. An integer `kind` is a rank."""
    apply, params, batch = model.apply, model.params, model.batch
    kind = lorax.LoraSpec(kind) if isinstance(kind, int) else kind
    spec = lorax.infer_spec(apply, params, batch, spec=kind, where=model.where, skip_small=False)
    frozen, tunable = lorax.init_lora(params, spec, jax.random.key(2))
    # Scaled down, so that activations stay bounded over many layers.
    tunable = jax.tree.map(lambda leaf: leaf / 8, random_factors(tunable, jax.random.key(3)))
    adapted = lorax.lora(apply, on_materialize="error", on_unused="error")

    def apply_adapted(tunable, frozen, batch):
        return adapted((frozen, tunable), batch)

    return Adapted(apply_adapted, tunable, frozen, as_factors(tunable))


def as_factors(tunable: Any) -> Any:
    return jax.tree.map(
        lambda weight: weight.factors(),
        tunable,
        is_leaf=lambda node: isinstance(node, lorax.Adapter),
    )


def is_pair(node: Any) -> bool:
    """Whether a node replaces a weight: a pair of factors, or None where it is not adapted."""
    return node is None or (isinstance(node, dict) and set(node) == {"a", "b"})
