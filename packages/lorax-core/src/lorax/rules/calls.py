"""Calls whose body is evaluated once where it is called: `jit`, `remat` and `closed_call`.

A weight is a pytree of arrays, so it is passed as an operand like any other. The parameters of
these primitives are never edited: the transformed body is passed to the public function, with every
option that the equation has.
"""

import dataclasses
from collections.abc import Hashable
from typing import Any, cast

import jax

from .. import _compat
from .._equation import Body
from .._factored import is_weight
from .._registry import defrule


@defrule("closed_call", gains=True)
def _closed_call(eqn, *args, call_jaxpr):
    return eqn.body(call_jaxpr)(*(eqn.with_own_keys(arg, of_body=True) for arg in args))


# Bodies that are often called several times: jit and remat


@dataclasses.dataclass(frozen=True)
class _Call:
    """A transformed body, as JAX calls it (`function`) and as the interpreter runs it (`body`)."""

    function: Any
    body: Body


def _call(eqn, key, args, jaxpr, finish, wrap):
    """Calls a transformed body, cached per body and structure of its weights.

    Inside the body, a weight is named by its position among the operands instead of its path, so
    that twelve layers that call one function share one transformed function.

    Args:
        eqn: the equation.
        key: distinguishes different ways to wrap the same body.
        args: arrays and weights.
        jaxpr: the body.
        finish: maps the body's outputs, as in `Equation.body`.
        wrap: applies `jax.jit` or `jax.checkpoint` to a function of flat arrays.
    """
    args = [eqn.with_own_keys(arg, of_body=True) for arg in args]
    sources = [names for arg in args if is_weight(arg) for names in arg.sources]
    args = with_sources(args, iter([(k,) for k in range(len(sources))]))
    # The structure has the labels and settings of each weight, and so is part of the key.
    leaves, structure = jax.tree.flatten(args)
    # `id` is safe: the cached `Body` keeps the jaxpr alive.
    whole_key: Hashable = (eqn.eqn.primitive, id(jaxpr), structure, *key)
    call = eqn.interpreter.transformed.get(whole_key)
    if call is None:
        body = Body(eqn, jaxpr, finish)

        def function(*leaves):
            return body(*jax.tree.unflatten(structure, leaves))

        call = eqn.interpreter.transformed[whole_key] = _Call(wrap(function), body)
    outs = call.function(*leaves)
    eqn.adopt(
        # Positions are translated back to the paths of this call.
        dataclasses.replace(use, source=source)
        for use in call.body.uses
        for source in sources[cast(int, use.source)]
    )
    out_sources = [names for out in outs if is_weight(out) for names in out.sources]
    return with_sources(
        outs,
        iter([tuple(s for k in local for s in sources[cast(int, k)]) for local in out_sources]),
    )


def with_sources(values, sources) -> list[Any]:
    """Returns the same weights with their pieces renamed in order."""
    return [value.with_sources(sources) if is_weight(value) else value for value in values]


@defrule("jit", gains=True)
def _jit(
    eqn,
    *args,
    jaxpr,
    in_shardings,
    out_shardings,
    in_layouts,
    out_layouts,
    donated_invars,
    ctx_mesh,
    name,
    keep_unused,
    inline,
    compiler_options_kvs,
):
    """Per-argument options of the equation, such as shardings, apply to the base only."""
    if any(layout is not None for layout in (*in_layouts, *out_layouts)):
        return NotImplemented
    pinned = [s if isinstance(s, jax.sharding.Sharding) else None for s in out_shardings]

    def finish(inside, outs):
        # An explicit output sharding is that of an array.
        return [
            out if sharding is None else inside.materialize(out)
            for out, sharding in zip(outs, pinned, strict=True)
        ]

    def wrap(function):
        function.__name__ = function.__qualname__ = name
        options: dict[str, Any] = {"keep_unused": keep_unused, "inline": inline}
        if compiler_options_kvs:
            options["compiler_options"] = dict(compiler_options_kvs)
        owner = [k for k, arg in enumerate(args) for _ in jax.tree.leaves(arg)]
        # An argument of the equation may be several leaves here: the base first, then factors.
        first = {k: i for i, k in reversed(list(enumerate(owner)))}
        if any(donated_invars):
            options["donate_argnums"] = [first[k] for k, gone in enumerate(donated_invars) if gone]
        if any(isinstance(s, jax.sharding.Sharding) for s in in_shardings):
            options["in_shardings"] = tuple(
                in_shardings[k]
                if first[k] == i and isinstance(in_shardings[k], jax.sharding.Sharding)
                else None
                for i, k in enumerate(owner)
            )
        if any(s is not None for s in pinned):
            options["out_shardings"] = pinned
        return jax.jit(function, **options)

    key = (
        tuple(in_shardings), tuple(out_shardings), donated_invars, name, keep_unused, inline,
        compiler_options_kvs,
    )  # fmt: skip
    return _call(eqn, key, args, jaxpr, finish, wrap)


@defrule("remat", gains=True)
def _remat(eqn, *args, jaxpr, prevent_cse, differentiated, policy):
    def wrap(function):
        checkpointed = jax.checkpoint(function, prevent_cse=prevent_cse, policy=policy)
        if not differentiated:
            return checkpointed
        # The recomputation inside a gradient that the model itself takes.
        return lambda *leaves: _compat.rebind(
            checkpointed, "remat", {"differentiated": True}, *leaves
        )

    key = (prevent_cse, differentiated, policy)
    return _call(eqn, key, args, jaxpr, None, wrap)
