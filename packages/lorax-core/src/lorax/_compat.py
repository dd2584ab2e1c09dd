"""Everything that differs between JAX versions; the only file that uses more than public JAX.

Each function says which JAX version needs it and why. Rules and the interpreter use capabilities
(`bind`, `scan_split`) and never test for a version.
"""

import contextlib
import functools
from collections.abc import Callable, Generator, Hashable
from typing import Any

import jax
import jax.core
import jax.extend.core as jex
from jax._src import ad_checkpoint, core, pjit, shard_map, source_info_util
from jax._src.interpreters import ad
from jax._src.lax import lax as lax_internal, parallel, slicing

# `jax.extend.core.primitives` exports most primitives but, up to JAX 0.12, not those of these
# modules that a rule names. Some exist in newer versions only (`stack`, `unstack`, `tile` since
# 0.10); the two of checkpointing became public in 0.10.
_UNEXPORTED_HOMES = (lax_internal, slicing, parallel, ad_checkpoint, pjit, shard_map, core)


def find_primitive(name: str) -> jex.Primitive | None:
    """Returns the primitive called `name`, or None if this JAX does not have it."""
    for home in (jex.primitives, *_UNEXPORTED_HOMES):
        primitive = getattr(home, f"{name}_p", None)
        if isinstance(primitive, jex.Primitive):
            return primitive
    return None


def bind(eqn: jex.JaxprEqn, *operands: Any) -> list[Any]:
    """Evaluates one equation on `operands`, sub-jaxprs and effects included.

    `jax.extend.core.jaxpr_as_fun` on a one-equation jaxpr does the same through public names at
    about three times the trace time.
    """
    # Equations with bodies have several results, and JAX caches the derivatives of bodies itself.
    plain = not (eqn.effects or eqn.primitive.multiple_results)
    if plain and any(isinstance(operand, ad.LinearizeTracer) for operand in operands):
        return [_linearized_once(eqn.primitive, tuple(eqn.params.items()))(*operands)]
    return bind_params(eqn.primitive, eqn.params, *operands)


def bind_params(primitive: jex.Primitive, params: dict[str, Any], *operands: Any) -> list[Any]:
    """Evaluates a primitive with the parameters that it has in an equation."""
    bound = primitive.get_bind_params(params)
    # JAX < 0.10 returns (subfuns, params); later versions keep the functions among the params.
    subfuns, params = bound if isinstance(bound, tuple) else ((), bound)
    out = primitive.bind(*subfuns, *operands, **params)
    return list(out) if primitive.multiple_results else [out]


@functools.lru_cache(maxsize=4096)
def _linearized_once(
    primitive: jex.Primitive, params: tuple[tuple[str, Hashable], ...]
) -> Callable[..., Any]:
    """Returns a primitive as a function whose derivative JAX computes once for all equal equations.

    Reverse mode differentiates every bare equation separately, at several times the cost of tracing
    it (JAX 0.8 to 0.12), and caches derivatives of jitted functions only. The functions of
    `jax.numpy` are jitted for the same reason.
    """

    def function(*operands: Any) -> Any:
        return primitive.bind(*operands, **dict(params))

    function.__name__ = function.__qualname__ = primitive.name
    return jit_inlined(function)


def jit_inlined(function: Any, static_argnums: tuple[int, ...] = ()) -> Any:
    """`jax.jit` for a function that is traced once, and whose equations are copied into callers.

    JAX 0.12 has a mode for this. Since then, `inline=True` inlines only at lowering.
    """
    modes = getattr(jax, "Inline", None)
    inline = True if modes is None else modes.JAX_EARLY
    return jax.jit(function, static_argnums=static_argnums, inline=inline)


@contextlib.contextmanager
def equation_context(eqn: jex.JaxprEqn) -> Generator[None]:
    """Equations bound inside keep the user's source line, named scope and compute settings.

    No public name sets an equation's traceback (`jax.named_scope` sets only the scope).
    """
    stack = source_info_util.current_name_stack() + eqn.source_info.name_stack
    context = source_info_util.user_context(eqn.source_info.traceback, name_stack=stack)
    with context, eqn.ctx.manager:
        yield


def is_tracer(value: Any) -> bool:
    """Whether a value is being traced; `jax.core` is the only home of its class."""
    return isinstance(value, jax.core.Tracer)


def varying_axes(array: Any) -> frozenset[Any]:
    """Returns the manual mesh axes that a value varies over; unknown under `check_vma=False`.

    JAX 0.10 moved them to `manual_axis_type`; before, they were `vma` of the type itself.
    """
    typed = jax.typeof(array)
    return typed.vma if hasattr(typed, "vma") else typed.manual_axis_type.varying


def varied(array: Any, axes: frozenset[Any]) -> Any:
    """Returns a value that varies over these manual mesh axes (`pvary` before JAX 0.9)."""
    missing = tuple(axes - varying_axes(array))
    if not missing:
        return array
    pvary = getattr(jax.lax, "pvary", None)
    return jax.lax.pcast(array, missing, to="varying") if pvary is None else pvary(array, missing)


def source_line(eqn: jex.JaxprEqn) -> str:
    """Returns `file:line (function)` of the user's code behind an equation.

    Empty if a library made the equation. No public name provides it. JAX 0.8 caches the body of a
    jitted function with the frames of its first caller, so the search ends where the tracing of a
    body begins.
    """
    traceback = eqn.source_info.traceback
    for frame in traceback.frames if traceback else ():
        if source_info_util.is_user_filename(frame.file_name):
            return source_info_util.summarize(eqn.source_info)
        if frame.function_name.startswith("trace_to_jaxpr"):
            break
    return ""


def open_jaxpr(jaxpr: Any) -> tuple[Any, list[Any]]:
    """Returns the jaxpr and constants of an open or closed jaxpr (one class since JAX 0.11)."""
    if hasattr(jaxpr, "consts") and hasattr(jaxpr, "jaxpr"):
        return jaxpr.jaxpr, list(jaxpr.consts)
    return jaxpr, []


def scan_split(params: dict[str, Any]) -> tuple[int, int]:
    """Returns how many operands of a scan are constants, and how many are carried.

    JAX 0.12 replaced `num_consts` and `num_carry` by `ft_in`, the trees (consts, carry, xs).
    """
    if "ft_in" in params:
        consts, carry, _ = params["ft_in"].unpack()
        return len(list(consts)), len(list(carry))
    return params["num_consts"], params["num_carry"]


def rebind(function: Any, primitive: str, changes: dict[str, Any], *operands: Any) -> Any:
    """Calls `function`, which binds `primitive` once, with some of its parameters replaced.

    For parameters that no public function sets, such as `differentiated=True` of a checkpoint
    inside a gradient (all JAX versions).
    """
    closed, shapes = jax.make_jaxpr(function, return_shape=True)(*operands)
    (eqn,) = closed.jaxpr.eqns
    assert eqn.primitive is find_primitive(primitive), eqn.primitive
    values = dict(zip(closed.jaxpr.invars, operands, strict=True))
    values |= dict(zip(closed.jaxpr.constvars, closed.consts, strict=True))
    inputs = [v.val if isinstance(v, jex.Literal) else values[v] for v in eqn.invars]
    values |= zip(eqn.outvars, bind(eqn.replace(params=eqn.params | changes), *inputs), strict=True)
    outs = [v.val if isinstance(v, jex.Literal) else values[v] for v in closed.jaxpr.outvars]
    return jax.tree.unflatten(jax.tree.structure(shapes), outs)
