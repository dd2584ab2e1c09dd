"""Evaluates a jaxpr some of whose inputs are weights: reads, applies a rule, writes.

The interpreter contains no code for any particular primitive. The interface that rules use is in
`_equation`. Each use of a weight is recorded in `Interpreter.uses`.
"""

import collections
import copy
from collections.abc import Callable, Hashable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.extend.core as jex

from . import _compat, _reading
from ._coded import is_coded
from ._equation import BeforeBroadcast, Equation, Value
from ._factored import FactoredArray
from ._registry import CARRIERS, REASONS, unfit
from ._terms import Inexpressible
from ._uses import Use


class Interpreter:
    """One evaluation: the rules that it follows and a record of every use of a weight.

    Attributes:
        rules: the rule of each primitive.
        uses: the recorded uses, in order.
        transformed: a cache of jitted bodies that rules have transformed, shared between
            evaluations.
        drawn: per dropout source, how many independent masks have been drawn.
        through_custom_derivatives: whether functions with a custom derivative are evaluated on the
            factors, which drops their derivative rule.
        beside_data: returns whether an equation that joins arrays joins a weight with data.
    """

    def __init__(
        self,
        rules: Mapping[jex.Primitive, Callable[..., Any]],
        transformed: dict[Hashable, Any] | None = None,
        *,
        through_custom_derivatives: bool = False,
    ):
        self.rules = rules
        self.uses: list[Use] = []
        self.transformed = {} if transformed is None else transformed
        self.drawn = collections.Counter[Hashable]()
        self.through_custom_derivatives = through_custom_derivatives
        self.beside_data: Callable[[jex.JaxprEqn], bool] = lambda _: False

    def fork(self) -> "Interpreter":
        """Returns an interpreter with the same settings and an empty record."""
        # A shallow copy: rules, cache and settings are shared with the fork.
        other = copy.copy(self)
        other.uses = []
        other.drawn = collections.Counter()
        return other

    def run(self, jaxpr: Any, args: Sequence[Value]) -> list[Value]:
        """Evaluates an open or closed jaxpr and returns its outputs."""
        jaxpr, consts = _compat.open_jaxpr(jaxpr)
        values: dict[jex.Var, Value] = {}
        values |= zip(jaxpr.constvars, consts, strict=True)
        values |= zip(jaxpr.invars, args, strict=True)

        def read(atom: Any) -> Value:
            return values[atom] if _is_var(atom) else atom.val

        broadcasts = _broadcasts(jaxpr)

        def before_broadcast(atom: Any) -> tuple[Value, tuple[int, ...]] | None:
            # `live_equations` keeps the source alive as long as the broadcast, so it can still be
            # read.
            eqn = broadcasts.get(atom) if _is_var(atom) else None
            return eqn and (read(eqn.invars[0]), eqn.params["broadcast_dimensions"])

        for eqn, finished in live_equations(jaxpr, broadcasts):
            # Equations that rules emit keep the source line and the named scopes of the original
            # one.
            with _compat.equation_context(eqn):
                outs = self._evaluate(eqn, [read(v) for v in eqn.invars], before_broadcast)
            values |= zip(eqn.outvars, outs, strict=True)
            # Outside jit these are real buffers: free each after its last use.
            for v in finished:
                del values[v]
        return [read(v) for v in jaxpr.outvars]

    def returned(self, value: Value) -> jax.Array:
        """Returns a value as the caller gets it; a weight is materialized, which is recorded."""
        if not isinstance(value, FactoredArray):
            return value
        # Each parameter once, in order, also if several of its pieces are left.
        names = dict.fromkeys(name for names in value.sources for name in names)
        self.uses += (Use(name, "returned", "return", value.shape, "") for name in names)
        return _reading.decoded(value)

    def _evaluate(
        self, eqn: jex.JaxprEqn, operands: list[Value], before_broadcast: BeforeBroadcast
    ) -> list[Value]:
        if not any(isinstance(operand, FactoredArray) for operand in operands):
            # No weight among the operands: the equation is evaluated unchanged.
            return _compat.bind(eqn, *operands)
        equation = Equation(self, eqn, operands, before_broadcast)
        rule = self.rules.get(eqn.primitive)
        recorded = len(self.uses)
        reason = REASONS.get(eqn.primitive, "")
        if rule is not None:
            reason = unfit(rule, len(operands), eqn.params)
            if not reason and equation.joins_data:
                # A concatenation with activations, for example: the result is used as an
                # activation.
                reason = "joins it with data"
            if not reason and eqn.primitive not in CARRIERS and not all(map(_is_sum, operands)):
                # Rules registered without `gains=True` handle a base plus terms and nothing else.
                reason = "has no rule for a weight with a gain or dropout"
        out = NotImplemented
        if rule is not None and not reason:
            try:
                out = rule(equation, *operands, **eqn.params)
            except Inexpressible as inexpressible:
                reason = str(inexpressible)
        if out is NotImplemented:
            # The rule may have recorded uses before it gave up; `built` records the
            # materialization.
            del self.uses[recorded:]
            out = equation(*(equation.built(operand, reason) for operand in operands))
            outs = list(out) if eqn.primitive.multiple_results else [out]
            # An equation that is deferred on a quantized base returns a base, which is a weight
            # again.
            return [FactoredArray(out, ()) if is_coded(out) else out for out in outs]
        # Only now, because the rule may trace a body several times.
        for body in equation.bodies:
            equation.adopt(body.uses)
        return list(out) if eqn.primitive.multiple_results else [out]


def _broadcasts(jaxpr: Any) -> dict[jex.Var, jex.JaxprEqn]:
    """Returns the equations that broadcast an array, keyed by their output variable."""
    return {
        eqn.outvars[0]: eqn
        for eqn in jaxpr.eqns
        if eqn.primitive.name == "broadcast_in_dim" and len(eqn.invars) == 1
    }


def live_equations(
    jaxpr: Any, broadcasts: Mapping[jex.Var, jex.JaxprEqn] = MappingProxyType({})
) -> list[tuple[jex.JaxprEqn, set[jex.Var]]]:
    """Returns the equations that some output or effect depends on, and what each frees.

    JAX removes the others when it compiles; here they would be recorded as uses of a weight. The
    source of a broadcast is kept as long as the broadcast itself, because a rule may read it.
    """
    steps, needed = [], {v for v in jaxpr.outvars if _is_var(v)}
    for eqn in reversed(jaxpr.eqns):
        if eqn.effects or not needed.isdisjoint(eqn.outvars):
            reads = [v for v in eqn.invars if _is_var(v)]
            reads += [broadcasts[v].invars[0] for v in reads if v in broadcasts]
            # Walking backwards, the first reader met is the last one to run: it frees the variable.
            finished = {v for v in reads if _is_var(v)} - needed
            needed |= finished
            steps.append((eqn, finished))
    return steps[::-1]


def _is_sum(value: Value) -> bool:
    return not isinstance(value, FactoredArray) or value.is_sum


def _is_var(atom: Any) -> bool:
    return not isinstance(atom, jex.Literal)
