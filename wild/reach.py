"""Which parameters take part in a product, found without Lorax.

It is the oracle for what `infer_spec` leaves out: an array made of parameters alone that enters a
product, a convolution or a look-up together with data, whatever made it. Biases, gains and
positions never do: by then they have been added to data, or multiplied with it entry by entry.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend.core as jex

PRODUCTS = {"dot_general", "conv_general_dilated", "ragged_dot", "ragged_dot_general"}
LOOKUPS = {"gather", "dynamic_slice"}

# The parameters that an array is made of, or None where data takes part in it.
Origin = frozenset[str] | None
CONSTANT: Origin = frozenset()


def reached(fn: Callable[..., Any], params: Any, *args: Any) -> set[str]:
    """The paths of the parameters that reach a product with data."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(params)
    data, rest = jax.tree.flatten(args)
    arrays = [k for k, leaf in enumerate(data) if isinstance(leaf, jax.Array)]

    def call(leaves: list[Any], given: list[Any]) -> Any:
        filled = dict(enumerate(data)) | dict(zip(arrays, given, strict=True))
        args = jax.tree.unflatten(rest, list(filled.values()))
        out = fn(jax.tree.unflatten(structure, leaves), *args)
        return [leaf for leaf in jax.tree.leaves(out) if isinstance(leaf, jax.Array)]

    closed = jax.make_jaxpr(call)([leaf for _, leaf in leaves], [data[k] for k in arrays])
    origins: list[Origin] = [
        frozenset({jax.tree_util.keystr(path, simple=True, separator="/")}) for path, _ in leaves
    ]
    found: set[str] = set()
    _walk(closed, [*origins, *([None] * len(arrays))], found)
    return found


def _walk(closed: Any, given: Sequence[Origin], found: set[str]) -> list[Origin]:
    jaxpr = closed.jaxpr if isinstance(closed, jex.ClosedJaxpr) else closed
    known: dict[Any, Origin] = dict.fromkeys(jaxpr.constvars, CONSTANT)
    known |= dict(zip(jaxpr.invars, given, strict=True))

    def read(atom: Any) -> Origin:
        return CONSTANT if isinstance(atom, jex.Literal) else known[atom]

    for eqn in jaxpr.eqns:
        made = _equation(eqn, [read(atom) for atom in eqn.invars], found)
        known |= dict(zip(eqn.outvars, made, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _equation(eqn: Any, given: list[Origin], found: set[str]) -> list[Origin]:
    name = eqn.primitive.name
    if name == "scan":
        return _scan(eqn, given, found)
    if name == "while":
        return _while(eqn, given, found)
    if name == "cond":
        outs = [_walk(branch, given[1:], found) for branch in eqn.params["branches"]]
        return [_joined([given[0], *several]) for several in zip(*outs, strict=True)]
    bodies = [p for p in eqn.params.values() if isinstance(p, jex.Jaxpr | jex.ClosedJaxpr)]
    for body in bodies:
        inputs = (body.jaxpr if isinstance(body, jex.ClosedJaxpr) else body).invars
        if len(inputs) == len(given):  # jit, checkpoint, custom_jvp, custom_vjp, shard_map, …
            return _walk(body, given, found)
    if name in PRODUCTS or (name in LOOKUPS and given[0] is not None):
        if None in given:
            found.update(*(origin for origin in given if origin is not None))
    return [_joined(given)] * len(eqn.outvars)


def _joined(origins: Sequence[Origin]) -> Origin:
    known = [origin for origin in origins if origin is not None]
    return frozenset().union(*known) if len(known) == len(origins) else None


def _scan(eqn: Any, given: list[Origin], found: set[str]) -> list[Origin]:
    body = eqn.params["jaxpr"]
    # What is stacked has one axis more outside of the body than inside, in every version of JAX.
    sliced = _unlike(eqn.invars, body.jaxpr.invars)
    carried = len(eqn.outvars) - _unlike(eqn.outvars, body.jaxpr.outvars)
    consts = len(given) - sliced - carried
    carry = given[consts : consts + carried]
    while True:
        out = _walk(body, [*given[:consts], *carry, *given[consts + carried :]], found)
        settled = [_joined(pair) for pair in zip(carry, out[:carried], strict=True)]
        if settled == carry:
            return [*carry, *out[carried:]]
        carry = settled


def _unlike(outside: Sequence[Any], inside: Sequence[Any]) -> int:
    pairs = zip(outside, inside, strict=True)
    return sum(outer.aval.ndim != inner.aval.ndim for outer, inner in pairs)


def _while(eqn: Any, given: list[Origin], found: set[str]) -> list[Origin]:
    of_cond, of_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    consts, carry = given[of_cond : of_cond + of_body], given[of_cond + of_body :]
    while True:
        _walk(eqn.params["cond_jaxpr"], [*given[:of_cond], *carry], found)
        out = _walk(eqn.params["body_jaxpr"], [*consts, *carry], found)
        settled = [_joined(pair) for pair in zip(carry, out, strict=True)]
        if settled == carry:
            return carry
        carry = settled
