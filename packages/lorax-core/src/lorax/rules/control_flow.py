"""Primitives with a body: the body is run again on weights, inside the same primitive.

A weight is a pytree of arrays, so it passes through `jit`, `scan` and the others as operands like
any other. The parameters of these primitives are never edited: the transformed body goes back
through the public function, with every option the equation had.
"""

import dataclasses
import itertools
from collections.abc import Hashable
from typing import Any, cast

import jax
import jax.extend.core as jex
import jax.numpy as jnp

from .. import _compat
from .._coded import array_spec, is_coded
from .._factored import FactoredArray, is_weight
from .._interpreter import Body
from .._paid import fold_keys
from .._registry import RULES, defrule, unfit
from .._sharding import factor_spec
from .._terms import Inexpressible, Label


def _plain(eqn, values):
    """Builds weights in full where the primitive must return arrays."""
    return [eqn.materialize(value) for value in values]


@defrule("closed_call", gains=True)
def _closed_call(eqn, *args, call_jaxpr):
    return eqn.body(call_jaxpr)(*(eqn.with_own_keys(arg, of_body=True) for arg in args))


# Bodies that are met again and again: jit and remat


@dataclasses.dataclass(frozen=True)
class _Call:
    """A transformed body as its primitive takes it, and as the interpreter runs it."""

    function: Any
    body: Body


def _call(eqn, key, args, jaxpr, finish, wrap):
    """Calls a transformed body, made once for the same body and the same kinds of weights.

    Inside the body a weight is known by the position of its term among the operands, so that
    twelve layers that call one function share one transformed function.

    Args:
        eqn: the equation.
        key: what tells one way of wrapping the body from another.
        args: arrays and weights.
        jaxpr: the body.
        finish: maps the body's outputs, as in `Equation.body`.
        wrap: makes the callable of flat arrays (`jax.jit`, `jax.checkpoint`) from a plain one.
    """
    args = [eqn.with_own_keys(arg, of_body=True) for arg in args]
    sources = [names for arg in args if is_weight(arg) for names in arg.sources]
    args = _with_sources(args, iter([(k,) for k in range(len(sources))]))
    leaves, structure = jax.tree.flatten(args)
    whole_key: Hashable = (eqn.eqn.primitive, id(jaxpr), structure, *key)
    call = eqn.interpreter.transformed.get(whole_key)
    if call is None:
        body = Body(eqn, jaxpr, finish)

        def function(*leaves):
            return body(*jax.tree.unflatten(structure, leaves))

        call = eqn.interpreter.transformed[whole_key] = _Call(wrap(function), body)
    outs = call.function(*leaves)
    eqn.adopt(
        dataclasses.replace(use, source=source)
        for use in call.body.uses
        for source in sources[cast(int, use.source)]
    )
    found = [names for out in outs if is_weight(out) for names in out.sources]
    return _with_sources(
        outs, iter([tuple(s for k in local for s in sources[cast(int, k)]) for local in found])
    )


def _with_sources(values, sources) -> list[Any]:
    """The same weights, their pieces renamed in order."""
    return [value.with_sources(sources) if is_weight(value) else value for value in values]


@defrule("jit", gains=True)
def _jit(
    eqn,
    *args,
    jaxpr,
    in_shardings,
    out_shardings,
    in_layouts,
    out_layouts,
    donated_invars,
    ctx_mesh,
    name,
    keep_unused,
    inline,
    compiler_options_kvs,
):
    """Options that go by argument are those of the base; factors have none."""
    if any(layout is not None for layout in (*in_layouts, *out_layouts)):
        return NotImplemented
    pinned = [s if isinstance(s, jax.sharding.Sharding) else None for s in out_shardings]

    def finish(inside, outs):
        # A sharding asked for by name is one of an array.
        return [
            out if sharding is None else inside.materialize(out)
            for out, sharding in zip(outs, pinned, strict=True)
        ]

    def wrap(function):
        function.__name__ = function.__qualname__ = name
        options: dict[str, Any] = {"keep_unused": keep_unused, "inline": inline}
        if compiler_options_kvs:
            options["compiler_options"] = dict(compiler_options_kvs)
        owner = [k for k, arg in enumerate(args) for _ in jax.tree.leaves(arg)]
        first = {k: i for i, k in reversed(list(enumerate(owner)))}
        if any(donated_invars):
            options["donate_argnums"] = [first[k] for k, gone in enumerate(donated_invars) if gone]
        if any(isinstance(s, jax.sharding.Sharding) for s in in_shardings):
            options["in_shardings"] = tuple(
                in_shardings[k]
                if first[k] == i and isinstance(in_shardings[k], jax.sharding.Sharding)
                else None
                for i, k in enumerate(owner)
            )
        if any(s is not None for s in pinned):
            options["out_shardings"] = pinned
        return jax.jit(function, **options)

    key = (
        tuple(in_shardings), tuple(out_shardings), donated_invars, name, keep_unused, inline,
        compiler_options_kvs,
    )  # fmt: skip
    return _call(eqn, key, args, jaxpr, finish, wrap)


@defrule("remat", gains=True)
def _remat(eqn, *args, jaxpr, prevent_cse, differentiated, policy):
    def wrap(function):
        checkpointed = jax.checkpoint(function, prevent_cse=prevent_cse, policy=policy)
        if not differentiated:
            return checkpointed
        # The recomputation inside a gradient that the model itself takes.
        return lambda *leaves: _compat.rebind(
            checkpointed, "remat", {"differentiated": True}, *leaves
        )

    key = (prevent_cse, differentiated, policy)
    return _call(eqn, key, args, jaxpr, None, wrap)


# Loops


def _untouched(jaxpr, first: int) -> list[bool]:
    """Which carried values a loop's body returns as it got them; `first` is the first's input."""
    sources = _forwarded(jaxpr)
    jaxpr, _ = _compat.open_jaxpr(jaxpr)
    count = min(len(jaxpr.invars) - first, len(jaxpr.outvars))
    return [sources[k] == first + k for k in range(count)]


def _forwarded(jaxpr) -> list[int | None]:
    """For each output, the position of the input that it is, looking through nested bodies."""
    jaxpr, _ = _compat.open_jaxpr(jaxpr)
    origin: dict[Any, int] = {v: i for i, v in enumerate(jaxpr.invars)}
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        rule = RULES.get(eqn.primitive)
        if rule is None or unfit(rule, len(eqn.invars), eqn.params):
            continue
        if name in ("jit", "remat2", "closed_call"):
            inner = _forwarded(eqn.params.get("jaxpr", eqn.params.get("call_jaxpr")))
        elif name in ("scan", "while"):
            first, body = _loop_body(eqn)
            kept = _untouched(body, first)
            start = len(eqn.invars) - len(kept) if name == "while" else first
            inner = [start + k if same else None for k, same in enumerate(kept)]
            inner += [None] * (len(eqn.outvars) - len(inner))
        else:
            continue
        for v, k in zip(eqn.outvars, inner, strict=True):
            source = None if k is None else eqn.invars[k]
            if not isinstance(source, jex.Literal) and source in origin:
                origin[v] = origin[source]
    return [None if isinstance(v, jex.Literal) else origin.get(v) for v in jaxpr.outvars]


def _loop_body(eqn) -> tuple[int, Any]:
    """Where the carried values begin among the inputs of a loop's body, and the body."""
    if eqn.primitive.name == "scan":
        return _scan_split(eqn.params)[0], eqn.params["jaxpr"]
    return eqn.params["body_nconsts"], eqn.params["body_jaxpr"]


def _scan_split(params) -> tuple[int, int]:
    try:
        return _compat.scan_split(params)
    except KeyError as missing:
        raise Inexpressible(
            f"has no parameter {missing} in JAX {jax.__version__}, which counts what it carries"
        ) from missing


def _carry(eqn, init, untouched):
    """Carried weights that the loop returns untouched are constants of it; others are built."""
    fixed = {
        k: value
        for k, (value, same) in enumerate(zip(init, untouched, strict=True))
        if is_weight(value) and same
    }
    moving = [eqn.materialize(value) for k, value in enumerate(init) if k not in fixed]

    def whole(values):
        values = iter(values)
        return [fixed[k] if k in fixed else next(values) for k in range(len(init))]

    def moved(inside, values):
        return _plain(inside, [value for k, value in enumerate(values) if k not in fixed])

    return moving, whole, moved


@defrule("while", gains=True)
def _while(eqn, *args, cond_nconsts, cond_jaxpr, body_nconsts, body_jaxpr):
    args = [eqn.with_own_keys(arg, of_body=True) for arg in args]
    cond_consts, args = args[:cond_nconsts], args[cond_nconsts:]
    body_consts, init = args[:body_nconsts], args[body_nconsts:]
    moving, whole, moved = _carry(eqn, init, _untouched(body_jaxpr, body_nconsts))
    cond, body = eqn.body(cond_jaxpr), eqn.body(body_jaxpr, moved)
    final = jax.lax.while_loop(
        lambda carry: cond(*cond_consts, *whole(carry))[0],
        lambda carry: body(*body_consts, *whole(carry)),
        moving,
    )
    return whole(final)


@defrule("scan", gains=True)
def _scan(
    eqn,
    *args,
    jaxpr,
    reverse,
    length,
    unroll,
    _split_transpose=False,
    linear=None,
    num_consts=None,  # these three in JAX < 0.12, and the next two since then
    num_carry=None,
    ft_in=None,
    ft_out=None,
):
    n_consts, n_carry = _scan_split(eqn.eqn.params)
    args = [eqn.with_own_keys(arg, of_body=True) for arg in args]
    consts, init, xs = (
        args[:n_consts], args[n_consts : n_consts + n_carry], args[n_consts + n_carry :]
    )  # fmt: skip
    moving, whole, moved = _carry(eqn, init, _untouched(jaxpr, n_consts)[:n_carry])
    split = [_unstack(eqn, x) for x in xs]

    def finish(inside, outs):
        # Codes are not stacked: what is returned in every step is an array.
        stacked = [inside.materialize(x) if _has_codes(x) else x for x in outs[n_carry:]]
        return moved(inside, outs[:n_carry]), stacked

    run = eqn.body(jaxpr, finish)

    steps = (*consts, *init)
    # Weights that serve every step draw other masks in each.
    counts = any(is_weight(value) and value.keys is not None for value in steps)
    counts = counts or any(is_weight(x) and is_coded(x.base) and x.base.moves for x in xs)

    def body(carry, slices):
        slices, step = slices
        whole_slices = [
            rebuild((leaves, step)) for (_, rebuild), leaves in zip(split, slices, strict=True)
        ]
        every = (*consts, *whole(carry))
        if step is not None:
            every = tuple(_of_step(value, step) for value in every)
        return run(*every, *whole_slices)

    slices = [leaves for leaves, _ in split], jnp.arange(length) if counts else None
    final, stacked = jax.lax.scan(
        body,
        moving,
        slices,
        length=None if jax.tree.leaves(slices) else length,  # It may be symbolic: see `jax.export`.
        reverse=reverse,
        unroll=unroll,
        _split_transpose=_split_transpose,
    )
    return [*whole(final), *map(_restack, stacked)]


def _has_codes(value) -> bool:
    return is_weight(value) and is_coded(value.base)


def _of_step(value, step):
    if not is_weight(value) or value.keys is None:
        return value
    return dataclasses.replace(value, keys=fold_keys(value.keys, step))


def _unstack(eqn, weight):
    """The arrays of a weight that a scan slices, and how a slice is put together again.

    Factors that do not own the stacked axis are not sliced: they serve every step.
    """
    try:
        if is_weight(weight) and weight.norm is not None:
            gone = weight.norm.term.out[0]
            if any(label.size != 1 and not weight.norm.term.owners(label) for label in gone):
                weight = weight.resolved()  # A step has a part of what the norm runs over.
        if is_weight(weight) and weight.steps_through(0):
            raise Inexpressible
        owned = [piece.fuse(0) for piece in weight.pieces] if is_weight(weight) else None
    except Inexpressible:
        owned = None
    if owned is None:
        return [eqn.materialize(weight)], lambda slices: slices[0][0]
    leaves, whole_base = _unstack_base(weight.base)
    count = len(leaves)
    for term, label in owned:
        for k in term.owners(label):
            leaves.append(jax.numpy.moveaxis(term.factors[k], term.labels[k].index(label), 0))

    def rebuild(slices):
        slices, step = slices
        base = whole_base(slices[:count], step)
        rest = iter(slices[count:])
        terms = []
        for term, label in owned:
            factors = tuple(
                next(rest) if label in labels else factor
                for factor, labels in zip(term.factors, term.labels, strict=True)
            )
            labels = tuple(tuple(name for name in names if name != label) for names in term.labels)
            terms.append(
                dataclasses.replace(term, factors=factors, labels=labels, out=term.out[1:])
            )
        return weight.with_pieces(base, terms)

    return leaves, rebuild


def _unstack_base(base):
    """The arrays of a base that a scan slices, and how those of a step and its number make one.

    Equations that wait on codes are not played on the stack: they wait in every step, beside one
    more that picks the step's part of it.
    """
    if not is_coded(base):
        return [base], lambda leaves, _: leaves[0]
    term, (label, *more) = base.term, base.term.out[0] or (None,)
    moved = [move for move in base.moves if not move.commutes]
    if moved or more or label is None:
        return [], lambda _, step: base.entry(step)
    owners = term.owners(label)
    leaves = [jnp.moveaxis(term.factors[k], term.labels[k].index(label), 0) for k in owners]

    def whole(slices, _):
        factors, labels = list(term.factors), list(term.labels)
        for k, part in zip(owners, slices, strict=True):
            factors[k] = part
            labels[k] = tuple(found for found in labels[k] if found != label)
        entry = dataclasses.replace(
            term, factors=tuple(factors), labels=tuple(labels), out=term.out[1:]
        )
        return dataclasses.replace(base, term=entry, shape=base.shape[1:])

    return leaves, whole


def _restack(value):
    """A weight that a scan stacked: every array of it has a new leading axis."""
    if not is_weight(value):
        return value
    pieces = []
    for piece in value.pieces:
        new: Label = piece.fresh(value.base.shape[0])
        labels = tuple((new, *labels) for labels in piece.labels)
        pieces.append(dataclasses.replace(piece, labels=labels, out=((new,), *piece.out)))
    return value.with_pieces(value.base, pieces)


# cond


@defrule("cond", gains=True)
def _cond(eqn, index, *args, branches, branches_platforms=None):
    if is_weight(index):
        return NotImplemented
    args = [eqn.with_own_keys(arg, of_body=True) for arg in args]
    alike = None

    def finish(inside, outs):
        # A weight comes out as one where every branch returns the same kind of it.
        return (
            outs
            if alike is None
            else [
                out if same else inside.materialize(out)
                for out, same in zip(outs, alike, strict=True)
            ]
        )

    bodies = [eqn.body(branch, finish) for branch in branches]
    traced = [_traced(body, args) for body in bodies]
    outs = list(zip(*(kinds for _, kinds, _ in traced), strict=True))
    alike = [len(set(kinds)) == 1 for kinds in outs]
    if not all(alike):
        traced = [_traced(body, args) for body in bodies]
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
    # Whichever branch is taken, the weight may be the one that any of them returns.
    names = zip(*(names for _, _, names in traced), strict=True)
    return _with_sources(outs, (tuple(dict.fromkeys(itertools.chain(*each))) for each in names))


def _traced(body, args):
    """A branch as a function of flat arrays, the kinds of its outputs, and their weights."""
    structure = jax.tree.structure(args)
    kinds, names = [], []

    def flat(*leaves):
        outs = body(*jax.tree.unflatten(structure, leaves))
        names[:] = [found for out in outs if is_weight(out) for found in out.sources]
        outs = _with_sources(outs, itertools.repeat(()))
        kinds[:] = [(jax.tree.structure(out), _shapes(out)) for out in outs]
        return jax.tree.leaves(outs)

    closed = jax.make_jaxpr(flat)(*jax.tree.leaves(args))
    return jex.jaxpr_as_fun(closed), kinds, names


def _shapes(out) -> tuple[Any, ...]:
    return tuple((leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(out))


# shard_map


@defrule("shard_map", gains=True)
def _shard_map(
    eqn, *args, mesh, in_specs, out_specs, jaxpr, check_vma, manual_axes=(), newly_manual_axes=()
):
    """Each factor is split over the devices as the weight's axes that it owns are."""
    leaves, specs = [], []
    for arg, spec in zip(args, in_specs, strict=True):
        if not is_weight(arg):
            leaves.append(arg)
            specs.append(spec)
            continue
        split = [d for d, entry in enumerate(spec) if entry is not None]
        if arg.norm is not None:
            # A device has a part of what the norm runs over, or is told nothing of the rest.
            arg = arg.resolved()
        arg = eqn.with_own_keys(arg, of_body=True)
        pieces = [
            piece.fuse_all(split, own=k < len(arg.terms))[0] for k, piece in enumerate(arg.pieces)
        ]
        base = arg.base.changed(lambda term: term) if is_coded(arg.base) else arg.base
        leaves.append(arg.with_pieces(base, pieces))
        specs.append(
            arg.with_pieces(
                _base_spec(base, mesh, spec),
                [
                    dataclasses.replace(
                        piece,
                        factors=tuple(
                            factor_spec(spec, piece.out, names) for names in piece.labels
                        ),
                    )
                    for piece in pieces
                ],
            )
        )

    body = eqn.body(jaxpr, lambda inside, outs: tuple(_plain(inside, outs)))
    function = jax.shard_map(
        lambda *shards: body(*(_local(s) if is_weight(s) else s for s in shards)),
        mesh=mesh,
        in_specs=tuple(specs),
        out_specs=tuple(out_specs),
        axis_names={*manual_axes, *newly_manual_axes},  # renamed in JAX 0.10
        check_vma=check_vma,
    )
    return function(*leaves)


def _base_spec(base, mesh, spec):
    """The partition of a base; one held as codes has one for each of its arrays."""
    if not is_coded(base):
        return spec
    specs = tuple(array_spec(mesh, spec, base.term.out, labels) for labels in base.term.labels)
    for d, entry in enumerate(spec):
        axis = base.term.out[d]
        if entry is not None and all(entry not in found for found in specs):
            raise Inexpressible(f"splits {axis[0].size} blocks of codes over the axis {entry!r}")
    return dataclasses.replace(base, term=dataclasses.replace(base.term, factors=specs))


def _local(weight: FactoredArray) -> FactoredArray:
    """A shard of a weight, whose labels have the sizes of the shard."""
    base = weight.base
    if is_coded(base):
        term = _local_term(base.term, ())
        base = dataclasses.replace(base, term=term, shape=term.shape)
    pieces = [_local_term(piece, base.shape) for piece in weight.pieces]
    return weight.with_pieces(base, pieces)


def _local_term(term, shape):
    """A shard of a term; where it is known, `shape` is that of the weight."""
    sizes = {x[0]: size for x, size in zip(term.out, shape, strict=bool(shape)) if len(x) == 1}
    sizes |= {
        label: size
        for factor, labels in zip(term.factors, term.labels, strict=True)
        for label, size in zip(labels, factor.shape, strict=True)
    }
    return term.rename({label: (label._replace(size=size),) for label, size in sizes.items()})
