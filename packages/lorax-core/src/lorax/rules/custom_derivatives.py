"""Functions with a custom derivative: `custom_jvp` and `custom_vjp`.

By default, a weight that enters such a function is materialized. If the user asks to run through
it, the function itself is evaluated on weights, and its derivative rule is dropped.
"""

from .._registry import defrule
from .._terms import Inexpressible


def _run_through(eqn, body, args):
    if not eqn.interpreter.through_custom_derivatives:
        raise Inexpressible(
            "has a custom derivative rule (with through_custom_derivatives=True, lora runs the "
            "function on the factors instead)"
        )
    return eqn.body(body)(*args)


@defrule("custom_jvp_call")
def _custom_jvp_call(eqn, *args, call_jaxpr, jvp_jaxpr_fun, num_consts, symbolic_zeros):
    return _run_through(eqn, call_jaxpr, args)


@defrule("custom_vjp_call")
def _custom_vjp_call(
    eqn, *args, call_jaxpr, fwd_jaxpr_thunk, num_consts, bwd, out_trees, symbolic_zeros
):
    return _run_through(eqn, call_jaxpr, args)
