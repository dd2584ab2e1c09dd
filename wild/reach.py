"""Finds the parameters that reach a product, without Lorax.

This is the oracle for what `infer_spec` leaves out. A parameter counts if an array that depends
only on parameters enters a product, a convolution or a lookup together with data. Biases, gains and
positions do not: they are first added to data, or multiplied with it elementwise.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend.core as jex

PRODUCTS = {"dot_general", "conv_general_dilated", "ragged_dot", "ragged_dot_general"}
LOOKUPS = {"gather", "dynamic_slice"}

# The parameters on which an array depends, or None if it depends on data.
Origin = frozenset[str] | None
CONSTANT: Origin = frozenset()


def reached(fn: Callable[..., Any], params: Any, *args: Any) -> set[str]:
    """The paths of the parameters that reach a product with data."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(params)
    data, rest = jax.tree.flatten(args)
    arrays = [k for k, leaf in enumerate(data) if isinstance(leaf, jax.Array)]

    def call(leaves: list[Any], array_args: list[Any]) -> Any:
        all_args = dict(enumerate(data)) | dict(zip(arrays, array_args, strict=True))
        args = jax.tree.unflatten(rest, list(all_args.values()))
        out = fn(jax.tree.unflatten(structure, leaves), *args)
        return [leaf for leaf in jax.tree.leaves(out) if isinstance(leaf, jax.Array)]

    closed = jax.make_jaxpr(call)([leaf for _, leaf in leaves], [data[k] for k in arrays])
    origins: list[Origin] = [
        frozenset({jax.tree_util.keystr(path, simple=True, separator="/")}) for path, _ in leaves
    ]
    paths: set[str] = set()
    _walk(closed, [*origins, *([None] * len(arrays))], paths)
    return paths


def _walk(closed: Any, origins_in: Sequence[Origin], paths: set[str]) -> list[Origin]:
    jaxpr = closed.jaxpr if isinstance(closed, jex.ClosedJaxpr) else closed
    known: dict[Any, Origin] = dict.fromkeys(jaxpr.constvars, CONSTANT)
    known |= dict(zip(jaxpr.invars, origins_in, strict=True))

    def read(atom: Any) -> Origin:
        return CONSTANT if isinstance(atom, jex.Literal) else known[atom]

    for eqn in jaxpr.eqns:
        origins_out = _equation(eqn, [read(atom) for atom in eqn.invars], paths)
        known |= dict(zip(eqn.outvars, origins_out, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _equation(eqn: Any, origins_in: list[Origin], paths: set[str]) -> list[Origin]:
    name = eqn.primitive.name
    if name == "scan":
        return _scan(eqn, origins_in, paths)
    if name == "while":
        return _while(eqn, origins_in, paths)
    if name == "cond":
        outs = [_walk(branch, origins_in[1:], paths) for branch in eqn.params["branches"]]
        return [_joined([origins_in[0], *branches]) for branches in zip(*outs, strict=True)]
    bodies = [p for p in eqn.params.values() if isinstance(p, jex.Jaxpr | jex.ClosedJaxpr)]
    for body in bodies:
        inputs = (body.jaxpr if isinstance(body, jex.ClosedJaxpr) else body).invars
        if len(inputs) == len(origins_in):  # jit, checkpoint, custom_jvp, custom_vjp, shard_map, …
            return _walk(body, origins_in, paths)
    if name in PRODUCTS or (name in LOOKUPS and origins_in[0] is not None):
        if None in origins_in:
            paths.update(*(origin for origin in origins_in if origin is not None))
    return [_joined(origins_in)] * len(eqn.outvars)


def _joined(origins: Sequence[Origin]) -> Origin:
    known = [origin for origin in origins if origin is not None]
    return frozenset().union(*known) if len(known) == len(origins) else None


def _scan(eqn: Any, origins_in: list[Origin], paths: set[str]) -> list[Origin]:
    body = eqn.params["jaxpr"]
    # In every JAX version, a scanned or stacked value has one more axis outside of the body.
    sliced = _count_rank_differences(eqn.invars, body.jaxpr.invars)
    carried = len(eqn.outvars) - _count_rank_differences(eqn.outvars, body.jaxpr.outvars)
    consts = len(origins_in) - sliced - carried
    carry = origins_in[consts : consts + carried]
    while True:
        out = _walk(body, [*origins_in[:consts], *carry, *origins_in[consts + carried :]], paths)
        joined = [_joined(pair) for pair in zip(carry, out[:carried], strict=True)]
        if joined == carry:
            return [*carry, *out[carried:]]
        carry = joined


def _count_rank_differences(outside: Sequence[Any], inside: Sequence[Any]) -> int:
    pairs = zip(outside, inside, strict=True)
    return sum(outer.aval.ndim != inner.aval.ndim for outer, inner in pairs)


def _while(eqn: Any, origins_in: list[Origin], paths: set[str]) -> list[Origin]:
    cond_consts, body_consts = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    consts, carry = (
        origins_in[cond_consts : cond_consts + body_consts],
        origins_in[cond_consts + body_consts :],
    )
    while True:
        _walk(eqn.params["cond_jaxpr"], [*origins_in[:cond_consts], *carry], paths)
        out = _walk(eqn.params["body_jaxpr"], [*consts, *carry], paths)
        joined = [_joined(pair) for pair in zip(carry, out, strict=True)]
        if joined == carry:
            return carry
        carry = joined
