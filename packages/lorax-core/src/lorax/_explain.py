"""`explain`: a table of how every adapter is used, without running the model."""

import collections
import dataclasses
import html
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.export
import jax.extend.core as jex
import jax.numpy as jnp

from ._arrays import is_array
from ._base import QuantizedWeight, bytes_of
from ._interpreter import Interpreter
from ._keywords import refuses_ambiguous_keywords
from ._merge import count_params
from ._pair import Leaf, pair_of_call
from ._registry import RULES
from ._transform import Traced, bind_call, lora, run, trace, traced_as, uses
from ._uses import Use


@dataclasses.dataclass(frozen=True)
class Row:
    """One trained parameter.

    Attributes:
        path: its path.
        shape: the shape of the weight.
        rank: the rank, or None for kinds of adapters without one.
        size: what the table shows: the rank of plain LoRA, kind and rank of another adapter, or
            "full" for a `LORA_FULL` parameter.
        trainable: how many numbers are trained.
        status: "covered", "materialized", "never used", or "full" for a `LORA_FULL` parameter,
            which the model uses as it is.
        uses: the primitives that use the weight, with counts.
    """

    path: str
    shape: tuple[int, ...]
    rank: int | None
    size: str
    trainable: int
    status: str
    uses: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Cost:
    """The cost of one call as XLA counts it before optimization; None if it has no count.

    There is no count if a size is symbolic.
    """

    flops: float | None
    bytes: float | None


@dataclasses.dataclass(frozen=True)
class Explanation:
    """The result of `explain`; prints as a table, in a notebook as HTML.

    Attributes:
        rows: one for each trained parameter.
        trainable: how many numbers are trained.
        total: how many numbers the base model has.
        base: the cost of one call of the base model with float weights.
        adapted: the cost of the same call with adapters, on quantized weights if there are any.
        frozen_bytes: the bytes of the frozen tree.
        tunable_bytes: the bytes of the tunable tree.
        kept_bytes: the bytes saved for the backward pass of the trained parameters, without the
            arguments of the call; None if there is no backward pass or a size is symbolic.
        no_derivative: JAX's message if there is no backward pass.
        quantized: how many numbers of the base model are stored as codes.
        bits: bits per quantized number, scales included; None if there are none.
        decoded: the uses that decode a quantized weight without an adapter, other than products
            and lookups: path, primitive and line of each.
    """

    rows: tuple[Row, ...]
    trainable: int
    total: int
    base: Cost
    adapted: Cost
    frozen_bytes: int = 0
    tunable_bytes: int = 0
    kept_bytes: int | None = None
    no_derivative: str = ""
    quantized: int = 0
    bits: float | None = None
    decoded: tuple[tuple[str, str, str], ...] = ()

    def _table(self) -> list[tuple[str, ...]]:
        head = ("parameter", "shape", "rank", "trainable", "status", "used by")
        return [head] + [
            (
                row.path,
                "×".join(map(str, row.shape)),
                row.size,
                f"{row.trainable:,}",
                row.status,
                ", ".join(row.uses),
            )
            for row in self.rows
        ]

    def _summary(self) -> list[str]:
        share = 100 * self.trainable / self.total if self.total else 0.0
        lines = [
            f"{self.trainable:,} of {self.total:,} parameters are trained ({share:.2f} %).",
            f"Bytes: {self.frozen_bytes:,} frozen, {self.tunable_bytes:,} tunable.",
        ]
        if self.kept_bytes is not None:
            lines.append(f"Bytes kept for the backward pass: {self.kept_bytes:,}.")
        if self.no_derivative:
            lines.append(f"The function has no backward pass: {self.no_derivative}")
        if self.bits is not None:
            lines.append(f"{self.quantized:,} parameters are stored in {self.bits:.2f} bits each.")
        for path, primitive, line in self.decoded:
            where = f" at {line}" if line else ""
            lines.append(f"`{path}` is decoded to a whole array for `{primitive}`{where}.")
        for name, unit in (("flops", "FLOPs"), ("bytes", "bytes moved")):
            base, adapted = getattr(self.base, name), getattr(self.adapted, name)
            if base and adapted:
                lines.append(
                    f"{unit} of one call: {adapted:,.0f}, {adapted / base:.3f} × the base model's "
                    f"{base:,.0f}."
                )
        return lines

    def __str__(self) -> str:
        table = self._table()
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        right = (False, True, True, True, False, False)
        lines = [
            "  ".join(
                cell.rjust(width) if flush else cell.ljust(width)
                for cell, width, flush in zip(row, widths, right, strict=True)
            ).rstrip()
            for row in table
        ]
        lines.insert(1, "  ".join("─" * width for width in widths))
        return "\n".join([*lines, "", *self._summary()])

    def _repr_html_(self) -> str:
        def row(cells: Sequence[str], tag: str) -> str:
            return "<tr>" + "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in cells) + "</tr>"

        head, *body = self._table()
        rows = row(head, "th") + "".join(row(cells, "td") for cells in body)
        return f"<table>{rows}</table><p>{'<br>'.join(map(html.escape, self._summary()))}</p>"


@refuses_ambiguous_keywords
def explain(
    fn: Callable[..., Any],
    pair: Any,
    /,
    *args: Any,
    through_custom_derivatives: bool = False,
    **kwargs: Any,
) -> Explanation:
    """Reports how `lora(fn)(pair, *args, **kwargs)` uses every adapter, without running it.

    Args:
        fn: the original model, a function whose first argument is the parameters.
        pair: the pair `(frozen, tunable)`, or its two trees as two arguments; arrays may be
            `jax.ShapeDtypeStruct`.
        *args: the other arguments of `fn`; arrays may be `jax.ShapeDtypeStruct`.
        through_custom_derivatives: as in `lora`.
        **kwargs: the keyword arguments of `fn`.

    Returns:
        An `Explanation`: for every trained parameter its rank, its number of trained values, and
        whether its uses are covered by rules, materialize the weight, or do not exist; the costs
        of a call and of the same call of the base model, as XLA counts them before optimization;
        and the bytes that a backward pass needs.

    Raises:
        PairError: if `pair` is not a pair.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from lorax import explain, init_lora
        >>> params = {"w": jnp.ones((30, 20)), "typo": jnp.ones((30, 20))}
        >>> pair = init_lora(params, {"w": 2, "typo": 2}, jax.random.key(0))
        >>> report = explain(lambda params, x: x @ params["w"], pair, jnp.ones((5, 30)))
        >>> {row.path: row.status for row in report.rows}
        {'typo': 'never used', 'w': 'covered'}
    """
    pair, args = pair_of_call((pair, *args), "explain")
    call = bind_call(fn, (0,), (), (pair, *args), kwargs)
    traced = trace(fn, call)
    uses_of: dict[str, list[Use]] = collections.defaultdict(list)
    for use in uses(traced, through_custom_derivatives):
        uses_of[str(use.source)].append(use)
    # Quantized weights without an adapter.
    bare = {leaf.path for leaf in call.leaves if leaf.is_weight and not leaf.is_adapted}
    decoded = dict.fromkeys(
        (path, use.primitive, use.line)
        for path in bare
        for use in uses_of[path]
        if use.kind in ("materialized", "returned")
    )
    weights = [leaf.frozen for leaf in call.leaves if isinstance(leaf.frozen, QuantizedWeight)]
    quantized = sum(weight.size for weight in weights)
    frozen = [
        x
        for leaf in call.leaves
        for x in (leaf.frozen, *leaf.frozen_factors.values())
        if is_array(x)
    ]
    tunable = [x for x in jax.tree.leaves([leaf.tunable for leaf in call.leaves]) if is_array(x)]
    rows = [_row(leaf, uses_of[leaf.path]) for leaf in call.leaves if leaf.tunable is not None]
    bases = [leaf.frozen if leaf.frozen is not None else leaf.tunable for leaf in call.leaves]
    # The base model with floats, also where weights are quantized.
    plain = list(map(traced_as, traced.operands))
    kept, no_derivative = _kept(fn, pair, args, kwargs, through_custom_derivatives)
    return Explanation(
        tuple(rows),
        count_params([leaf.tunable for leaf in call.leaves]),
        count_params([base for base in bases if is_array(base)]),
        _cost(jex.jaxpr_as_fun(traced.jaxpr), *plain),
        _cost(_adapted(traced, through_custom_derivatives), traced.operands),
        frozen_bytes=sum(map(bytes_of, frozen)),
        tunable_bytes=sum(map(bytes_of, tunable)),
        kept_bytes=kept,
        no_derivative=no_derivative,
        quantized=quantized,
        bits=8 * sum(map(bytes_of, weights)) / quantized if quantized else None,
        decoded=tuple(decoded),
    )


def _adapted(traced: Traced, through: bool) -> Callable[..., Any]:
    interpreter = Interpreter(RULES, through_custom_derivatives=through)
    return lambda operands: run(interpreter, traced, operands)


def _kept(
    fn: Callable[..., Any], pair: Any, args: Any, kwargs: Any, through: bool
) -> tuple[int | None, str]:
    """Returns the bytes saved for the backward pass, or the reason why there is none."""
    frozen, tunable = pair
    trained, structure = jax.tree.flatten(tunable)
    # Only inexact leaves have a derivative; other leaves are captured.
    moves = [is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.inexact) for leaf in trained]
    rest, whole = jax.tree.flatten((frozen, trained, args, kwargs))
    dynamic = [isinstance(leaf, jax.Array | jax.ShapeDtypeStruct) for leaf in rest]
    if _is_symbolic([leaf for leaf, traced in zip(rest, dynamic, strict=True) if traced]):
        return None, ""
    adapted = lora(
        fn, on_materialize="allow", on_unused="allow", through_custom_derivatives=through
    )

    def kept(chosen: list[Any], given: list[Any]) -> list[jax.Array]:
        arrays = iter(given)
        filled = [next(arrays) if d else leaf for d, leaf in zip(dynamic, rest, strict=True)]
        frozen, leaves, args, kwargs = jax.tree.unflatten(whole, filled)

        def outputs(chosen: list[Any]) -> list[jax.Array]:
            now = iter(chosen)
            tree = [next(now) if m else leaf for m, leaf in zip(moves, leaves, strict=True)]
            out = adapted((frozen, jax.tree.unflatten(structure, tree)), *args, **kwargs)
            return [x for x in jax.tree.leaves(out) if _is_inexact(x)]

        # The residuals are leaves of the pullback, which is a pytree; arguments of the call do not
        # count.
        outs, pullback = jax.vjp(outputs, chosen)
        pullback(outs)  # raises if some function has no reverse derivative
        return jax.tree.leaves(pullback)

    chosen = [leaf for m, leaf in zip(moves, trained, strict=True) if m]
    given = [leaf for d, leaf in zip(dynamic, rest, strict=True) if d]
    try:
        jaxpr = jax.make_jaxpr(kept)(chosen, given).jaxpr
    except Exception as error:  # the derivative of a user's primitive may raise anything
        return None, str(error).partition("\n")[0]
    # Residuals that are inputs or constants take no additional memory.
    before = {*jaxpr.invars, *jaxpr.constvars}
    residuals = {v for v in jaxpr.outvars if not isinstance(v, jex.Literal)} - before
    return sum(bytes_of(v.aval) for v in residuals), ""


def _is_inexact(x: Any) -> bool:
    return isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jnp.inexact)


def _is_symbolic(operands: Any) -> bool:
    sizes = itertools.chain(*(leaf.shape for leaf in jax.tree.leaves(operands)))
    return any(map(jax.export.is_symbolic_dim, sizes))


def _row(leaf: Leaf, leaf_uses: Sequence[Use]) -> Row:
    adapter = leaf.tunable
    if not leaf.is_adapted:
        return Row(leaf.path, adapter.shape, None, "full", count_params(adapter), "full", ())
    kinds = {use.kind for use in leaf_uses}
    status = "covered"
    if not kinds:
        status = "never used"
    elif kinds & {"materialized", "returned"}:
        status = "materialized"
    # A weight may be used by several primitives, and several times by each.
    counts = collections.Counter(use.primitive for use in leaf_uses)
    counted = tuple(f"{name} ×{n}" if n > 1 else name for name, n in counts.items())
    rank = getattr(adapter, "rank", None)
    shape = leaf.frozen.shape
    return Row(leaf.path, shape, rank, adapter.summary(), count_params(adapter), status, counted)


def _cost(function: Callable[..., Any], *operands: Any) -> Cost:
    if _is_symbolic(operands):
        return Cost(None, None)  # A program with symbolic sizes has no count.
    # Lowered but not compiled: counts before optimization, on any platform.
    counted = jax.jit(function).lower(*operands).cost_analysis()
    if not isinstance(counted, dict):
        return Cost(None, None)
    return Cost(counted.get("flops"), counted.get("bytes accessed"))
