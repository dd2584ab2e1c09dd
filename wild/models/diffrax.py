"""Differential equations that contain a network. The solvers use custom derivatives."""

from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp

from ..catalog import Subject, model
from ..frameworks import KEY, equinox, normal


def ode(adjoint: Any) -> Subject:
    module = eqx.nn.MLP(4, 4, 11, 2, activation=jnp.tanh, key=KEY)

    def call(module: Any, x: jax.Array) -> jax.Array:
        term = diffrax.ODETerm(lambda t, y, args: args(y))
        solve = lambda y0: diffrax.diffeqsolve(  # noqa: E731
            *(term, diffrax.Heun(), 0.0, 1.0, 0.25, y0, module),
            stepsize_controller=diffrax.ConstantStepSize(),
            adjoint=adjoint,
            max_steps=8,
        )
        return jax.vmap(lambda y0: solve(y0).ys[-1])(x)

    return equinox(module, call, normal(3, 4))


@model("neural ODE, default adjoint")
def default() -> Subject:
    return ode(diffrax.RecursiveCheckpointAdjoint())


@model("neural ODE, direct adjoint")
def direct() -> Subject:
    return ode(diffrax.DirectAdjoint())
