"""Functions of single codes that JAX sees as one equation.

Every pass over a program walks through all equations of a decoder, in each layer, forward and
backward. `jax.lax.platform_dependent` would even be a branch with the forms for all platforms.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import AxisType


def entrywise(
    name: str, form: Callable[..., jax.Array], *, tpu: Callable[..., jax.Array] | None = None
) -> Callable[..., jax.Array]:
    """Returns `form(codes, *, dtype, **settings)` as a function of one equation.

    The platform is chosen when a program is lowered, so that it can be compiled ahead of time for
    another platform.

    Args:
        name: the name of the equation.
        form: an entrywise function of codes, whose result has the dtype `dtype`.
        tpu: the same function as TPUs compute it, if they do it another way.
    """
    primitive = Primitive(name)
    # Outside jit, the primitive runs as a compiled program of one equation.
    settings = list(inspect.signature(form).parameters)[1:]
    compiled = jax.jit(primitive.bind, static_argnames=settings)

    @primitive.def_impl
    def _evaluate(codes: jax.Array, **settings: Any) -> jax.Array:
        with jax.disable_jit(False):  # else it would call itself
            return compiled(codes, **settings)

    primitive.def_abstract_eval(lambda codes, *, dtype, **_: codes.update(dtype=dtype))
    mlir.register_lowering(primitive, mlir.lower_fun(form, multiple_results=False))
    if tpu is not None:
        lowered = mlir.lower_fun(tpu, multiple_results=False)
        mlir.register_lowering(primitive, lowered, platform="tpu")
    batching.defvectorized(primitive)
    ad.defjvp(primitive, None)  # codes have no derivative

    def function(codes: jax.Array, **settings: Any) -> jax.Array:
        if AxisType.Explicit not in jax.typeof(codes).sharding.mesh.axis_types:
            return primitive.bind(codes, **settings)
        # For explicit axes, its own equations, as those inside a lowering have no mesh.
        default = functools.partial(form, **settings)
        if tpu is None:
            return default(codes)
        return jax.lax.platform_dependent(
            codes, tpu=functools.partial(tpu, **settings), default=default
        )

    return function
