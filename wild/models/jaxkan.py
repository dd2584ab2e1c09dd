"""Kolmogorov-Arnold networks: each edge has a scale and a coefficient for each basis function."""

from typing import Any

from jaxkan.models.ActNet import ActNet
from jaxkan.models.KAN import KAN

from ..catalog import Subject, model
from ..frameworks import nnx, normal

SIZES = [4, 7, 3]


def network(module: Any) -> Subject:
    return nnx(module, lambda module, x: module(x), 0.5 * normal(6, SIZES[0]))


@model("KAN of splines")
def splines() -> Subject:
    return network(KAN(SIZES, "spline", {"k": 3, "G": 5}))


@model("KAN of Chebyshev polynomials")
def chebyshev() -> Subject:
    return network(KAN(SIZES, "chebyshev", {"D": 5}))


@model("ActNet")
def actnet() -> Subject:
    return network(ActNet([4, 7, 8, 3]))
