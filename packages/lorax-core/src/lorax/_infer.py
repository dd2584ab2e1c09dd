"""`infer_spec`: a spec for every weight that a function multiplies by, found by tracing it."""

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ._adapter import Adapter
from ._adapter_spec import AdapterSpec
from ._arrays import is_array
from ._axes import Axes, normalize, resolve_axes
from ._base import as_base
from ._errors import ArgumentError, SpecError, UnadaptedWarning
from ._factored import FactoredArray
from ._keywords import refuses_ambiguous_keywords
from ._pair import Leaf, flatten_params
from ._spec import LORA_FREEZE, Pattern, matches, shown, some
from ._statics import plain_number
from ._terms import Term
from ._transform import Call, FlatPair, trace
from .kinds.lora import LoraSpec, Scaling
from .roles import DATA, Roles, find_roles

SharedAxes = Sequence[int] | Mapping[Pattern, Sequence[int]]


@refuses_ambiguous_keywords
def infer_spec(
    fn: Any,
    params: Any,
    /,
    *args: Any,
    rank: int | None = None,
    alpha: float | None = None,
    scaling: Scaling = "standard",
    spec: AdapterSpec | None = None,
    where: Pattern | None = None,
    shared_axes: SharedAxes = (),
    skip_small: bool = True,
    **kwargs: Any,
) -> Any:
    """Returns a spec for every parameter that `fn` uses in a product or looks rows up in.

    Traces `fn(params, *args, **kwargs)` without arithmetic. The axes of a weight that a product
    with data sums over, or that a lookup indexes, are its inputs. The axes that are kept are its
    outputs, and all others are shared. Of several uses, the first product with data decides. Dense,
    convolution, transposed, stacked and expert weights get the right axes, and so do weights that
    `lora` materializes, such as those behind a mask.

    Parameters that are only added to data, multiplied with it entry by entry, or concatenated to it
    (biases, gains, positions, tokens) are left frozen, as are unused ones. Every other parameter of
    two or more axes that is left frozen is named in a single warning.

    Args:
        fn: the model, a function whose first argument is the parameters.
        params: the parameters, or a tree of `jax.ShapeDtypeStruct`.
        *args: the other arguments of `fn`; arrays may be `jax.ShapeDtypeStruct`.
        rank: the rank of every adapter, for plain LoRA.
        alpha: as in `LoraSpec`.
        scaling: as in `LoraSpec`.
        spec: the spec of any kind of adapter, without axes, in place of these three.
        where: a filter on paths: a glob, a compiled regular expression or a callable.
        shared_axes: axes with separate factors for each entry that the trace does not reveal: for
            every weight, or a dict from path patterns to axes. For example, in the first layer of
            an ensemble made by `jax.vmap` on a single input, the members share `a` unless their
            axis is given here.
        skip_small: whether a weight stays frozen if its adapter would have at least as many numbers
            as the weight, `rank · (inputs + outputs) ≥ inputs · outputs` for LoRA. If False, it
            gets an adapter whose rank is at most that of the weight.
        **kwargs: the keyword arguments of `fn`. One with the name of an option above must be bound
            with `functools.partial` first.

    Returns:
        A tree of specs and `LORA_FREEZE` with the structure of `params`, for `init_lora`. Edit its
        leaves as you like.

    Raises:
        SpecError: if the rank is not a positive int; if no weight is found, or none that
            `where` accepts.
        ArgumentError: if an option is given whose name is also a keyword of `fn`.

    Warns:
        UnadaptedWarning: names weights that are left frozen or get a lower rank, each with the
            reason and what to do.

    Example:
        >>> import jax.numpy as jnp
        >>> from lorax import infer_spec
        >>> def attention_out(params, x):                       # x [batch, heads, head_dim]
        ...     return jnp.einsum("bhk,hkd->bd", x, params["w"]) + params["b"]
        >>> params = {"w": jnp.ones((4, 8, 6)), "b": jnp.ones(6)}
        >>> spec = infer_spec(attention_out, params, jnp.ones((2, 4, 8)), rank=2)
        >>> spec["w"].in_axes, spec["w"].out_axes, spec["b"]
        ((0, 1), (2,), 0)
    """
    if (rank is None) == (spec is None):
        raise ArgumentError("infer_spec takes either `rank` or `spec`.")
    if rank is not None and (type(plain_number(rank)) is not int or rank < 1):
        raise SpecError(f"infer_spec: the rank is {rank!r}; it must be a positive int.")
    kind = LoraSpec(rank, alpha, scaling) if rank is not None else spec
    assert kind is not None
    leaves, structure = flatten_params(params)
    roles = roles_of(fn, leaves, structure, args, kwargs)
    accepted = [path for path, leaf in leaves if _is_matrix(leaf) and _accepts(where, path)]
    shared = _shared_axes(shared_axes, accepted)
    notes: list[str] = []

    def decide(path: str, leaf: Any) -> Any:
        if leaf is None:
            return None
        if path not in accepted or path not in roles.axes:
            if path in accepted and path in roles.reasons:
                notes.append(f"`{path}`: {roles.reasons[path]}. {_remedy(leaf)}")
            elif path in accepted and path in roles.dead and not _is_vector(leaf):
                notes.append(
                    f"`{path}`: nothing that the function returns depends on {roles.dead[path]}, "
                    "which reads it."
                )
            return LORA_FREEZE
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            notes.append(f"`{path}`: {_no_gradient(leaf)}. Call dequantize on it first.")
            return LORA_FREEZE
        axes = _axes(path, leaf.ndim, *roles.axes[path], shared.get(path, ()))
        fan_in, fan_out = axes.sizes(leaf.shape)
        own = kind.with_axes(axes)
        # No matrix has a higher rank than its shorter side.
        if own.size is not None and own.size > min(fan_in, fan_out):
            own = own.with_size(min(fan_in, fan_out))
        of_rank = "" if own.size is None else f" of rank {own.size}"
        count = own.count(tuple(leaf.shape), axes)
        if skip_small and count >= math.prod(leaf.shape):
            # Counts in the message are per shared entry, like fan_in and fan_out.
            entries = math.prod(leaf.shape[d] for d in axes.shared)
            notes.append(
                f"`{path}`: an adapter{of_rank} would have {count // entries} parameters for "
                f"{fan_in} inputs × {fan_out} outputs. Give it LORA_FULL, or pass "
                "skip_small=False."
            )
            return LORA_FREEZE
        if own.size != kind.size:
            notes.append(f"`{path}`: its rank is lowered to {own.size}, the highest possible.")
        return own

    decided = [decide(path, leaf) for path, leaf in leaves]
    if not any(isinstance(leaf, AdapterSpec) for leaf in decided):
        raise SpecError(_nothing_found(leaves, where, notes))
    if notes:
        lines = "\n".join(f"  {line}" for line in notes)
        warnings.warn(
            f"infer_spec did not adapt these weights as requested:\n{lines}\nTo silence this "
            "warning, exclude such weights with `where`.",
            UnadaptedWarning,
            stacklevel=3,
        )
    return jax.tree.unflatten(structure, decided)


def roles_of(
    fn: Any, leaves: list[tuple[str, Any]], structure: Any, args: Any, kwargs: Any
) -> Roles:
    """Returns the roles of a function's parameters, found by tracing it."""
    # Any adapter makes a leaf a weight for `trace`; this one has no kind.
    marker = Adapter()
    marked = [Leaf(path, leaf, marker if is_array(leaf) else None) for path, leaf in leaves]
    matrices = {path for path, leaf in leaves if _is_matrix(leaf)}

    def known_by_its_path(leaf: Leaf) -> FactoredArray:
        # An empty term that only carries the path: nothing here is evaluated.
        return FactoredArray(as_base(leaf.frozen), (Term((), (), (), (leaf.path,)),))

    call = Call((None, *args), kwargs, {0: FlatPair(marked, structure)})
    traced = trace(fn, call, known_by_its_path)
    consts = [None] * len(traced.jaxpr.consts)
    paths = [
        value.terms[0].sources[0] if isinstance(value, FactoredArray) else None
        for value in traced.operands
    ]
    kinds = [
        DATA if is_data else path if path in matrices else None
        for path, is_data in zip([*consts, *paths], traced.is_data, strict=True)
    ]
    return find_roles(traced.jaxpr, kinds)


def _is_matrix(leaf: Any) -> bool:
    return is_array(leaf) and leaf.ndim >= 2 and jnp.issubdtype(leaf.dtype, jnp.number)


def _is_vector(leaf: Any) -> bool:
    """Whether at most one axis is longer than one, such as a gain of shape (1, out)."""
    return sum(size != 1 for size in leaf.shape) < 2


def _remedy(leaf: Any) -> str:
    if _is_vector(leaf):
        return "It is a vector, which has no low rank: give it LORA_FULL to train it."
    return "Give it a LoraSpec that names its axes, or LORA_FULL."


def _accepts(where: Pattern | None, path: str) -> bool:
    return where is None or matches(where, path)


def _no_gradient(leaf: Any) -> str:
    return f"it holds {leaf.dtype}, which has no gradient"


def _shared_axes(shared_axes: SharedAxes, paths: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Returns the axes that the user wants shared, by path; the first matching pattern wins."""
    if not isinstance(shared_axes, Mapping):
        return dict.fromkeys(paths, tuple(shared_axes))
    axes_of: dict[str, tuple[int, ...]] = {}
    for pattern, axes in shared_axes.items():
        matched = [path for path in paths if matches(pattern, path)]
        if not matched:
            raise SpecError(
                f"shared_axes: {shown(pattern)} matches no parameter of two or more axes; there "
                f"are {some(paths)}."
            )
        axes_of = dict.fromkeys(matched, tuple(axes)) | axes_of
    return axes_of


def _axes(
    path: str, ndim: int, inputs: Sequence[int], outputs: Sequence[int], shared: Sequence[int]
) -> Axes:
    """Returns the roles of all axes: those found, without the axes that the user wants shared."""
    wanted = normalize(path, ndim, "shared_axes", shared)
    inputs, outputs = ([d for d in axes if d not in wanted] for axes in (inputs, outputs))
    # Axes that no use gives a role, and those that the user wants shared.
    rest = [d for d in range(ndim) if d not in (*inputs, *outputs)]
    return resolve_axes(path, ndim, inputs, outputs, rest)


def _nothing_found(
    leaves: Sequence[tuple[str, Any]], where: Pattern | None, notes: Sequence[str]
) -> str:
    """Returns the error message for an inference that adapts nothing."""
    chosen = "" if where is None else f" whose path {shown(where)} accepts"
    matrices = [path for path, leaf in leaves if _is_matrix(leaf)]
    message = (
        f"The function has no weight{chosen} that is used in a product, a convolution or a lookup "
        f"and can be adapted. Parameters of two or more axes: {some(matrices) or 'none'}."
    )
    integers = [
        f"`{path}` ({leaf.dtype})"
        for path, leaf in leaves
        if _is_matrix(leaf) and not jnp.issubdtype(leaf.dtype, jnp.inexact)
    ]
    if integers:
        message += f" Of them, {', '.join(integers[:8])} have no gradient."
    return "\n  ".join([message, *notes])
