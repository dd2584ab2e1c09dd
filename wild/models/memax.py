"""Memory models: recurrences as scans over semigroups."""

import jax
import jax.numpy as jnp
from memax.equinox.train_utils import get_residual_memory_models

from ..catalog import Subject, model
from ..frameworks import KEY, equinox, normal


def memory(kind: str) -> Subject:
    module = get_residual_memory_models(5, 16, 3, num_layers=1, models=[kind], key=KEY)[kind]
    start = jnp.zeros(9, bool)

    def call(module, x: jax.Array) -> jax.Array:
        return jax.vmap(lambda x: module(module.initialize_carry(), (x, start), KEY)[1])(x)

    return equinox(module, call, normal(2, 9, 5))


@model("S6")
def s6() -> Subject:
    return memory("S6")


@model("fast and forgetful memory", single=True)
def ffm() -> Subject:
    return memory("FFM")


@model("gated DeltaNet")
def gdn() -> Subject:
    return memory("GDN")
