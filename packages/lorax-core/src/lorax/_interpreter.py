"""Evaluates a jaxpr some of whose inputs are weights: read, apply a rule, write.

It knows no primitive. What a rule needs of its equation stands in `Equation`; what became of
each weight is kept in `Interpreter.uses`.
"""

import collections
import copy
import dataclasses
import functools
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp

from . import _coded, _compat, _contract
from ._coded import is_coded
from ._factored import FactoredArray, times_gain
from ._paid import fold_keys
from ._registry import CARRIERS, REASONS, unfit
from ._terms import Inexpressible
from ._uses import Use

Value = jax.Array | FactoredArray

# What an operand was broadcast from, and which of its axes the other's are; None where it was not.
_BeforeBroadcast = Callable[[Any], tuple[Value, tuple[int, ...]] | None]


class Interpreter:
    """One evaluation: the rules it follows, and a record of what became of every weight.

    `transformed` keeps what rules made of bodies that may be met again; an evaluation may share
    it with the next one. `through_custom_derivatives` says whether a weight goes into functions
    with a derivative of their own, which is then left out. `beside_data` says of an equation that
    joins arrays whether data are among them.
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
        """One that works alike and has a record of its own."""
        other = copy.copy(self)
        other.uses = []
        other.drawn = collections.Counter()
        return other

    def run(self, jaxpr: Any, args: Sequence[Value]) -> list[Value]:
        """The outputs of an open or closed jaxpr."""
        jaxpr, consts = _compat.open_jaxpr(jaxpr)
        values: dict[jex.Var, Value] = {}
        values |= zip(jaxpr.constvars, consts, strict=True)
        values |= zip(jaxpr.invars, args, strict=True)

        def read(atom: Any) -> Value:
            return values[atom] if _is_var(atom) else atom.val

        broadcasts = _broadcasts(jaxpr)

        def before_broadcast(atom: Any) -> tuple[Value, tuple[int, ...]] | None:
            eqn = broadcasts.get(atom) if _is_var(atom) else None
            return eqn and (read(eqn.invars[0]), eqn.params["broadcast_dimensions"])

        for eqn, finished in live_equations(jaxpr, broadcasts):
            with _compat.equation_context(eqn):
                outs = self._evaluate(eqn, [read(v) for v in eqn.invars], before_broadcast)
            values |= zip(eqn.outvars, outs, strict=True)
            # Outside jit these are real buffers: free each after its last use.
            for v in finished:
                del values[v]
        return [read(v) for v in jaxpr.outvars]

    def returned(self, value: Value) -> jax.Array:
        """A value as the function's caller gets it: a weight is built in full, and recorded."""
        if not isinstance(value, FactoredArray):
            return value
        names = dict.fromkeys(name for names in value.sources for name in names)
        self.uses += (Use(name, "returned", "return", value.shape, "") for name in names)
        return value.array()

    def _evaluate(
        self, eqn: jex.JaxprEqn, operands: list[Value], before_broadcast: _BeforeBroadcast
    ) -> list[Value]:
        if not any(isinstance(operand, FactoredArray) for operand in operands):
            return _compat.bind(eqn, *operands)
        equation = Equation(self, eqn, operands, before_broadcast)
        rule = self.rules.get(eqn.primitive)
        recorded = len(self.uses)
        reason = REASONS.get(eqn.primitive, "")
        if rule is not None:
            reason = unfit(rule, len(operands), eqn.params)
            if not reason and equation.joins_data:
                reason = "puts it beside data, to be used as the data are"
            if not reason and eqn.primitive not in CARRIERS and not all(map(_is_sum, operands)):
                reason = "has no rule for a weight with a gain or dropout"
        out = NotImplemented
        if rule is not None and not reason:
            try:
                out = rule(equation, *operands, **eqn.params)
            except Inexpressible as inexpressible:
                reason = str(inexpressible)
        if out is NotImplemented:
            del self.uses[recorded:]
            out = equation(*(equation.built(operand, reason) for operand in operands))
            outs = list(out) if eqn.primitive.multiple_results else [out]
            return [FactoredArray(out, ()) if is_coded(out) else out for out in outs]
        for body in equation.bodies:
            equation.adopt(body.uses)
        return list(out) if eqn.primitive.multiple_results else [out]


def _broadcasts(jaxpr: Any) -> dict[jex.Var, jex.JaxprEqn]:
    """The equations that broadcast an array, by what they make."""
    return {
        eqn.outvars[0]: eqn
        for eqn in jaxpr.eqns
        if eqn.primitive.name == "broadcast_in_dim" and len(eqn.invars) == 1
    }


def live_equations(
    jaxpr: Any, broadcasts: Mapping[jex.Var, jex.JaxprEqn] = MappingProxyType({})
) -> list[tuple[jex.JaxprEqn, set[jex.Var]]]:
    """The equations that an output or an effect depends on, each with what nothing needs after it.

    JAX drops the others when it compiles; here they would say that a weight is used. What a
    broadcast is made of is kept as long as the broadcast: a rule may ask for it.
    """
    steps, needed = [], {v for v in jaxpr.outvars if _is_var(v)}
    for eqn in reversed(jaxpr.eqns):
        if eqn.effects or not needed.isdisjoint(eqn.outvars):
            reads = [v for v in eqn.invars if _is_var(v)]
            reads += [broadcasts[v].invars[0] for v in reads if v in broadcasts]
            finished = {v for v in reads if _is_var(v)} - needed
            needed |= finished
            steps.append((eqn, finished))
    return steps[::-1]


def _is_sum(value: Value) -> bool:
    return not isinstance(value, FactoredArray) or value.is_sum


def _is_var(atom: Any) -> bool:
    return not isinstance(atom, jex.Literal)


# The primitives some of whose result's entries are those of one operand, and some of another.
_JOINING = frozenset(
    ["concatenate", "dynamic_update_slice", "scatter", "scatter-add", "select_n", "stack"]
)


class Equation:
    """What a rule may ask of the equation that it handles."""

    def __init__(
        self,
        interpreter: Interpreter,
        eqn: jex.JaxprEqn,
        operands: Sequence[Value] = (),
        before_broadcast: _BeforeBroadcast = lambda _: None,
    ):
        self.interpreter = interpreter
        self.eqn = eqn
        self._operands = operands
        self._before_broadcast = before_broadcast
        self.bodies: list[Body] = []

    def __call__(self, *operands: Any) -> Any:
        """Evaluates the original equation on plain arrays, or on bases that are held as codes.

        On such a base an equation waits where its result is still one; elsewhere the base is
        decoded for this equation alone.
        """
        coded = [k for k, operand in enumerate(operands) if is_coded(operand)]
        if coded and self._waits(operands):
            waiting = [self._narrowed(k, operand) for k, operand in enumerate(operands)]
            out = operands[coded[0]].deferred(self.eqn, coded[0], waiting)
        elif coded or any(isinstance(operand, FactoredArray) for operand in operands):
            out = _coded.evaluate(self.eqn, operands)
        else:
            out = _compat.bind(self.eqn, *operands)
        return out if self.eqn.primitive.multiple_results else out[0]

    def with_params(self, **changes: Any) -> "Equation":
        """The same equation with other parameters."""
        eqn = self.eqn.replace(params=self.eqn.params | changes)
        return Equation(self.interpreter, eqn, self._operands, self._before_broadcast)

    @functools.cached_property
    def joins_data(self) -> bool:
        """Whether this puts a weight beside data, as a concatenation does: it is data then."""
        name = self.eqn.primitive.name
        several = sum(isinstance(v, jex.Var) for v in self.eqn.invars) > 1
        return several and name in _JOINING and self.interpreter.beside_data(self.eqn)

    def narrow(self, position: int) -> jax.Array:
        """A plain operand, with a size of one along the axes that it was broadcast to."""
        operand = jnp.asarray(self._operands[position])
        source = self._before_broadcast(self.eqn.invars[position])
        if source is None or isinstance(source[0], FactoredArray):
            return operand
        shape = [1] * operand.ndim
        for size, axis in zip(jnp.shape(source[0]), source[1], strict=True):
            shape[axis] = size
        return jnp.reshape(source[0], shape)

    def _waits(self, operands: Sequence[Any]) -> bool:
        """Whether this waits on the codes among its operands instead of reading them."""
        return _coded.is_deferred(self.eqn, operands) and not self.joins_data

    def _narrowed(self, position: int, operand: Any) -> Any:
        """An operand as it was before it was broadcast, where it was: what waits is kept."""
        if len(self._operands) != len(self.eqn.invars) or operand is not self._operands[position]:
            return operand
        source = self._before_broadcast(self.eqn.invars[position])
        mesh = jax.typeof(operand).sharding.mesh
        if source is None or isinstance(source[0], FactoredArray) or not mesh.empty:
            return operand
        return _coded.Spread(source[0], tuple(operand.shape), tuple(source[1]))

    def body(self, jaxpr: Any, finish: "Finish | None" = None) -> "Body":
        """A body of this equation as a function of arrays and weights.

        What it does to weights is recorded once, however often JAX traces it. `finish(inside,
        outs)` maps its outputs, where `inside` is this equation as the body sees it: what that
        materializes belongs to the body.
        """
        self.bodies.append(Body(self, jaxpr, finish))
        return self.bodies[-1]

    def with_own_keys(self, value: Value, *, of_body: bool = False) -> Value:
        """The same weight with keys of dropout that no other use of it has.

        `of_body` says that it goes into a body, whose products number their uses themselves.
        """
        if not isinstance(value, FactoredArray) or value.keys is None:
            return value
        drawn, source = self.interpreter.drawn, value.keys.term.sources
        number = 2 * drawn[source] + of_body
        drawn[source] += 1
        return dataclasses.replace(value, keys=fold_keys(value.keys, number))

    def adopt(self, uses: Iterable[Use]) -> None:
        """Records what a body did to weights.

        The equations of a library have no line of the user's: they get the line of their caller.
        """
        self.interpreter.uses += (
            use if use.line else dataclasses.replace(use, line=self.line) for use in uses
        )

    @functools.cached_property
    def line(self) -> str:
        """The user's source line; empty where only a library's code made this equation."""
        return _compat.source_line(self.eqn)

    @property
    def out_dtype(self) -> Any:
        """The dtype of the first output."""
        return self._out_aval.dtype

    def product_dtype(self, *operands: jax.Array) -> Any:
        """The dtype in which this product of `operands` is computed, and so factors meet in it."""
        if not jnp.issubdtype(self.out_dtype, jnp.inexact):
            raise Inexpressible(f"computes in {self.out_dtype}, which cannot hold low-rank factors")
        dtypes = (operand.dtype for operand in operands)
        return _contract.product_dtype(*dtypes, out=self.out_dtype)

    @property
    def out_shape(self) -> tuple[int, ...]:
        """The shape of the first output."""
        return self._out_aval.shape

    @property
    def _out_aval(self) -> Any:
        return self.eqn.outvars[0].aval

    def use(self, value: Value, kind: str, reason: str = "") -> None:
        """Records that this equation uses a weight."""
        if not isinstance(value, FactoredArray):
            return
        name, line, shape = self.eqn.primitive.name, self.line, value.shape
        sources = dict.fromkeys(source for names in value.sources for source in names)
        self.interpreter.uses += (
            Use(source, kind, name, shape, line, reason) for source in sources
        )

    def built(self, value: Value, reason: str = "") -> Any:
        """The value as an operand of an equation that no rule covers; see `materialize`.

        A base that is held as codes becomes an array within the equation.
        """
        if not isinstance(value, FactoredArray) or not is_coded(value.base):
            return self.materialize(value, reason)
        waits = value.is_bare and self._waits([value.base])
        if not waits:
            self.use(value, "materialized", reason)
        return value.base if value.is_bare else value.unnamed()

    def materialize(self, value: Value, reason: str = "") -> jax.Array:
        """The value as a plain array; a weight is materialized, and that is recorded."""
        if not isinstance(value, FactoredArray):
            return value
        self.use(value, "materialized", reason)
        return value.array()

    def settle(
        self, weight: FactoredArray, *, meets: Sequence[int | None] = (), finished: bool = False
    ) -> Value:
        """A weight, or an array where its pieces no longer have anything to keep apart.

        A row of an embedding table is such an array: adding its terms is what the model itself
        does with the row. An 8-bit float is left alone until it is cast: adding to it would
        round the terms away. `meets` names, for each term, the factor that is a whole weight, if
        any. `finished` says that the terms are added in any case.
        """
        base = weight.base
        if weight.is_bare and not finished:
            return weight
        if not _contract.holds_factors(base.dtype) or not (finished or weight.is_flat):
            return weight
        self.use(weight, "rows")
        weight = weight.resolved()
        base = _coded.decoded(base)
        for k, term in enumerate(weight.terms):
            met = meets[k] if meets else None
            dtype = base.dtype
            if met is not None and term.factors[met].dtype.itemsize == 2:
                # As large as a weight: it is not widened for a sum that is made in float32.
                dtype = term.factors[met].dtype
            base = term.added_to(base, dtype, meets=met)
        base = weight.turned(base)
        for gain in weight.gains:
            base = times_gain(base, gain.array(_contract.wide_dtype(base.dtype)))
        return base


# What becomes of the outputs of a body, given the equation as the body sees it.
Finish = Callable[[Equation, list[Value]], Any]


class Body:
    """A body of an equation as a function; `uses` is what its last run did to weights.

    It keeps the jaxpr, and neither the operands nor the record of the call that made it, so it may
    outlive that call.
    """

    def __init__(self, equation: Equation, jaxpr: Any, finish: Finish | None = None):
        self.uses: list[Use] = []
        self._interpreter, self._eqn = equation.interpreter.fork(), equation.eqn
        self._jaxpr, self._finish = jaxpr, finish

    def __call__(self, *args: Value) -> Any:
        interpreter = self._interpreter.fork()
        outs: Any = interpreter.run(self._jaxpr, args)
        if self._finish is not None:
            outs = self._finish(Equation(interpreter, self._eqn), outs)
        self.uses = interpreter.uses
        return outs
