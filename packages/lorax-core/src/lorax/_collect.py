"""`collect_starts`: statistics of inputs or gradients over a few batches, for initial factors.

Inputs are read by a meter on each weight (`_meter`); gradients are those of the function itself.
The statistics of a weight take `fan_in²` numbers or as many as the weight, and are reduced to a few
vectors before the next group of weights is collected.
"""

import dataclasses
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ._adapter import Labeled
from ._adapter_spec import AdapterSpec
from ._arrays import is_array
from ._axes import Axes
from ._base import as_base, decoded
from ._contract import wide_dtype
from ._errors import ArgumentError, SpecError
from ._factored import FactoredArray
from ._init import flatten_spec
from ._interpreter import Interpreter
from ._meter import Meter, Moments
from ._pair import Leaf, flatten_params
from ._registry import RULES
from ._spec import check_leaf
from ._transform import Call, FlatPair, run, trace
from ._uses import Use

Collected = dict[str, dict[str, jax.Array]]


def collect_starts(
    fn: Callable[..., Any],
    params: Any,
    spec: Any,
    batches: Iterable[Any],
    *,
    at_once: int | None = None,
    through_custom_derivatives: bool = False,
) -> Collected:
    """Collects inputs or gradients of weights over a few batches, for `init_lora(collected=)`.

    Every weight whose spec has `init="eva"`, "corda" or "lora_ga" (or an `EvaStart`, `CordaStart`
    or `LoraGAStart`) is collected, whether `fn` uses it in products, convolutions or experts,
    stacked under `scan`, or under `remat` and `vmap`. For "eva" and "corda", the moments `Σ x xᵀ`
    of the rows that meet the weight are summed batch by batch, and no row is kept. For "lora_ga",
    `fn` must be a loss, and the gradient of the weight is averaged over the batches.

    All rows count equally, including padding, so leave padding out of the batches. Inputs that the
    function excludes from differentiation, by `stop_gradient`, are not read.

    Args:
        fn: a function whose first argument is the parameters: the model, or for "lora_ga" a loss
            that returns a scalar. It must be reverse-differentiable, so loops need a fixed length.
        params: the parameters, as for `init_lora`.
        spec: as for `init_lora`.
        batches: each a tuple of the other arguments of `fn`, or its only other argument.
        at_once: how many weights to collect per pass over the batches; by default all. Each of them
            takes two float32 arrays of `fan_in²` numbers per entry of its shared axes, or of its
            own size for "lora_ga": the sum, and the contribution of one batch.
        through_custom_derivatives: as in `lora`.

    Returns:
        For each path, small arrays by name: about as many numbers as the initial factors have.

    Raises:
        SpecError: if no spec needs collected statistics; if the inputs of a weight cannot be
            read, or are fewer rows than its rank. The message names the path.
        ArgumentError: if there is no batch, or `fn` must be a loss and is not.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from lorax import LoraSpec, collect_starts, init_lora
        >>> model = lambda params, x: jnp.tanh(x @ params["w"])
        >>> params, spec = {"w": jnp.ones((5, 3))}, {"w": LoraSpec(2, init="eva")}
        >>> batches = [jax.random.normal(jax.random.key(k), (8, 5)) for k in range(3)]
        >>> collected = collect_starts(model, params, spec, batches)
        >>> frozen, tunable = init_lora(params, spec, jax.random.key(0), collected=collected)
        >>> tunable["w"].a.shape
        (5, 2)
    """
    leaves, structure = flatten_params(params)
    wanted = _wanted(leaves, flatten_spec(spec, structure))
    batches = [batch if isinstance(batch, tuple) else (batch,) for batch in batches]
    if not batches:
        raise ArgumentError("collect_starts needs at least one batch.")
    if at_once is not None and at_once < 1:
        raise ArgumentError(f"collect_starts: at_once is {at_once}; it must be at least 1.")
    collected: Collected = {}
    # Moments and gradients need different passes over the batches.
    for is_gradient in (False, True):
        several = [w for w in wanted if (w.spec.collects.source == "gradients") == is_gradient]
        step = max(len(several), 1) if at_once is None else at_once
        for first in range(0, len(several), step):
            group = several[first : first + step]
            derivative = _gradients if is_gradient else _moments
            model = _Model(fn, leaves, structure, group, through_custom_derivatives)
            totals = _summed(lambda *x, d=derivative, m=model: d(m, *x), model, batches)
            for weight, total in zip(group, totals, strict=True):
                collected[weight.path] = weight.reduced(total, len(batches))
    # In the order of the parameters.
    return {weight.path: collected[weight.path] for weight in wanted}


@dataclasses.dataclass(frozen=True)
class _Wanted:
    """A weight to collect."""

    path: str
    position: int
    base: Any
    spec: AdapterSpec
    axes: Axes

    @property
    def is_gradient(self) -> bool:
        return self.spec.collects.source == "gradients"

    @property
    def wide(self) -> Any:
        return wide_dtype(self.base.dtype)

    def zeros(self) -> Any:
        """Returns the sums before the first batch: zeros."""
        shape = self.base.shape
        if self.is_gradient:
            return jnp.zeros(shape, self.wide)
        shared = [shape[d] for d in self.axes.shared]
        inputs = [shape[d] for d in self.axes.inputs]
        # Σ x xᵀ, Σ x and Σ 1, for each entry of the shared axes
        shapes = ((*shared, *inputs, *inputs), (*shared, *inputs), tuple(shared))
        return tuple(jnp.zeros(shape, self.wide) for shape in shapes)

    def metered(self, base: Any, zeros: Moments) -> FactoredArray:
        """Returns the weight with a meter, as the function is evaluated on it."""
        axes = Labeled.of(self.axes, base.shape)
        is_scaled = self.spec.collects.source == "scaled inputs"
        meter = Meter.of(zeros, axes.out, axes.shared, axes.inputs, self.path, is_scaled)
        return FactoredArray(as_base(base, self.path), (), meter=meter)

    def reduced(self, total: Any, batches: int) -> dict[str, jax.Array]:
        """Reduces the sums to a few vectors per entry of the shared axes."""
        rank, start = self.spec.size or 1, self.spec.collects
        matrices = self.axes.matrices(jnp.asarray(decoded(self.base))).astype(self.wide)
        entries, fan_in, _ = matrices.shape
        if self.is_gradient:
            collected: Any = self.axes.matrices(total) / batches
        else:
            second, first, count = total
            self._check_count(count, rank if start.source == "inputs" else 1)
            second = second.reshape(entries, fan_in, fan_in)
            collected = second, first.reshape(entries, fan_in), count.reshape(entries)
        reduce = lambda each: start.reduced(*each, rank)  # noqa: E731
        # Sequential `map`: under `vmap`, every entry would take as many iterations as the slowest.
        kept = jax.jit(lambda *each: jax.lax.map(reduce, each))(matrices, collected)
        if not all(bool(jnp.isfinite(x).all()) for x in kept.values()):
            label = "gradients" if self.is_gradient else "inputs"
            raise SpecError(
                f"`{self.path}` has {start}, and the {label} of an entry are all zero, or not "
                "finite, in these batches. Give collect_starts other batches, or give it another "
                "init."
            )
        return kept

    def _check_count(self, count: jax.Array, least: int) -> None:
        if (fewest := int(count.min())) >= least:
            return
        where = "" if not count.ndim else " of one entry of its shared axes"
        if fewest == 0:
            raise SpecError(
                f"No input of `{self.path}`{where} was collected. Either no input reaches it in "
                "these batches, or no output of the function has a derivative with respect to "
                "it, as with `stop_gradient` or `argmax`. Choose another init for it, or pass "
                "other batches."
            )
        raise SpecError(
            f"`{self.path}`{where} got {fewest} input rows in these batches, fewer than its rank "
            f"{least}. Give collect_starts more batches, or lower the rank."
        )


def _wanted(leaves: Sequence[tuple[str, Any]], specs: Sequence[Any]) -> list[_Wanted]:
    wanted: list[_Wanted] = []
    for k, ((path, leaf), leaf_spec) in enumerate(zip(leaves, specs, strict=True)):
        checked = check_leaf(path, leaf, leaf_spec)
        if isinstance(checked, tuple) and checked[0].collects is not None:
            if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
                raise SpecError(
                    f"`{path}` is complex; {checked[0].collects} supports only real weights."
                )
            wanted.append(_Wanted(path, k, leaf, *checked))
    if not wanted:
        raise SpecError(
            "No leaf of the spec has an init that uses inputs or gradients. Give some of them "
            'LoraSpec(..., init="eva"), "corda" or "lora_ga".'
        )
    return wanted


@dataclasses.dataclass(frozen=True)
class _Model:
    """The function, with the weights to collect in one pass."""

    fn: Callable[..., Any]
    leaves: Sequence[tuple[str, Any]]
    structure: Any
    group: Sequence[_Wanted]
    through_custom_derivatives: bool

    def tree(self, arrays: Sequence[Any]) -> Any:
        """Returns the tree of parameters."""
        return jax.tree.unflatten(self.structure, arrays)


def _summed(derivative: Callable[..., Any], model: _Model, batches: Sequence[Any]) -> list[Any]:
    """Returns the sum over the batches of a derivative with respect to what is collected."""
    params = [leaf for _, leaf in model.leaves]
    totals = [weight.zeros() for weight in model.group]
    compiled: dict[Hashable, Any] = {}
    for batch in batches:
        leaves, structure = jax.tree.flatten((params, batch))
        moves = tuple(map(is_array, leaves))
        rest = [None if dynamic else leaf for dynamic, leaf in zip(moves, leaves, strict=True)]
        # Leaves that are not arrays are part of the program.
        key: Hashable = (structure, moves, tuple(map(_identity, rest)))
        if key not in compiled:

            def step(
                totals: Any,
                arrays: Any,
                moves: Any = moves,
                rest: Any = rest,
                tree: Any = structure,
            ) -> Any:
                given = iter(arrays)
                filled = [
                    next(given) if dynamic else leaf
                    for dynamic, leaf in zip(moves, rest, strict=True)
                ]
                params, batch = jax.tree.unflatten(tree, filled)
                new = derivative(params, batch)
                return jax.tree.map(lambda total, x: total + x.astype(total.dtype), totals, new)

            # The totals are donated: each sum is updated in place.
            compiled[key] = jax.jit(step, donate_argnums=0)
        arrays = [leaf for dynamic, leaf in zip(moves, leaves, strict=True) if dynamic]
        totals = compiled[key](totals, arrays)
    return totals


def _identity(leaf: Any) -> Hashable:
    """Returns what two leaves share only if they are equal; one that has no hash equals itself."""
    try:
        hash(leaf)
    except TypeError:
        return id(leaf)  # `compiled` keeps the leaf alive
    return type(leaf), leaf


def _gradients(model: _Model, params: list[Any], batch: tuple[Any, ...]) -> list[Any]:
    """Returns the gradient of the loss with respect to each weight."""

    def loss(chosen: list[Any]) -> Any:
        arrays = list(params)
        for weight, array in zip(model.group, chosen, strict=True):
            arrays[weight.position] = array
        # The gradient of a quantized weight is that of its decoded array.
        out = model.fn(model.tree(list(map(decoded, arrays))), *batch)
        if not (is_array(out) and out.ndim == 0 and jnp.issubdtype(out.dtype, jnp.floating)):
            shape = getattr(out, "shape", type(out).__name__)
            raise ArgumentError(
                f'init="lora_ga" of `{model.group[0].path}` takes the gradient of a loss, but the '
                f"function returned {shape}. Pass collect_starts a function that returns a "
                "scalar."
            )
        return out

    return jax.grad(loss)([decoded(params[weight.position]) for weight in model.group])


def _moments(model: _Model, params: list[Any], batch: tuple[Any, ...]) -> list[Any]:
    """Returns the moments of each weight, as a derivative of any output of the function."""
    by_path = {weight.path: weight for weight in model.group}
    leaves = [
        Leaf(path, array, by_path[path].spec.blank(array.shape, by_path[path].axes))
        if path in by_path
        else Leaf(path, array, None)
        for (path, _), array in zip(model.leaves, params, strict=True)
    ]
    # The parameters are argument 0 and are taken from the pair.
    call = Call((None, *batch), {}, {0: FlatPair(leaves, model.structure)})

    def total(zeros: list[Moments]) -> jax.Array:
        given = {weight.path: x for weight, x in zip(model.group, zeros, strict=True)}
        adapt = lambda leaf: by_path[leaf.path].metered(leaf.frozen, given[leaf.path])  # noqa: E731
        traced = trace(model.fn, call, adapt)
        interpreter = Interpreter(
            RULES, through_custom_derivatives=model.through_custom_derivatives
        )
        outs = run(interpreter, traced, traced.operands)
        _check_uses(interpreter.uses)
        # Any scalar that depends on all outputs will do: the backward pass of a meter ignores its
        # cotangent, so it only has to be reached.
        numbers = [jnp.sum(jnp.real(x)) for x in outs if jnp.issubdtype(x.dtype, jnp.inexact)]
        return sum((x.astype(jnp.float32) for x in numbers), jnp.zeros((), jnp.float32))

    return jax.grad(total)([weight.zeros() for weight in model.group])


def _check_uses(uses: Sequence[Use]) -> None:
    """Raises for a weight some of whose inputs were not read."""
    for use in uses:
        if use.kind == "returned":
            raise SpecError(f"`{use.source}` is returned by the function; give it another init.")
        if use.kind == "materialized":
            raise SpecError(
                f"The inputs of `{use.source}` cannot be collected: `{use.primitive}` at "
                f"{use.line or 'an unknown line'} {use.reason or 'has no rule for it'}. Give it "
                "another init."
            )
