"""`infer_spec`: the roles of every weight's axes, found by tracing instead of guessing.

Each candidate is traced as an outer product of one vector for each axis, so that every axis stays
apart through reshapes and transposes, and the first product or look-up that a weight meets shows
which axes meet the input (they are summed over, or indexed), which make the output, and which are
shared (all others).
"""

from typing import Any

import jax
import jax.numpy as jnp

from ._axes import Axes
from ._errors import SpecError
from ._pair import Leaf, flatten_params, is_array
from ._spec import LORA_FREEZE, LoraSpec, Pattern, matches
from ._terms import FactoredArray, Label, Term
from ._transform import Call, Pair, trace, uses
from ._weight import LoraWeight, Scaling


def infer_spec(
    fn: Any,
    params: Any,
    *args: Any,
    rank: int,
    alpha: float | None = None,
    scaling: Scaling = "standard",
    where: Pattern | None = None,
    **kwargs: Any,
) -> Any:
    """A spec for every parameter that `fn` multiplies with something or looks rows up in.

    Traces `fn(params, *args, **kwargs)` without any arithmetic. Convolutions, transposed, stacked
    and expert weights get the right axes; parameters that are only added or multiplied entry by
    entry, such as biases and norm scales, are left frozen.

    Args:
        fn: a function of the parameters first.
        params: the parameters, or a tree of `jax.ShapeDtypeStruct`.
        *args: what `fn` is called with; arrays may be `jax.ShapeDtypeStruct`.
        rank: of every adapter; a weight with fewer inputs or outputs than that gets as many.
        alpha: as in `LoraSpec`.
        scaling: as in `LoraSpec`.
        where: only parameters whose path it accepts: a glob, a compiled regular expression or a
            callable.
        **kwargs: what `fn` is called with.

    Returns:
        A tree with the structure of `params` of `LoraSpec`s and `LORA_FREEZE`, for `init_lora`;
        edit its leaves as you like.

    Raises:
        SpecError: where no weight is found, or none that `where` accepts.

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
    leaves, structure = flatten_params(params)
    marker = LoraWeight(None, None, rank=rank)
    pair = Pair(
        [
            Leaf(path, leaf, marker if _is_candidate(leaf) and _accepts(where, path) else None)
            for path, leaf in leaves
        ],
        structure,
    )
    traced = trace(fn, Call((params, *args), kwargs, {0: pair}), _probe)
    roles: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}
    for use in uses(traced):
        if use.kind in ("product", "rows") and use.inputs and use.outputs:
            roles.setdefault(str(use.source), (use.inputs, use.outputs))
    if not roles:
        chosen = "" if where is None else f" whose path {where!r} accepts"
        paths = ", ".join(f"`{path}`" for path, leaf in leaves[:8] if _is_candidate(leaf))
        raise SpecError(
            f"The function uses no weight{chosen} in a product or a look-up. Parameters of two or "
            f"more axes: {paths or 'none'}."
        )

    def decide(path: str, leaf: Any) -> Any:
        if leaf is None or path not in roles:
            return None if leaf is None else LORA_FREEZE
        inputs, outputs = roles[path]
        shared = tuple(d for d in range(leaf.ndim) if d not in (*inputs, *outputs))
        largest = min(Axes(shared, inputs, outputs).sizes(leaf.shape))
        return LoraSpec(min(rank, largest), alpha, scaling, inputs, outputs, shared)

    return jax.tree.unflatten(structure, [decide(path, leaf) for path, leaf in leaves])


def _accepts(where: Pattern | None, path: str) -> bool:
    return where is None or matches(where, path)


def _is_candidate(leaf: Any) -> bool:
    return is_array(leaf) and leaf.ndim >= 2 and jnp.issubdtype(leaf.dtype, jnp.inexact)


def _probe(leaf: Leaf) -> FactoredArray:
    shape = leaf.frozen.shape
    labels = tuple(Label(d, size, d) for d, size in enumerate(shape))
    vectors = tuple(jax.ShapeDtypeStruct((size,), jnp.float32) for size in shape)
    term = Term(
        vectors,  # pyright: ignore[reportArgumentType]
        tuple((label,) for label in labels),
        tuple((label,) for label in labels),
        (leaf.path,),
    )
    return FactoredArray(leaf.frozen, (term,))
