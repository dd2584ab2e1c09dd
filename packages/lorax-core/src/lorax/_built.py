"""Which arrays of a program hold a whole adapted weight: the work oracle of `lorax.testing`.

The axes of a weight are followed through the equations of a jaxpr, from its base `[in, out]` and
its factors `a [in, rank]` and `b [rank, out]`. An array holds the whole weight where

* the values of both sides went into it: a product of `a` and `b`, with the base or without, and
* it still shows an axis of the inputs and another of the outputs, or one reshaped from both.

A copy of the base alone counts if it is as large as the base. Otherwise sizes play no part: a batch
as long as the weight, a rank as large, or a head of one output is not mistaken for a weight.

What a weight makes together with data is data:

* a product or a convolution with data, over any axis (`x @ a`, and therefore `(x @ a) @ b`), and an
  outer product;
* a sum with data (positions that are added to activations);
* rows that an array of indices looks up.

A gain is not: a weight times anything, data or not, entry by entry, is still a weight. But data
times what is left of a weight whose other side was summed over, such as its norms, is data.

The rules of Lorax are not used here: an oracle that shared their algebra would share its mistakes.
"""

import collections
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.extend.core as jex

from . import _compat
from ._made import JOINED, SHARED, Made, Side, Sides, ndims_of, pick, results_of, stacked, union


class Weights(NamedTuple):
    """The sizes of the adapted weights: their sides of size one, and each as a whole.

    Of a weight in `blocks`, small factors show both sides. `sizes` then holds the matrix of one
    shared entry, and an array is as large as what it has of one.
    """

    thin: Sides
    sizes: Sequence[int]
    blocks: frozenset[int] = frozenset()

    def as_large(self, made: "Made", shape: Sequence[int]) -> bool:
        """Whether an array is as large as one of the weights that it is made of."""
        of_one = zip(shape, made.axes, strict=True)
        entry = math.prod(size for size, sides in of_one if sides != frozenset({SHARED}))
        return any(
            (entry if k in self.blocks else math.prod(shape)) >= self.sizes[k]
            for k in {k for k, _ in made.sides}
        )


class Whole(NamedTuple):
    """An array that holds a whole weight; a mere piece of a base does not count by itself."""

    shape: tuple[int, ...]
    counts: bool


Counts = collections.Counter[Whole]


def built(jaxpr: Any, inputs: Sequence[Made | None], weights: Weights) -> Counts:
    """The arrays that hold a whole weight, and how often each is made.

    Args:
        jaxpr: the program; nested bodies are followed, and what no result depends on is left out.
        inputs: what each input is made of.
        weights: the sizes of the adapted weights; a side of size one need not be shown.
    """
    return _follow(jaxpr, inputs, weights)[1]


def excess(got: Counts, expected: Counts) -> dict[tuple[int, ...], int]:
    """How often arrays that count are made, of each shape, beyond what is expected."""
    extra: dict[tuple[int, ...], int] = {}
    for shape in {whole.shape for whole in got}:
        count, pieces = (got[Whole(shape, counts)] for counts in (True, False))
        allowed = sum(expected[Whole(shape, counts)] for counts in (True, False))
        if (most := min(count, count + pieces - allowed)) > 0:
            extra[shape] = most
    return extra


def _follow(
    jaxpr: Any, inputs: Sequence[Made | None], weights: Weights
) -> tuple[list[Made | None], Counts]:
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    made: dict[Any, Made | None] = dict(zip(jaxpr.invars, inputs, strict=True))
    counts: Counts = collections.Counter()

    def read(atom: Any) -> Made | None:
        return None if isinstance(atom, jex.Literal) else made.get(atom)

    for eqn in _live(jaxpr):
        operands = [read(atom) for atom in eqn.invars]
        if all(operand is None for operand in operands):
            continue
        inside = _bodies(eqn, operands, weights)
        if inside is None:
            outs = results_of(eqn, operands)
            counts += _whole(eqn.outvars, outs, weights)
        else:
            outs, more = inside
            counts += more
        made |= zip(eqn.outvars, outs, strict=True)
    return [read(atom) for atom in jaxpr.outvars], counts


def _live(jaxpr: Any) -> list[Any]:
    """The equations that an output or an effect depends on."""
    live, needed = [], set()
    needed.update(v for v in jaxpr.outvars if not isinstance(v, jex.Literal))
    for eqn in reversed(jaxpr.eqns):
        if eqn.effects or not needed.isdisjoint(eqn.outvars):
            needed.update(v for v in eqn.invars if not isinstance(v, jex.Literal))
            live.append(eqn)
    return live[::-1]


def _whole(outvars: Sequence[Any], outs: Sequence[Made | None], weights: Weights) -> Counts:
    """Those results that hold a whole weight."""
    counts: Counts = collections.Counter()
    for v, made in zip(outvars, outs, strict=True):
        if made is not None and _is_whole(made, shape := v.aval.shape, weights.thin):
            counts[Whole(shape, made.factors or weights.as_large(made, shape))] += 1
    return counts


def _is_whole(made: Made, shape: tuple[int, ...], thin: Sides) -> bool:
    axes = [sides for sides, size in zip(made.axes, shape, strict=True) if size != 1]
    shown = frozenset[Side]().union(*axes)
    for k in {k for k, _ in made.sides}:
        both = {(k, "in"), (k, "out")}
        if not both <= made.sides:
            continue
        if both & thin:
            if both <= shown | thin:
                return True
        elif any(
            (k, "in") in one and (k, "out") in other and (one is not other or JOINED in one)
            for one in axes
            for other in axes
        ):
            return True
    return False


# Equations with bodies


def _bodies(
    eqn: Any, operands: list[Made | None], weights: Weights
) -> tuple[list[Made | None], Counts] | None:
    """The outputs of an equation's bodies; None where there is no body to follow."""
    name, params = eqn.primitive.name, eqn.params
    if name == "scan":
        consts, carried = _compat.scan_split(params)
        steps = [pick(made, 0) for made in operands[consts + carried :]]
        outs, counts = _loop(params["jaxpr"], operands[: consts + carried], consts, steps, weights)
        outs = outs[:carried] + [stacked(made, 0) for made in outs[carried:]]
        # The scan itself makes what it stacks.
        return outs, counts + _whole(eqn.outvars[carried:], outs[carried:], weights)
    if name == "while":
        tested, consts = params["cond_nconsts"], params["body_nconsts"]
        outs, counts = _loop(params["body_jaxpr"], operands[tested:], consts, [], weights)
        _, asked = _follow(params["cond_jaxpr"], [*operands[:tested], *outs], weights)
        return outs, counts + asked
    if name == "cond":
        several = [_follow(branch, operands[1:], weights) for branch in params["branches"]]
        outs = [union(kinds) for kinds in zip(*(outs for outs, _ in several), strict=True)]
        return outs, sum((counts for _, counts in several), collections.Counter())
    bodies = [value for value in params.values() if isinstance(value, jex.Jaxpr | jex.ClosedJaxpr)]
    if len(bodies) == 1:
        body = getattr(bodies[0], "jaxpr", bodies[0])
        # A reduction has a body, too, but one of scalars.
        if ndims_of(body.invars) == ndims_of(eqn.invars):
            return _follow(body, operands, weights)
    return None


def _loop(
    body: Any,
    operands: list[Made | None],
    consts: int,
    steps: list[Made | None],
    weights: Weights,
) -> tuple[list[Made | None], Counts]:
    """The outputs of a loop's body, once what it carries no longer changes."""
    constants, carry = operands[:consts], operands[consts:]
    while True:
        outs, counts = _follow(body, [*constants, *carry, *steps], weights)
        after = [union(each) for each in zip(carry, outs[: len(carry)], strict=True)]
        if after == carry:
            return [*after, *outs[len(carry) :]], counts
        carry = after
