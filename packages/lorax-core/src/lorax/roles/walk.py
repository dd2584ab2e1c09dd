"""The walk along a jaxpr: read, apply a rule, write; and the record of uses."""

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
    """One use of a weight, and the roles that it gives the weight's axes."""

    weight: str
    strength: Strength
    inputs: frozenset[int]
    outputs: frozenset[int]
    looks_up: bool = False
    beside: frozenset[int] = frozenset()


class Roles(NamedTuple):
    """The roles of a function's weights.

    Attributes:
        axes: the axes of inputs and of outputs, for each weight that has both.
        reasons: for other weights that reach a product, a look-up or a primitive that is not
            followed: what keeps their axes from having roles.
        tables: of weights that rows are looked up in, the axes of a row.
        dead: of weights that only equations read which no output depends on, the first of these.
    """

    axes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
    reasons: dict[str, str]
    tables: dict[str, tuple[int, ...]]
    dead: dict[str, str]


class Walk:
    """One walk along a jaxpr and the bodies in it."""

    def __init__(self):
        self.uses: list[Use] = []
        self.reasons: dict[str, str] = {}
        # For each weight, the uses of it whose results have gone into the weight itself.
        self.own: dict[str, int] = {}
        # The equations that put weights beside data, by identity.
        self.beside_data: set[int] = set()
        # The weights that equations have read, and those that one reads which nothing depends on.
        self.read: set[str] = set()
        self.dead: dict[str, str] = {}
        self.records = True
        self.line = ""

    def roles(self) -> Roles:
        """The strongest use of each weight."""
        best: dict[str, tuple[bool, Strength, Use]] = {}
        for k, use in enumerate(self.uses):
            if not self.beside_data.isdisjoint(use.beside):
                continue  # It is data by then.
            # Bit k of `own`: the result of use k went into the weight itself, as a norm does.
            counts = not self.own.get(use.weight, 0) >> k & 1
            if use.weight not in best or (counts, use.strength) > best[use.weight][:2]:
                best[use.weight] = (counts, use.strength, use)
        axes = {
            name: (tuple(sorted(use.inputs)), tuple(sorted(use.outputs)))
            for name, (_, _, use) in best.items()
        }
        tables = {use.weight: tuple(sorted(use.outputs)) for use in self.uses if use.looks_up}
        reasons = {name: why for name, why in self.reasons.items() if name not in axes}
        dead = {name: where for name, where in self.dead.items() if name not in self.read}
        return Roles(axes, reasons, tables, dead)

    def run(self, jaxpr: Any, args: Sequence[Value]) -> list[Value]:
        """The values that an open jaxpr returns for its constants and inputs."""
        values = dict(zip((*jaxpr.constvars, *jaxpr.invars), args, strict=True))

        def read(atom: Any) -> Value:
            return CONSTANT if isinstance(atom, jex.Literal) else values[atom]

        # An equation that no output depends on is not a use.
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
        """Keeps what equations read that no output of the function depends on."""
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
        """The same for the body of an equation."""
        body, _ = _compat.open_jaxpr(jaxpr)
        args = [resized(arg, shape_of(v)) for arg, v in zip(args, body.invars, strict=True)]
        return self.run(body, [*[CONSTANT] * len(body.constvars), *args])

    def evaluate(self, eqn: jex.JaxprEqn, operands: list[Value]) -> list[Value]:
        """The values that an equation makes."""
        if not any(operand.parts or operand.uses for operand in operands):
            return [CONSTANT] * len(eqn.outvars)
        outer, self.line = self.line, _compat.source_line(eqn) or self.line
        rule, body = RULES.get(eqn.primitive.name), only_body(eqn)
        if body is None:
            self.read.update(*(operand.weights for operand in operands))
        if rule is not None:
            outs = rule(self, eqn, *operands)
            outs = outs if isinstance(outs, list) else [outs]
        elif body is not None:
            outs = self.run_body(body, operands)
        else:
            # Without a rule, an equation is taken to act entry by entry.
            outs = [self.entrywise(eqn, operands, shape_of(v)) for v in eqn.outvars]
        self.line = outer
        return [resized(out, shape_of(v)) for out, v in zip(outs, eqn.outvars, strict=True)]

    def record(
        self, weight: str, strength: Strength, inputs: frozenset[int], outputs: frozenset[int],
        eqn: jex.JaxprEqn, beside: frozenset[int] = frozenset(),
    ) -> int:  # fmt: skip
        """Records a use and returns its bit; 0 where it gives no roles."""
        if not self.records:
            return 0
        if inputs == outputs and len(inputs) > 1:
            # A reshape has mixed all axes: as in a kernel, the last one makes the output.
            outputs = frozenset((max(inputs),))
        # A reshape may have cut an axis in two, one part of which is kept.
        inputs, outputs = (
            (inputs, outputs - inputs) if outputs - inputs else (inputs - outputs, outputs)
        )
        if not inputs or not outputs:
            missing = "outputs" if inputs else "inputs"
            self.note(
                weight, f"`{eqn.primitive.name}`{self.place} leaves no axis for its {missing}"
            )
            return 0
        looks_up = eqn.primitive.name in ("gather", "dynamic_slice")
        self.uses.append(Use(weight, strength, inputs, outputs, looks_up, beside))
        return 1 << (len(self.uses) - 1)

    def note(self, weight: str, reason: str) -> None:
        """Keeps the first reason why the axes of a weight may have no roles."""
        if self.records:
            self.reasons.setdefault(weight, reason)

    @property
    def place(self) -> str:
        """Where the equation is, for messages."""
        return f" at {self.line}" if self.line else ""

    # Element-wise functions.

    def entrywise(self, eqn: jex.JaxprEqn, operands: list[Value], shape: Sequence[Any]) -> Value:
        """An output whose axes are those of the operands, each in its place."""
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
        """An output of a primitive that is not followed: data, where it depends on data."""
        for name, part in operand.weights.items():
            if len(part.shown) > 1:
                self.note(
                    name, f"it enters `{eqn.primitive.name}`{self.place}, which is not followed"
                )
        parts = whole(DATA, shape).parts if operand.data else {}
        return Value(parts, operand.uses)

    def join(self, operands: Sequence[Value], eqn: jex.JaxprEqn) -> Value:
        """One value of operands that have met entry by entry."""
        merged = merge(operands)
        parts, uses = dict(merged.parts), merged.uses
        for name, part in merged.weights.items():
            others = [operand for operand in operands if name not in operand.parts]
            for other in others:
                self.own[name] = self.own.get(name, 0) | other.uses
            data = [other.data.shown for other in others if other.data and other.data.shown]
            covering = [shown for shown in data if shown >= part.shown]
            if not covering or not part.shown:
                continue
            if part.transformed:
                # A product of transforms is a convolution.
                rest = part.along(range(len(part.axes))) - part.transformed
                uses |= self.record(name, Strength.DATA, part.transformed, rest, eqn)
                del parts[name]
            elif any(shown > part.shown for shown in covering):
                # A bias or a gain: what follows is the data's.
                del parts[name]
            else:
                parts[name] = dataclasses.replace(part, joined=True)
        return Value(parts, uses)

    def beside(self, eqn: jex.JaxprEqn, operands: Sequence[Value]) -> Value:
        """One value some of whose entries are those of each operand, as after a concatenation.

        A weight beside activations, as a class token is, is data from there on. Beside data that
        has met no weight it may be either, and what it meets next decides: see `leave_to_data`.
        """
        merged = merge(operands)
        data = [operand for operand in operands if operand.data]
        if not data or all(operand.data and operand.weights for operand in operands):
            return merged
        if any(operand.uses for operand in data):
            self.beside_data.add(id(eqn))
            return Value(whole(DATA, shape_of(eqn.outvars[0])).parts, merged.uses)
        parts = {
            key: dataclasses.replace(part, beside=part.beside | {id(eqn)})
            for key, part in merged.weights.items()
        }
        return Value(dict(merged.parts) | parts, merged.uses)

    def leave_to_data(self, part: Part) -> None:
        """Treats a weight beside data as data: another weight maps both."""
        self.beside_data |= part.beside

    # Loops.

    def loop(
        self, step: Callable[[Sequence[Value]], list[Value]], carry: Sequence[Value]
    ) -> list[Value]:
        """The outputs of a loop's last step, with what the carried values are in all steps."""
        records, self.records = self.records, False
        while True:
            outs = step(carry)
            widened = [in_all_steps(*pair) for pair in zip(carry, outs, strict=False)]
            if widened == list(carry):
                break
            carry = widened
        self.records = records
        return step(carry)


# For primitives whose axes are not those of their operands, each in its place.
RULES: dict[str, Callable[..., Any]] = {}


def rule(*names: str) -> Callable[[Any], Any]:
    """Registers a function `(walk, eqn, *operands)` that makes the values of the results."""

    def register(rule: Any) -> Any:
        for name in names:
            RULES[name] = rule
        return rule

    return register


def shape_of(v: Any) -> Sequence[Any]:
    """The shape of a variable or literal of a jaxpr."""
    return getattr(v.aval, "shape", ())


def only_body(eqn: jex.JaxprEqn) -> Any:
    """The one body of an equation that takes its operands and makes its outputs."""
    for param in eqn.params.values():
        if isinstance(param, jex.Jaxpr | jex.ClosedJaxpr):
            body, _ = _compat.open_jaxpr(param)
            inner, outer = ([*x.invars, *x.outvars] for x in (body, eqn))
            if [len(shape_of(v)) for v in inner] == [len(shape_of(v)) for v in outer]:
                return param
    return None
