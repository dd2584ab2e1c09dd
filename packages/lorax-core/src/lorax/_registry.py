"""The rule table: which function handles an equation that reads a weight.

A rule gets the equation and its operands, plain arrays or `FactoredArray`s, and the parameters
it names:

    @defrule("transpose")
    def _transpose(eqn, weight, *, permutation):
        ...

`eqn(*arrays)` evaluates the original equation on plain arrays: the base always goes through it.
A rule returns the output (a list of them where the primitive has several), or `NotImplemented`
where this call is not covered, or the algebra of terms raises `Inexpressible`: then the
interpreter builds the weight in full and says so.

Parameters are named one by one, on purpose: a parameter that a new JAX adds is an error that
asks for a look, never a silent guess.
"""

from collections.abc import Callable
from typing import Any

from jax.extend.core import Primitive

from . import _compat
from ._terms import FactoredArray, Term

Rule = Callable[..., Any]

RULES: dict[Primitive, Rule] = {}


def defrule(*names: str) -> Callable[[Rule], Rule]:
    """Registers one rule for the primitives called `names` that this JAX has."""

    def register(rule: Rule) -> Rule:
        for name in names:
            primitive = _compat.find_primitive(name)
            if primitive is None:
                continue
            if primitive in RULES:
                raise ValueError(f"There is a rule for `{name}` already: {RULES[primitive]}.")
            RULES[primitive] = rule
        return rule

    return register


def defstructural(name: str, change: Callable[..., Term]) -> None:
    """A rule for a primitive that moves or cuts the axes of its one operand.

    `change(term, **params)` is the term of the result.
    """

    @defrule(name)
    def rule(eqn, weight, *others, **params):
        if any(isinstance(other, FactoredArray) for other in others):
            return NotImplemented
        terms = [change(term, *others, **params) for term in weight.terms]
        return eqn.settle(eqn(weight.base, *others), terms)


def defdirect(name: str) -> None:
    """A rule for a primitive that changes how a weight is stored and not what it is.

    The factors stay as they are: they meet their operand in the operand's dtype anyway.
    """

    @defrule(name)
    def rule(eqn, weight, **params):
        return eqn.settle(eqn(weight.base), weight.terms)
