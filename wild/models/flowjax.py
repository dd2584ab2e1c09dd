"""Normalizing flows: weights behind masks, norms and exponentials."""

from typing import Any

import jax.numpy as jnp
from flowjax.bijections import Affine
from flowjax.distributions import Normal
from flowjax.flows import (
    block_neural_autoregressive_flow,
    coupling_flow,
    masked_autoregressive_flow,
)

from ..catalog import Subject, model
from ..frameworks import KEY, equinox, normal

SIZE = 5


def density(flow: Any) -> Subject:
    return equinox(flow, lambda flow, x: flow.log_prob(x), normal(3, SIZE))


@model("masked autoregressive flow")
def masked() -> Subject:
    base = Normal(jnp.zeros(SIZE))
    return density(masked_autoregressive_flow(KEY, base_dist=base, flow_layers=2, nn_width=13))


@model("coupling flow")
def coupling() -> Subject:
    base = Normal(jnp.zeros(SIZE))
    options = {"transformer": Affine(), "flow_layers": 2, "nn_width": 13}
    return density(coupling_flow(KEY, base_dist=base, **options))


@model("block neural autoregressive flow")
def block() -> Subject:
    base = Normal(jnp.zeros(SIZE))
    return density(block_neural_autoregressive_flow(KEY, base_dist=base, nn_block_dim=3))
