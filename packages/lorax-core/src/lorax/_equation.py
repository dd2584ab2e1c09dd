"""The interface that a rule uses: the equation that it handles, and the bodies inside it."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp

from . import _coded, _compat, _contract, _reading
from ._coded import is_coded
from ._factored import FactoredArray, times_gain
from ._paid import fold_keys
from ._terms import Inexpressible
from ._uses import Use

if TYPE_CHECKING:
    from ._interpreter import Interpreter

Value = jax.Array | FactoredArray

# Maps a variable to the array that it was broadcast from and the `broadcast_dimensions`, or to None
# where it was not broadcast.
BeforeBroadcast = Callable[[Any], tuple[Value, tuple[int, ...]] | None]


# Primitives whose result has entries of several operands side by side.
_JOINING = frozenset(
    ["concatenate", "dynamic_update_slice", "scatter", "scatter-add", "select_n", "stack"]
)


class Equation:
    """One equation of a jaxpr, as the rule of its primitive sees it."""

    def __init__(
        self,
        interpreter: "Interpreter",
        eqn: jex.JaxprEqn,
        operands: Sequence[Value] = (),
        before_broadcast: BeforeBroadcast = lambda _: None,
    ):
        self.interpreter = interpreter
        self.eqn = eqn
        self._operands = operands
        self._before_broadcast = before_broadcast
        self.bodies: list[Body] = []

    def __call__(self, *operands: Any) -> Any:
        """Evaluates the original equation on plain arrays, or on bases that are stored as codes.

        On a quantized base, an equation whose result is still a weight is deferred. Any other
        equation decodes the base for itself alone.
        """
        coded = [k for k, operand in enumerate(operands) if is_coded(operand)]
        if coded and self._waits(operands):
            waiting = [self._narrowed(k, operand) for k, operand in enumerate(operands)]
            out = operands[coded[0]].deferred(self.eqn, coded[0], waiting)
        # A `FactoredArray` gets here only through `built`, as an operand that is decoded inside.
        elif coded or any(isinstance(operand, FactoredArray) for operand in operands):
            out = _reading.evaluate(self.eqn, operands)
        else:
            out = _compat.bind(self.eqn, *operands)
        return out if self.eqn.primitive.multiple_results else out[0]

    def with_params(self, **changes: Any) -> "Equation":
        """Returns the same equation with some parameters replaced."""
        eqn = self.eqn.replace(params=self.eqn.params | changes)
        return Equation(self.interpreter, eqn, self._operands, self._before_broadcast)

    @functools.cached_property
    def joins_data(self) -> bool:
        """Whether this joins a weight with data, such as a concatenation: that makes data."""
        name = self.eqn.primitive.name
        # Joining a weight with constants of the program leaves a weight.
        several = sum(isinstance(v, jex.Var) for v in self.eqn.invars) > 1
        return several and name in _JOINING and self.interpreter.beside_data(self.eqn)

    def narrow(self, position: int) -> jax.Array:
        """Returns a plain operand, of size one along each axis that it was broadcast to."""
        operand = jnp.asarray(self._operands[position])
        source = self._before_broadcast(self.eqn.invars[position])
        if source is None or isinstance(source[0], FactoredArray):
            return operand
        # [out] broadcast to [batch, in, out] -> [1, 1, out]
        shape = [1] * operand.ndim
        for size, axis in zip(jnp.shape(source[0]), source[1], strict=True):
            shape[axis] = size
        return jnp.reshape(source[0], shape)

    def _waits(self, operands: Sequence[Any]) -> bool:
        """Whether this is deferred on the quantized operands instead of decoding them."""
        return _coded.is_deferred(self.eqn, operands) and not self.joins_data

    def _narrowed(self, position: int, operand: Any) -> Any:
        """Returns a broadcast operand as a `Spread` of its source: what is deferred is kept."""
        if len(self._operands) != len(self.eqn.invars) or operand is not self._operands[position]:
            return operand
        source = self._before_broadcast(self.eqn.invars[position])
        mesh = jax.typeof(operand).sharding.mesh
        # On an explicit mesh, the broadcast has a sharding, which its source does not.
        if source is None or isinstance(source[0], FactoredArray) or not mesh.empty:
            return operand
        # [out] broadcast to [in, out] is kept as [out], and broadcast again where the weight is
        # read.
        return _coded.Spread(source[0], tuple(operand.shape), tuple(source[1]))

    def body(self, jaxpr: Any, finish: "Finish | None" = None) -> "Body":
        """Returns a body of this equation as a function of arrays and weights.

        Its uses of weights are recorded once, however often JAX traces it. `finish(inside, outs)`
        maps its outputs, where `inside` is this equation as seen from the body: whatever `finish`
        materializes is computed inside the body.
        """
        self.bodies.append(Body(self, jaxpr, finish))
        return self.bodies[-1]

    def with_own_keys(self, value: Value, *, of_body: bool = False) -> Value:
        """Returns the same weight with dropout keys that no other use of it has.

        `of_body` is set where the weight enters a body, whose products number their uses
        themselves.
        """
        if not isinstance(value, FactoredArray) or value.keys is None:
            return value
        drawn, source = self.interpreter.drawn, value.keys.term.sources
        # Even numbers are direct uses of the weight, odd numbers are bodies that use it: no two of
        # them fold the same number into the keys.
        number = 2 * drawn[source] + of_body
        drawn[source] += 1
        return dataclasses.replace(value, keys=fold_keys(value.keys, number))

    def adopt(self, uses: Iterable[Use]) -> None:
        """Adds the uses that a body recorded to the record of this evaluation.

        A use inside library code has no line of user code, and takes the line of this equation.
        """
        self.interpreter.uses += (
            use if use.line else dataclasses.replace(use, line=self.line) for use in uses
        )

    @functools.cached_property
    def line(self) -> str:
        """The user's source line, or an empty string if only library code made this equation."""
        return _compat.source_line(self.eqn)

    @property
    def out_dtype(self) -> Any:
        """The dtype of the first output."""
        return self._out_aval.dtype

    def product_dtype(self, *operands: jax.Array) -> Any:
        """Returns the dtype in which the product of `operands` is computed; factors are cast to it.

        Raises:
            Inexpressible: if the result is of integers, which cannot hold low-rank factors.
        """
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
        """Records that this equation uses a weight; `kind` and `reason` are those of `Use`."""
        if not isinstance(value, FactoredArray):
            return
        name, line, shape = self.eqn.primitive.name, self.line, value.shape
        # A weight that is made of several parameters is a use of each.
        sources = dict.fromkeys(source for names in value.sources for source in names)
        self.interpreter.uses += (
            Use(source, kind, name, shape, line, reason) for source in sources
        )

    def built(self, value: Value, reason: str = "") -> Any:
        """Returns the value as an operand for an equation without a rule; see `materialize`.

        A base that is stored as codes is decoded inside the equation.
        """
        if not isinstance(value, FactoredArray) or not is_coded(value.base):
            return self.materialize(value, reason)
        # A deferred equation decodes nothing yet, so it is not recorded as materializing the
        # weight.
        waits = value.is_bare and self._waits([value.base])
        if not waits:
            self.use(value, "materialized", reason)
        return value.base if value.is_bare else value.unnamed()

    def materialize(self, value: Value, reason: str = "") -> jax.Array:
        """Returns the value as a plain array; for a weight, the materialization is recorded."""
        if not isinstance(value, FactoredArray):
            return value
        self.use(value, "materialized", reason)
        return _reading.decoded(value)

    def rows_or_weight(
        self, weight: FactoredArray, *, meets: Sequence[int | None] = (), finished: bool = False
    ) -> Value:
        """Returns a weight, or an array if keeping its pieces separate no longer saves anything.

        A looked-up row of an embedding table becomes an array, for example: the model itself would
        add the delta to such a row. A weight in an 8-bit float stays factored until it is cast,
        because a sum in 8 bits would round the terms away.

        Args:
            weight: the weight.
            meets: for each term, the position of the factor that is a whole weight, if there is
                one.
            finished: whether the terms are added in any case.
        """
        base = weight.base
        if weight.is_bare and not finished:
            return weight
        # Not yet: the base cannot take a sum, or factors are still separate.
        if not _contract.holds_factors(base.dtype) or not (finished or weight.is_flat):
            return weight
        self.use(weight, "rows")
        weight = weight.resolved()
        base = _reading.decoded(base)
        for k, term in enumerate(weight.terms):
            met = meets[k] if meets else None
            dtype = base.dtype
            if met is not None and term.factors[met].dtype.itemsize == 2:
                # This factor is as large as a weight, so it is not widened to float32 for the sum.
                dtype = term.factors[met].dtype
            base = term.added_to(base, dtype, meets=met)
        # W = Π gains ⊙ turn · (base + Σ terms): the order matters.
        base = weight.turned(base)
        for gain in weight.gains:
            base = times_gain(base, gain.array(_contract.wide_dtype(base.dtype)))
        return base


# Maps the outputs of a body, given the equation as seen from inside the body.
Finish = Callable[[Equation, list[Value]], Any]


class Body:
    """A body of an equation as a function; `uses` has the uses recorded by its last run.

    It holds the jaxpr, but neither the operands nor the record of the call that made it, so it can
    be cached beyond that call.
    """

    def __init__(self, equation: Equation, jaxpr: Any, finish: Finish | None = None):
        self.uses: list[Use] = []
        self._interpreter, self._eqn = equation.interpreter.fork(), equation.eqn
        self._jaxpr, self._finish = jaxpr, finish

    def __call__(self, *args: Value) -> Any:
        # A new record per run: JAX may trace a body several times, and the last run counts.
        interpreter = self._interpreter.fork()
        outs: Any = interpreter.run(self._jaxpr, args)
        if self._finish is not None:
            outs = self._finish(Equation(interpreter, self._eqn), outs)
        self.uses = interpreter.uses
        return outs
