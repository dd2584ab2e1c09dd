"""Loops and branches. Other bodies are walked in place."""

from collections.abc import Sequence
from typing import Any

import jax.extend.core as jex

from .. import _compat
from .values import DATA, Part, Span, Value, merge
from .walk import Walk, rule, shape_of


@rule("scan")
def _scan(walk: Walk, eqn: jex.JaxprEqn, *values: Value) -> list[Value]:
    n_consts, n_carry = _compat.scan_split(eqn.params)
    consts, carry, stacked = (
        values[:n_consts], values[n_consts : n_consts + n_carry], values[n_consts + n_carry :]
    )  # fmt: skip
    # [layers, *axes] -> [*axes]: the layers are neither inputs nor outputs, so they are shared.
    slices = [value.move(lambda axes: axes[1:]) for value in stacked]
    body = eqn.params["jaxpr"]
    outs = walk.loop(lambda carry: walk.run_body(body, [*consts, *carry, *slices]), carry)

    def restack(value: Value, size: Any) -> Value:
        def widened(key: Any, part: Part) -> Part:
            # The results of the steps are stacked again along a new axis.
            first = Span(size, frozenset((0,)) if key is DATA else frozenset())
            return part.move(lambda axes: ((first,), *axes))

        return Value({key: widened(key, part) for key, part in value.parts.items()}, value.uses)

    steps = zip(outs[n_carry:], eqn.outvars[n_carry:], strict=True)
    return [*outs[:n_carry], *(restack(value, shape_of(v)[0]) for value, v in steps)]


@rule("while")
def _while(walk: Walk, eqn: jex.JaxprEqn, *values: Value) -> list[Value]:
    n_cond, n_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    cond_consts, consts, carry = (
        values[:n_cond],
        values[n_cond:][:n_body],
        values[n_cond + n_body :],
    )

    def step(carry: Sequence[Value]) -> list[Value]:
        walk.run_body(eqn.params["cond_jaxpr"], [*cond_consts, *carry])
        return walk.run_body(eqn.params["body_jaxpr"], [*consts, *carry])

    return walk.loop(step, carry)


@rule("cond")
def _cond(walk: Walk, eqn: jex.JaxprEqn, index: Value, *values: Value) -> list[Value]:
    branches = [walk.run_body(branch, values) for branch in eqn.params["branches"]]
    outs = [walk.beside(eqn, each) for each in zip(*branches, strict=True)]
    return [
        merge([out, walk.lost(eqn, index, shape_of(v))])
        for out, v in zip(outs, eqn.outvars, strict=True)
    ]
