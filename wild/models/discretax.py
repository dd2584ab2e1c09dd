"""State-space models: complex states from real parameters, with parallel scans."""

from typing import Any

import equinox as eqx
import jax
from discretax.models import LRU, S5, DeltaNet, LinOSS

from ..catalog import Subject, model
from ..frameworks import KEY, equinox, normal

WIDTH, STATE = 12, 10


def sequence(make: Any, **options: Any) -> Subject:
    module, state = eqx.nn.make_with_state(make)(KEY, hidden_dim=WIDTH, num_blocks=2, **options)

    def call(module: Any, x: jax.Array) -> jax.Array:
        run = eqx.nn.inference_mode(module)
        return jax.vmap(lambda x: run(x, state, KEY)[0], axis_name="batch")(x)

    return equinox(module, call, normal(3, 7, WIDTH))


@model("S5")
def s5() -> Subject:
    return sequence(S5, state_dim=STATE)


@model("LRU")
def lru() -> Subject:
    return sequence(LRU, state_dim=STATE)


@model("LinOSS")
def linoss() -> Subject:
    return sequence(LinOSS, state_dim=STATE)


@model("DeltaNet")
def deltanet() -> Subject:
    return sequence(DeltaNet, n_heads=2, chunk_size=7)
