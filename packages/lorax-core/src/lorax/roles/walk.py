"""The walk along a jaxpr: reads values, applies a rule, writes values, and records uses."""

import dataclasses
import enum
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.extend.core as jex

from .. import _compat
from .._interpreter import live_equations
from .values import (
    CONSTANT,
    DATA,
    Part,
    Value,
    blank,
    broadcasts,
    in_all_steps,
    merge,
    resized,
    whole,
)


class Strength(enum.IntEnum):
    """How strongly a use determines the roles of a weight's axes, weakest first."""

    CONSTANT = 1
    """The other operand is a constant, such as the matrix that resizes an image."""
    JOINED = 2
    """The weight has been added to data, or multiplied by it, entry by entry."""
    WEIGHTS = 3
    """The other operand depends on weights alone, as learned queries do."""
    CHAIN = 4
    """Another weight comes between the weight and the data, as in `x @ (v @ w)`."""
    DATA = 5
    """The other operand depends on data."""


@dataclasses.dataclass(frozen=True)
class Use:
    """One use of a weight, and the roles that it gives to the weight's axes."""

    weight: str
    strength: Strength
    inputs: frozenset[int]
    outputs: frozenset[int]
    looks_up: bool = False
    beside: frozenset[int] = frozenset()


class Roles(NamedTuple):
    """The roles of the axes of a function's weights.

    Attributes:
        axes: for each weight that has both, its input axes and its output axes.
        reasons: for other weights that reach a product, a lookup or a primitive that is not
            followed:
            why their axes have no roles.
        tables: for weights that rows are looked up in, the axes of a row.
        dead: for weights that are read only by equations that no output depends on, the first of
            these.
    """

    axes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
    reasons: dict[str, str]
    tables: dict[str, tuple[int, ...]]
    dead: dict[str, str]


class Walk:
    """One walk along a jaxpr and its nested bodies."""

    def __init__(self):
        self.uses: list[Use] = []
        self.reasons: dict[str, str] = {}
        # For each weight, a bit mask of the uses whose results have gone into the weight itself.
        self.own: dict[str, int] = {}
        # The `id`s of equations that join weights with data.
        self.beside_data: set[int] = set()
        # The weights that live equations read, and those that dead equations read, with a place.
        self.read: set[str] = set()
        self.dead: dict[str, str] = {}
        self.records = True
        self.line = ""

    def roles(self) -> Roles:
        """Returns the roles that the strongest use of each weight gives."""
        best: dict[str, tuple[bool, Strength, Use]] = {}
        for k, use in enumerate(self.uses):
            if not self.beside_data.isdisjoint(use.beside):
                continue  # The weight had been joined with data, so it was data at this use.
            # Bit k of `own` is set if the result of use k went into the weight itself, like a norm.
            counts = not self.own.get(use.weight, 0) >> k & 1
            if use.weight not in best or (counts, use.strength) > best[use.weight][:2]:
                best[use.weight] = (counts, use.strength, use)
        axes = {
            name: (tuple(sorted(use.inputs)), tuple(sorted(use.outputs)))
            for name, (_, _, use) in best.items()
        }
        # Also if another use decides the roles: a tied head is a table as well.
        tables = {use.weight: tuple(sorted(use.outputs)) for use in self.uses if use.looks_up}
        reasons = {name: why for name, why in self.reasons.items() if name not in axes}
        dead = {name: where for name, where in self.dead.items() if name not in self.read}
        return Roles(axes, reasons, tables, dead)

    def run(self, jaxpr: Any, args: Sequence[Value]) -> list[Value]:
        """Returns the outputs of an open jaxpr for its constants and inputs."""
        values = dict(zip((*jaxpr.constvars, *jaxpr.invars), args, strict=True))

        def read(atom: Any) -> Value:
            return CONSTANT if isinstance(atom, jex.Literal) else values[atom]

        # Equations that no output depends on are not uses.
        live = live_equations(jaxpr)
        if len(live) < len(jaxpr.eqns):
            self._note_dead(jaxpr, values, {id(eqn) for eqn, _ in live})
        for eqn, finished in live:
            outs = self.evaluate(eqn, [read(v) for v in eqn.invars])
            values |= zip(eqn.outvars, outs, strict=True)
            for v in finished:
                del values[v]
        return [read(v) for v in jaxpr.outvars]

    def _note_dead(self, jaxpr: Any, values: Mapping[Any, Value], live: set[int]) -> None:
        """Records which weights are read by equations that no output depends on."""
        for eqn in jaxpr.eqns:
            if id(eqn) in live:
                continue
            for v in eqn.invars:
                if isinstance(v, jex.Literal) or v not in values:
                    continue
                line = _compat.source_line(eqn) or self.line
                where = f"`{eqn.primitive.name}`{f' at {line}' if line else ''}"
                self.dead = dict.fromkeys(values[v].weights, where) | self.dead

    def run_body(self, jaxpr: Any, args: Sequence[Value]) -> list[Value]:
        """Returns the outputs of the body of an equation."""
        body, _ = _compat.open_jaxpr(jaxpr)
        # Inside a `shard_map`, axes have the sizes of a shard.
        args = [resized(arg, shape_of(v)) for arg, v in zip(args, body.invars, strict=True)]
        return self.run(body, [*[CONSTANT] * len(body.constvars), *args])

    def evaluate(self, eqn: jex.JaxprEqn, operands: list[Value]) -> list[Value]:
        """Returns the results of an equation."""
        # Nothing but constants: neither weights nor data.
        if not any(operand.parts or operand.uses for operand in operands):
            return [CONSTANT] * len(eqn.outvars)
        outer, self.line = self.line, _compat.source_line(eqn) or self.line
        # Rules go by name, so that a primitive that this JAX lacks needs no special case.
        rule, body = RULES.get(eqn.primitive.name), only_body(eqn)
        if body is None:
            self.read.update(*(operand.weights for operand in operands))
        if rule is not None:
            outs = rule(self, eqn, *operands)
            outs = outs if isinstance(outs, list) else [outs]
        elif body is not None:
            outs = self.run_body(body, operands)
        else:
            # An equation without a rule is assumed to act entry by entry.
            outs = [self.entrywise(eqn, operands, shape_of(v)) for v in eqn.outvars]
        self.line = outer
        # A rule may leave sizes as they were; marks stay, and the sizes become those of the result.
        return [resized(out, shape_of(v)) for out, v in zip(outs, eqn.outvars, strict=True)]

    def record(
        self, weight: str, strength: Strength, inputs: frozenset[int], outputs: frozenset[int],
        eqn: jex.JaxprEqn, beside: frozenset[int] = frozenset(),
    ) -> int:  # fmt: skip
        """Records a use and returns its bit, or 0 if it gives no roles."""
        if not self.records:
            return 0
        if inputs == outputs and len(inputs) > 1:
            # A reshape has mixed all axes. As in a kernel, the last one is taken as the output.
            outputs = frozenset((max(inputs),))
        # A reshape may have cut an axis in two, of which one part is summed and one is kept: the
        # axis is an input, unless that leaves no output.
        inputs, outputs = (
            (inputs, outputs - inputs) if outputs - inputs else (inputs - outputs, outputs)
        )
        if not inputs or not outputs:
            missing = "outputs" if inputs else "inputs"
            self.note(
                weight, f"`{eqn.primitive.name}`{self.place} uses none of its axes as {missing}"
            )
            return 0
        looks_up = eqn.primitive.name in ("gather", "dynamic_slice")
        self.uses.append(Use(weight, strength, inputs, outputs, looks_up, beside))
        return 1 << (len(self.uses) - 1)

    def note(self, weight: str, reason: str) -> None:
        """Records the first reason why the axes of a weight may have no roles."""
        if self.records:
            self.reasons.setdefault(weight, reason)

    @property
    def place(self) -> str:
        """The source line of the equation, for messages."""
        return f" at {self.line}" if self.line else ""

    # Element-wise functions.

    def entrywise(self, eqn: jex.JaxprEqn, operands: list[Value], shape: Sequence[Any]) -> Value:
        """Returns a result whose axes are those of the operands, each in its place."""
        # All other operands are scalars, so the axes are those of this operand.
        alone = sum(bool(shape_of(v)) for v in eqn.invars) == 1
        spread: list[Value] = []
        for operand, v in zip(operands, eqn.invars, strict=True):
            sizes = shape_of(v)
            if not operand.parts:
                spread.append(operand)
            elif not sizes:
                spread.append(operand.move(lambda _: map(blank, shape)))
            elif len(sizes) == len(shape) and (alone or broadcasts(sizes, shape)):
                spread.append(resized(operand, shape))
            else:
                spread.append(self.lost(eqn, operand, shape))
        return self.join(spread, eqn)

    def lost(self, eqn: jex.JaxprEqn, operand: Value, shape: Sequence[Any]) -> Value:
        """Returns a result of a primitive that is not followed: data, if it depends on data."""
        for name, part in operand.weights.items():
            if len(part.shown) > 1:
                self.note(
                    name, f"it enters `{eqn.primitive.name}`{self.place}, which is not followed"
                )
        # The correspondence of axes is lost, so data varies along all of them.
        parts = whole(DATA, shape).parts if operand.data else {}
        return Value(parts, operand.uses)

    def join(self, operands: Sequence[Value], eqn: jex.JaxprEqn) -> Value:
        """Returns the value of operands that have met entry by entry."""
        merged = merge(operands)
        parts, uses = dict(merged.parts), merged.uses
        for name, part in merged.weights.items():
            others = [operand for operand in operands if name not in operand.parts]
            for other in others:
                self.own[name] = self.own.get(name, 0) | other.uses
            data = [other.data.shown for other in others if other.data and other.data.shown]
            # Data that varies along all axes of the weight, and maybe more.
            covering = [shown for shown in data if shown >= part.shown]
            if not covering or not part.shown:
                continue
            if part.transformed:
                # A product of Fourier transforms is a convolution.
                rest = part.along(range(len(part.axes))) - part.transformed
                uses |= self.record(name, Strength.DATA, part.transformed, rest, eqn)
                del parts[name]
            elif any(shown > part.shown for shown in covering):
                # A bias or a gain: the result is data.
                del parts[name]
            else:
                parts[name] = dataclasses.replace(part, joined=True)
        return Value(parts, uses)

    def beside(self, eqn: jex.JaxprEqn, operands: Sequence[Value]) -> Value:
        """Returns a value whose entries come from several operands, as after a concatenation.

        A weight next to activations, such as a class token, is data from then on. Next to data that
        has not met any weight, it may be either, and its next use decides: see `leave_to_data`.
        """
        merged = merge(operands)
        data = [operand for operand in operands if operand.data]
        if not data or all(operand.data and operand.weights for operand in operands):
            return merged
        # Data that a weight has been applied to is an activation.
        if any(operand.uses for operand in data):
            self.beside_data.add(id(eqn))
            return Value(whole(DATA, shape_of(eqn.outvars[0])).parts, merged.uses)
        parts = {
            key: dataclasses.replace(part, beside=part.beside | {id(eqn)})
            for key, part in merged.weights.items()
        }
        return Value(dict(merged.parts) | parts, merged.uses)

    def leave_to_data(self, part: Part) -> None:
        """Treats a weight that was joined with data as data, because another weight maps both."""
        self.beside_data |= part.beside

    # Loops.

    def loop(
        self, step: Callable[[Sequence[Value]], list[Value]], carry: Sequence[Value]
    ) -> list[Value]:
        """Returns the outputs of a loop, for carried values as they are in all steps."""
        # Steps are repeated until the carried values are stable; only the final one records uses.
        records, self.records = self.records, False
        while True:
            outs = step(carry)
            widened = [in_all_steps(*pair) for pair in zip(carry, outs, strict=False)]
            if widened == list(carry):
                break
            carry = widened
        self.records = records
        return step(carry)


# Rules for primitives that do not keep every axis in its place.
RULES: dict[str, Callable[..., Any]] = {}


def rule(*names: str) -> Callable[[Any], Any]:
    """Registers a function `(walk, eqn, *operands)` that returns the results of primitives."""

    def register(rule: Any) -> Any:
        for name in names:
            RULES[name] = rule
        return rule

    return register


def shape_of(v: Any) -> Sequence[Any]:
    """Returns the shape of a variable or literal of a jaxpr."""
    return getattr(v.aval, "shape", ())


def only_body(eqn: jex.JaxprEqn) -> Any:
    """Returns the one body of an equation that takes its operands and returns its outputs."""
    for param in eqn.params.values():
        if isinstance(param, jex.Jaxpr | jex.ClosedJaxpr):
            body, _ = _compat.open_jaxpr(param)
            # The ranks must agree one by one; the body of a reduction, on scalars, does not
            # qualify.
            inner, outer = ([*x.invars, *x.outvars] for x in (body, eqn))
            if [len(shape_of(v)) for v in inner] == [len(shape_of(v)) for v in outer]:
                return param
    return None
