"""Graph networks, whose update functions are modules of Haiku."""

from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp
import jraph

from .. import frameworks
from ..catalog import Subject, model
from ..frameworks import normal

SENDERS = jnp.array([0, 1, 2, 3, 4, 0, 5, 6])
RECEIVERS = jnp.array([1, 2, 0, 4, 3, 3, 6, 5])


def graph(nodes: jax.Array, edges: Any) -> jraph.GraphsTuple:
    counts = {"n_node": jnp.array([3, 4]), "n_edge": jnp.array([3, 5])}
    ends = {"senders": SENDERS, "receivers": RECEIVERS, "globals": jnp.ones((2, 3), nodes.dtype)}
    return jraph.GraphsTuple(nodes=nodes, edges=edges, **ends, **counts)


@model("graph network with MLPs")
def network() -> Subject:
    def update(*sizes: int) -> Any:
        return jraph.concatenated_args(lambda x: hk.nets.MLP(sizes)(x))

    def forward(nodes: jax.Array, edges: jax.Array) -> Any:
        step = jraph.GraphNetwork(update(12, 9), update(14, 8), update(10, 5))
        out = step(graph(nodes, edges))
        return out.nodes, out.edges, out.globals

    return frameworks.haiku(forward, normal(7, 4), normal(8, 6))


@model("graph attention and graph convolution")
def attention() -> Subject:
    def forward(nodes: jax.Array) -> Any:
        attend = jraph.GAT(
            lambda nodes: hk.Linear(9)(nodes),
            lambda sent, received, edges: hk.Linear(1)(jnp.concatenate([sent, received], -1)),
        )
        convolve = jraph.GraphConvolution(lambda nodes: hk.Linear(5)(nodes))
        return convolve(attend(graph(nodes, None))).nodes

    return frameworks.haiku(forward, normal(7, 4))
