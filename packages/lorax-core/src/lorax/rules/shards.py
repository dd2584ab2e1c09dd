"""`shard_map`: each factor is partitioned like the weight's axes that it owns."""

import dataclasses

import jax
from jax.sharding import PartitionSpec

from .._coded import array_spec, is_coded
from .._factored import FactoredArray, is_weight
from .._registry import defrule
from .._sharding import factor_spec
from .._terms import Inexpressible


@defrule("shard_map", gains=True)
def _shard_map(
    eqn, *args, mesh, in_specs, out_specs, jaxpr, check_vma, manual_axes=(), newly_manual_axes=()
):
    leaves, specs = [], []
    for arg, spec in zip(args, in_specs, strict=True):
        if not is_weight(arg):
            leaves.append(arg)
            specs.append(spec)
            continue
        # A factor is partitioned like the axes of the weight that it owns, and replicated over the
        # other mesh axes.
        split = [d for d, entry in enumerate(spec) if entry is not None]
        if arg.norm is not None:
            # A device has only a part of the entries that the norm runs over.
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

    body = eqn.body(jaxpr, lambda inside, outs: tuple(map(inside.materialize, outs)))
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
    """Returns the partition of a base; a quantized base gets one for each of its arrays."""
    if not is_coded(base):
        return spec
    specs = tuple(array_spec(mesh, spec, base.term.out, labels) for labels in base.term.labels)
    for d, entry in enumerate(spec):
        axis = base.term.out[d]
        # The number of blocks is not divisible, so `array_spec` has left the axis whole.
        if entry is not None and all(entry not in part for part in specs):
            raise Inexpressible(f"splits {axis[0].size} blocks of codes over the axis {entry!r}")
    # The other operands of deferred equations that stay deferred are scalars: replicated.
    others = jax.tree.map(lambda _: PartitionSpec(), base.others)
    term = dataclasses.replace(base.term, factors=specs)
    return dataclasses.replace(base, term=term, others=others)


def _local(weight: FactoredArray) -> FactoredArray:
    """Returns a shard of a weight, whose labels have the sizes of the shard."""
    base = weight.base
    if is_coded(base):
        term = _local_term(base.term, ())
        base = dataclasses.replace(base, term=term, shape=term.shape)
    pieces = [_local_term(piece, base.shape) for piece in weight.pieces]
    return weight.with_pieces(base, pieces)


def _local_term(term, shape):
    """Returns a shard of a term; `shape` is that of the weight's shard, or () if it is unknown."""
    # Inside the body, a label has the size of a shard: [in / devices] where the axis is split. A
    # label without an owner gets its size from the base, any other from the factors.
    sizes = {x[0]: size for x, size in zip(term.out, shape, strict=bool(shape)) if len(x) == 1}
    sizes |= {
        label: size
        for factor, labels in zip(term.factors, term.labels, strict=True)
        for label, size in zip(labels, factor.shape, strict=True)
    }
    return term.rename({label: (label._replace(size=size),) for label, size in sizes.items()})
