"""Equivariant networks: one weight for each pair of irreducible representations."""

from typing import Any

import e3nn_jax as e3nn
import flax.linen as nn
import jax

from ..catalog import Subject, model
from ..frameworks import KEY, linen, normal

INPUTS = e3nn.Irreps("4x0e + 7x1o + 2x2e")


class Equivariant(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, radii: jax.Array) -> jax.Array:
        nodes = e3nn.IrrepsArray(INPUTS, x)
        mixed = e3nn.flax.Linear("6x0e + 9x1o")(nodes)
        edges = e3nn.tensor_product(mixed, e3nn.normal("1o + 2e", KEY, (x.shape[0],)))
        weighed = e3nn.flax.MultiLayerPerceptron([10, edges.irreps.num_irreps], jax.nn.gelu)(radii)
        return e3nn.flax.Linear("8x0e + 2x1o")(edges * weighed).array


@model("linear layers, tensor product, radial MLP")
def equivariant() -> Subject:
    return linen(Equivariant(), normal(11, INPUTS.dim), normal(11, 4))


class PerSpecies(nn.Module):
    @nn.compact
    def __call__(self, species: jax.Array, x: jax.Array) -> jax.Array:
        nodes = e3nn.IrrepsArray(INPUTS, x)
        own: Any = e3nn.flax.Linear("6x0e + 9x1o", num_indexed_weights=3)
        return own(species, nodes).array


@model("linear layer with weights for each species")
def species() -> Subject:
    return linen(PerSpecies(), jax.numpy.arange(11) % 3, normal(11, INPUTS.dim))
