"""Graph networks on Flax NNX."""

from typing import Any

import jax.numpy as jnp
from flax.nnx import Rngs
from jraphx.nn.models import GAT, GCN

from ..catalog import Subject, model
from ..frameworks import nnx, normal

EDGES = jnp.array([[0, 1, 2, 3, 4, 0, 5, 6], [1, 2, 0, 4, 3, 3, 6, 5]])


def network(make: Any, **options: Any) -> Subject:
    module = make(4, 12, 2, 5, **options, rngs=Rngs(0))
    return nnx(module, lambda module, x: module(x, EDGES), normal(7, 4))


@model("graph convolution")
def gcn() -> Subject:
    return network(GCN)


@model("graph attention")
def gat() -> Subject:
    return network(GAT, heads=3)
