"""Finds the arrays of a program that hold a whole adapted weight: the oracle of `lorax.testing`.

The axes of a weight are followed through the equations of a jaxpr, from its base `[in, out]` and
its factors `a [in, rank]` and `b [rank, out]`. An array holds the whole weight if

* values of both sides went into it: a product of `a` and `b`, with the base or without it, and
* it still shows an input axis and an output axis, or one axis that was reshaped from both.

A copy of the base alone counts if it is as large as the base. Otherwise, sizes are ignored: a batch
as long as the weight, a rank as large, or a head with one output is not mistaken for a weight.

The result of a weight and data is data:

* a product or convolution with data, over any axis (`x @ a`, and therefore `(x @ a) @ b`), and an
  outer product;
* a sum with data (positions that are added to activations);
* rows that an array of indices looks up.

A gain is an exception: a weight times anything, data or not, entry by entry, is still a weight. But
data times what is left of a weight after a sum over one side, such as its norms, is data.

This file does not use the rules of Lorax: an oracle that shared their algebra would share its
mistakes.
"""

import collections
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.extend.core as jex

from . import _compat
from ._made import JOINED, SHARED, Made, Side, Sides, ndims_of, pick, results_of, stacked, union


class Weights(NamedTuple):
    """The sizes of the adapted weights.

    Attributes:
        thin: the sides of size one, which an array need not show.
        sizes: the number of entries of each weight, or of one shared entry of it if it is in
            `blocks`.
        blocks: weights of which a small factor shows both sides, such as a block of a Kronecker
            product. An array of theirs counts only if it is as large as one shared entry.
    """

    thin: Sides
    sizes: Sequence[int]
    blocks: frozenset[int] = frozenset()

    def as_large(self, made: "Made", shape: Sequence[int]) -> bool:
        """Whether an array is as large as one of the weights that it is made of."""
        of_one = zip(shape, made.axes, strict=True)
        # Shared axes count layers or experts: not part of one entry.
        entry = math.prod(size for size, sides in of_one if sides != frozenset({SHARED}))
        return any(
            (entry if k in self.blocks else math.prod(shape)) >= self.sizes[k] for k in made.weights
        )


class Whole(NamedTuple):
    """An array that holds a whole weight; with `counts` False, a piece of a base alone."""

    shape: tuple[int, ...]
    counts: bool


Counts = collections.Counter[Whole]


def built(jaxpr: Any, inputs: Sequence[Made | None], weights: Weights) -> Counts:
    """Returns the arrays that hold a whole weight, and how often each is made.

    Args:
        jaxpr: the program; nested bodies are followed, and what no result depends on is left out.
        inputs: what each input is made of.
        weights: the sizes of the adapted weights; a side of size one need not be shown.
    """
    return _follow(jaxpr, inputs, weights)[1]


def excess(got: Counts, expected: Counts) -> dict[tuple[int, ...], int]:
    """Returns how often arrays of each shape that count are made beyond what is expected."""
    extra: dict[tuple[int, ...], int] = {}
    for shape in {whole.shape for whole in got}:
        # A base piece in the plain program may be an array that counts in the adapted one, so both
        # are allowed for; but no more than `count` can be in excess.
        count, pieces = (got[Whole(shape, counts)] for counts in (True, False))
        allowed = sum(expected[Whole(shape, counts)] for counts in (True, False))
        if (most := min(count, count + pieces - allowed)) > 0:
            extra[shape] = most
    return extra


def _follow(
    jaxpr: Any, inputs: Sequence[Made | None], weights: Weights
) -> tuple[list[Made | None], Counts]:
    # Open or closed; constants are data, which is the default.
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    made: dict[Any, Made | None] = dict(zip(jaxpr.invars, inputs, strict=True))
    counts: Counts = collections.Counter()

    def read(atom: Any) -> Made | None:
        return None if isinstance(atom, jex.Literal) else made.get(atom)

    for eqn in _live(jaxpr):
        operands = [read(atom) for atom in eqn.invars]
        # Equations on data alone make data, which is the default of `made.get`.
        if all(operand is None for operand in operands):
            continue
        inside = _bodies(eqn, operands, weights)
        if inside is None:
            outs = results_of(eqn, operands)
            if not _keeps_base(eqn, outs):
                counts += _whole(eqn.outvars, outs, weights)
        else:
            outs, more = inside
            counts += more
        made |= zip(eqn.outvars, outs, strict=True)
    return [read(atom) for atom in jaxpr.outvars], counts


def _keeps_base(eqn: Any, outs: Sequence[Made | None]) -> bool:
    """Whether this is a base whose entries stay in order: no copy, unlike a transpose or a cast."""
    name = eqn.primitive.name
    reshapes = name == "squeeze" or (name == "reshape" and eqn.params["dimensions"] is None)
    return reshapes and all(made is not None and not made.factors for made in outs)


def _live(jaxpr: Any) -> list[Any]:
    """Returns the equations that an output or an effect depends on."""
    live, needed = [], set()
    needed.update(v for v in jaxpr.outvars if not isinstance(v, jex.Literal))
    for eqn in reversed(jaxpr.eqns):
        if eqn.effects or not needed.isdisjoint(eqn.outvars):
            needed.update(v for v in eqn.invars if not isinstance(v, jex.Literal))
            live.append(eqn)
    return live[::-1]


def _whole(outvars: Sequence[Any], outs: Sequence[Made | None], weights: Weights) -> Counts:
    """Counts the results that hold a whole weight."""
    counts: Counts = collections.Counter()
    for v, made in zip(outvars, outs, strict=True):
        if made is not None and _is_whole(made, shape := v.aval.shape, weights.thin):
            counts[Whole(shape, made.factors or weights.as_large(made, shape))] += 1
    return counts


def _is_whole(made: Made, shape: tuple[int, ...], thin: Sides) -> bool:
    axes = [sides for sides, size in zip(made.axes, shape, strict=True) if size != 1]
    shown = frozenset[Side]().union(*axes)
    for k in made.weights:
        both = {(k, "in"), (k, "out")}
        if not both <= made.sides:
            continue
        # A side of size one cannot be seen in a shape: the other side alone decides.
        if both & thin:
            if both <= shown | thin:
                return True
        # Two axes, one of each side; or one axis that a reshape joined from both.
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
    """Returns the outputs and counts of an equation's bodies, or None if it has none to follow."""
    name, params = eqn.primitive.name, eqn.params
    if name == "scan":
        # A scan has [consts, carry, stacked inputs] and [carry, stacked outputs].
        consts, carried = _compat.scan_split(params)
        steps = [pick(made, 0) for made in operands[consts + carried :]]
        outs, counts = _loop(params["jaxpr"], operands[: consts + carried], consts, steps, weights)
        outs = outs[:carried] + [stacked(made, 0) for made in outs[carried:]]
        # The scan itself makes the arrays that it stacks.
        return outs, counts + _whole(eqn.outvars[carried:], outs[carried:], weights)
    if name == "while":
        tested, consts = params["cond_nconsts"], params["body_nconsts"]
        outs, counts = _loop(params["body_jaxpr"], operands[tested:], consts, [], weights)
        _, asked = _follow(params["cond_jaxpr"], [*operands[:tested], *outs], weights)
        return outs, counts + asked
    if name == "cond":
        # The first operand is the index of the branch.
        several = [_follow(branch, operands[1:], weights) for branch in params["branches"]]
        outs = [union(kinds) for kinds in zip(*(outs for outs, _ in several), strict=True)]
        return outs, sum((counts for _, counts in several), collections.Counter())
    # `jit`, `remat`, custom derivatives and others, whatever the parameter is called.
    bodies = [value for value in params.values() if isinstance(value, jex.Jaxpr | jex.ClosedJaxpr)]
    if len(bodies) == 1:
        body = getattr(bodies[0], "jaxpr", bodies[0])
        # A reduction has a body as well, but on scalars.
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
    """Follows the body of a loop until what it carries no longer changes; returns its outputs."""
    constants, carry = operands[:consts], operands[consts:]
    while True:
        outs, counts = _follow(body, [*constants, *carry, *steps], weights)
        # A union per iteration only adds sides, so this ends.
        after = [union(each) for each in zip(carry, outs[: len(carry)], strict=True)]
        if after == carry:
            return [*after, *outs[len(carry) :]], counts
        carry = after
