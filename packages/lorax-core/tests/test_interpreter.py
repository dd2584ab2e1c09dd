"""The interpreter by itself, with a toy table of two rules."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import primitives

from lorax import _compat
from lorax._factored import FactoredArray
from lorax._interpreter import Interpreter
from lorax._terms import Inexpressible, Label, Term


def toy_weight(source="w", rank=2, shape=(5, 3)):
    i, o, r = Label(0, shape[0]), Label(1, shape[1]), Label(2, rank)
    a, b = jnp.ones((shape[0], rank)), jnp.full((rank, shape[1]), 2.0)
    return FactoredArray(
        jnp.zeros(shape), (Term((a, b), ((i, r), (r, o)), ((i,), (o,)), (source,)),)
    )


def transpose(eqn, value, *, permutation):
    return FactoredArray(eqn(value.base), tuple(t.permute(permutation) for t in value.terms))


def negate(eqn, value):
    return FactoredArray(eqn(value.base), tuple(term.scale(-1) for term in value.terms))


TOY_RULES = {primitives.transpose_p: transpose, primitives.neg_p: negate}


def run(fn, *args, rules=TOY_RULES) -> tuple[Interpreter, list[Any]]:
    interpreter = Interpreter(rules)
    shapes = [arg.base if isinstance(arg, FactoredArray) else arg for arg in args]
    return interpreter, interpreter.run(jax.make_jaxpr(fn)(*shapes), args)


def test_rules_are_applied_in_order():
    interpreter, (out,) = run(lambda w: -w.T, toy_weight())
    assert isinstance(out, FactoredArray) and out.shape == (3, 5)
    assert np.allclose(out.array(), -4.0 * np.ones((3, 5)))
    assert not interpreter.uses


def test_a_primitive_without_a_rule_materializes_and_is_recorded():
    interpreter, (out,) = run(lambda w: jnp.sin(w), toy_weight())
    assert np.allclose(out, np.sin(4.0))
    (use,) = interpreter.uses
    assert (use.source, use.kind, use.primitive, use.shape) == ("w", "materialized", "sin", (5, 3))
    assert "test_interpreter.py" in use.line


@pytest.mark.parametrize("refusal", ["returns", "raises"])
def test_a_refused_equation_materializes(refusal):
    def rule(eqn, value):
        if refusal == "raises":
            raise Inexpressible
        return NotImplemented

    interpreter, (out,) = run(lambda w: -w, toy_weight(), rules={primitives.neg_p: rule})
    assert np.allclose(out, -4.0)
    assert [use.kind for use in interpreter.uses] == ["materialized"]


def test_other_errors_of_a_rule_are_not_swallowed():
    def rule(eqn, value):
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        run(lambda w: -w, toy_weight(), rules={primitives.neg_p: rule})


def test_equations_without_weights_are_bound_unchanged():
    calls = []
    rules = {primitives.sin_p: lambda *args, **kwargs: calls.append(args)}
    _, (out, w) = run(lambda w, x: (jnp.sin(x), w), toy_weight(), jnp.ones(7), rules=rules)
    assert not calls and np.allclose(out, np.sin(1.0)) and isinstance(w, FactoredArray)


def test_literals_constants_and_repeated_outputs():
    constant = jnp.arange(7.0)

    def fn(w, x):
        y = x + constant
        return y, y, w, 3.0

    _, outs = run(fn, toy_weight(), jnp.ones(7))
    assert np.allclose(outs[0], outs[1]) and isinstance(outs[2], FactoredArray)
    assert float(outs[3]) == 3.0


def test_rule_with_several_results():
    def split_factors(eqn, value, *, sizes, axis):
        return ["first", "second"]

    rules = {_compat.find_primitive("split"): split_factors}
    _, outs = run(lambda w: jax.lax.split(w, (2, 3)), toy_weight(), rules=rules)
    assert outs == ["first", "second"]


def test_rule_can_get_the_operand_before_its_broadcast():
    """The interpreter remembers the operand of a broadcast for as long as it keeps the result."""
    shapes = []

    def rule(eqn, value, array, **params):
        shapes.append((array.shape, eqn.narrow(1).shape))
        assert np.allclose(jnp.broadcast_to(eqn.narrow(1), array.shape), array)
        return value

    def fn(w, x, y):
        rows = jnp.broadcast_to(jnp.sin(x)[:, None], (5, 3))
        w = w * rows
        return w * jnp.broadcast_to(y, (5, 3)) * jnp.cos(rows), rows.sum()

    run(fn, toy_weight(), jnp.arange(5.0), jnp.ones(()), rules={primitives.mul_p: rule})
    assert shapes == [((5, 3), (5, 1)), ((5, 3), (1, 1)), ((5, 3), (5, 3))]


def test_returned_weights_are_materialized():
    interpreter, (out,) = run(lambda w: w.T, toy_weight())
    assert np.allclose(interpreter.returned(out), 4.0)
    assert [use.kind for use in interpreter.uses] == ["returned"]
    assert interpreter.returned(jnp.ones(2)).shape == (2,)


def test_names_and_lines_of_equations_are_kept():
    def fn(w, x):
        with jax.named_scope("inner"):
            return jnp.sin(x), w

    interpreter = Interpreter(TOY_RULES)
    closed = jax.make_jaxpr(fn)(jnp.zeros((5, 3)), jnp.ones(7))
    again = jax.make_jaxpr(lambda x: interpreter.run(closed, [toy_weight(), x])[0])(jnp.ones(7))
    (eqn,) = [eqn for eqn in again.jaxpr.eqns if eqn.primitive is primitives.sin_p]
    assert "inner" in str(eqn.source_info.name_stack)
