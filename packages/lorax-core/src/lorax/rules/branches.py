"""Branches: a `cond` returns a weight if every branch returns the same kind of weight."""

import itertools
from typing import Any

import jax
import jax.extend.core as jex

from .._factored import is_weight
from .._registry import defrule
from .calls import with_sources


@defrule("cond", gains=True)
def _cond(eqn, index, *args, branches, branches_platforms=None):
    if is_weight(index):
        return NotImplemented
    args = [eqn.with_own_keys(arg, of_body=True) for arg in args]
    is_same = None

    def finish(inside, outs):
        # On the first trace, `is_same` is unknown and weights are kept; after it, outputs that
        # differ between branches are materialized.
        return (
            outs
            if is_same is None
            else [
                out if same else inside.materialize(out)
                for out, same in zip(outs, is_same, strict=True)
            ]
        )

    bodies = [eqn.body(branch, finish) for branch in branches]
    traced = [_traced(body, args) for body in bodies]
    outs = list(zip(*(kinds for _, kinds, _ in traced), strict=True))
    # The same kind means the same structure of base and terms, shapes and dtypes.
    is_same = [len(set(kinds)) == 1 for kinds in outs]
    # Trace again, now that it is known which outputs must be arrays.
    if not all(is_same):
        traced = [_traced(body, args) for body in bodies]
    # Branches are functions of flat arrays, so that `switch` sees no weights.
    leaves = jax.tree.leaves(args)
    functions = [function for function, _, _ in traced]
    if branches_platforms is None:
        flat = jax.lax.switch(index, functions, *leaves)
    else:
        keywords: dict[str, Any] = {}
        for platforms, function in zip(branches_platforms, functions, strict=True):
            for platform in platforms or ("default",):
                keywords[platform] = function
        flat = jax.lax.platform_dependent(*leaves, **keywords)
    flat = iter(flat)
    outs = [
        jax.tree.unflatten(kind[0], [next(flat) for _ in range(kind[0].num_leaves)])
        for kind in traced[0][1]
    ]
    # The branch is unknown, so an output may come from the weight of any branch.
    names = zip(*(names for _, _, names in traced), strict=True)
    return with_sources(outs, (tuple(dict.fromkeys(itertools.chain(*each))) for each in names))


def _traced(body, args):
    """Returns a branch as a function of flat arrays, its output kinds, and their source names."""
    structure = jax.tree.structure(args)
    kinds, names = [], []

    def flat(*leaves):
        outs = body(*jax.tree.unflatten(structure, leaves))
        names[:] = [sources for out in outs if is_weight(out) for sources in out.sources]
        outs = with_sources(outs, itertools.repeat(()))
        kinds[:] = [(jax.tree.structure(out), _shapes(out)) for out in outs]
        return jax.tree.leaves(outs)

    closed = jax.make_jaxpr(flat)(*jax.tree.leaves(args))
    return jex.jaxpr_as_fun(closed), kinds, names


def _shapes(out) -> tuple[Any, ...]:
    return tuple((leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(out))
