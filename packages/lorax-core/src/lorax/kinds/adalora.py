"""AdaLoRA: a product of two factors with one weight per rank, like a singular value decomposition.

delta[shared, in, out]  =  scale · Σ_r a[shared, in, r] · e[shared, r] · b[shared, r, out]
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .._adapter import Adapter, Labeled, Layout, defkind, static
from .._adapter_spec import AdapterSpec, Start, Started
from .._arrays import path_string
from .._axes import Axes
from .._contract import wide_dtype
from .._errors import ArgumentError
from .lora import (
    check_rank,
    check_scale,
    draw_two,
    lora_scale,
    two_factors,
    warn_of_high_rank,
)


@defkind
class AdaloraWeight(Adapter):
    """The three trained factors of one weight.

        delta = scale · a @ diag(e) @ b      for a kernel [in, out]

    `scale` is `alpha / rank`, or 1 if `alpha` is None. A rank whose entry of `e` is zero does not
    contribute. Zhang et al. 2023, arXiv:2303.10512.

    Attributes:
        a: `[*shared, *in, rank]`, the fan-in factor.
        e: `[*shared, rank]`, the weights of the ranks.
        b: `[*shared, rank, *out]`, the fan-out factor.
        rank: the inner size.
        alpha: the numerator of the scale, or None for a scale of 1.
        in_axes: the weight's axes that meet the input.
        out_axes: the weight's axes that produce the output.
        shared_axes: the weight's axes with their own factors for each entry.
    """

    kind = "adalora"

    a: Any
    e: Any
    b: Any
    rank: int = static()
    alpha: float | None = static(None)
    in_axes: tuple[int, ...] = static((0,))
    out_axes: tuple[int, ...] = static((1,))
    shared_axes: tuple[int, ...] = static(())

    @property
    def scale(self) -> float:
        """The scalar that multiplies the product."""
        return lora_scale(self.rank, self.alpha, "standard")

    def layout(self, shape: tuple[int, ...]) -> Layout:
        """Returns the labels of the factors for a weight of `shape`."""
        axes = Labeled.of(self.axes, shape)
        a, b = two_factors(axes, self.rank)
        # Δ = scale · a [in, rank] · diag(e [rank]) · b [rank, out], as U · diag(σ) · Vᵀ
        return Layout(axes.out, {"a": a, "e": (*axes.shared, axes.inner(0, self.rank)), "b": b})


@dataclasses.dataclass(frozen=True)
class AdaloraSpec(AdapterSpec):
    """The spec of AdaLoRA for one weight.

        delta = scale · a @ diag(e) @ b

    Initially, `e` is zero, and `a` and `b` are normal with a standard deviation of 0.02. The
    initializers of `init_lora` are ignored: a zero `b` would leave all gradients zero.

    Args:
        rank: the inner size, before pruning.
        alpha: the scale is `alpha / rank`; None means 1.
        in_axes: as in `LoraSpec`.
        out_axes: as in `LoraSpec`.
        shared_axes: as in `LoraSpec`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from lorax import AdaloraSpec, init_lora
        >>> params = {"w": jnp.ones((5, 3))}
        >>> frozen, tunable = init_lora(params, {"w": AdaloraSpec(2)}, jax.random.key(0))
        >>> tunable["w"].a.shape, tunable["w"].e.tolist(), tunable["w"].b.shape
        ((5, 2), [0.0, 0.0], (2, 3))
    """

    has_narrow_delta = True
    has_matrix_rank = True

    rank: int
    alpha: float | None = None
    in_axes: Sequence[int] | None = None
    out_axes: Sequence[int] | None = None
    shared_axes: Sequence[int] = ()

    def check(self, path: str, shape: tuple[int, ...], axes: Axes) -> None:
        """Raises `SpecError` for an invalid rank or alpha; warns of a rank that is too high."""
        check_rank(path, self, self.rank)
        check_scale(path, self.alpha)
        warn_of_high_rank(path, self.rank, shape, axes)

    def blank(self, shape: tuple[int, ...], axes: Axes) -> AdaloraWeight:
        """Returns the adapter without arrays."""
        return AdaloraWeight(
            None, None, None, self.rank, self.alpha, axes.inputs, axes.outputs, axes.shared
        )

    def start(self, start: Start) -> Started:
        """Returns small random factors with a delta of zero."""
        a, b = draw_two(start, self.rank, _normal, _normal)
        weight = self.blank(start.base.shape, start.axes)
        shape = weight.layout(start.base.shape).shapes()["e"]
        # e is zero, so Δ is; a and b are not, so e has a gradient.
        return Started(weight.with_factors({"a": a, "e": jnp.zeros(shape, start.dtype), "b": b}))


def _normal(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return jax.random.normal(key, shape, dtype) * 0.02


def adalora_orthogonality(tunable: Any) -> jax.Array:
    """Returns how far the factors of all AdaLoRA weights are from orthonormal, as a penalty.

        mean of ‖aᵀ a − I‖ and ‖b bᵀ − I‖, in the Frobenius norm

    over both factors of each weight and of each entry of its shared axes. PEFT adds half of this to
    the loss.

    Args:
        tunable: the tunable tree; its other leaves are ignored.

    Returns:
        A scalar in float32 or wider; zero if there is no AdaLoRA weight.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from lorax import AdaloraSpec, adalora_orthogonality, init_lora
        >>> pair = init_lora({"w": jnp.ones((5, 3))}, {"w": AdaloraSpec(2)}, jax.random.key(0))
        >>> adalora_orthogonality(pair.tunable).shape
        ()
    """
    distances = [jnp.zeros((0,))]
    for _, weight in _weights(tunable):
        a, b = _matrices(weight)
        for matrix in (a, b):  # [entries, rank, rest]
            # [entries, rank, rest] · [entries, rank, rest]ᵀ -> [entries, rank, rank]
            gram = jnp.einsum("nri,nsi->nrs", matrix, matrix.conj(), precision="highest")
            residual = gram - jnp.eye(weight.rank, dtype=gram.dtype)[None]
            square = jnp.sum(jnp.abs(residual) ** 2, (1, 2))
            # The derivative of the root is infinite at zero, and `where` alone would make it NaN.
            is_zero = square == 0
            root = jnp.sqrt(jnp.where(is_zero, 1.0, square))
            distances.append(jnp.where(is_zero, 0.0, root))
    return jnp.concatenate(distances).sum() / max(1, sum(x.size for x in distances))


def _weights(tunable: Any) -> list[tuple[str, AdaloraWeight]]:
    """Returns the AdaLoRA weights of a tree, in order, with their paths."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tunable, is_leaf=_is_adalora)
    return [(path_string(path), leaf) for path, leaf in leaves if _is_adalora(leaf)]


def _is_adalora(node: Any) -> bool:
    return isinstance(node, AdaloraWeight)


def _matrices(weight: AdaloraWeight) -> tuple[jax.Array, jax.Array]:
    """Returns both factors as `[entries, rank, rest]`, one entry per shared entry."""
    shared = len(weight.shared_axes)
    wide = wide_dtype(weight.a.dtype)
    entries = math.prod(weight.a.shape[:shared])
    a = weight.a.astype(wide).reshape(entries, -1, weight.rank)
    # [*shared, *in, rank] -> [entries, rank, in], and [*shared, rank, *out] -> [entries, rank, out]
    return jnp.swapaxes(a, 1, 2), weight.b.astype(wide).reshape(entries, weight.rank, -1)


class AdaloraState(NamedTuple):
    """The state of a pruner: averages for each AdaLoRA weight, by path.

    Attributes:
        importance: the moving average of |factor · gradient| of each entry of the factors.
        uncertainty: the moving average of its distance from that average.
        kept: the mask of ranks that are kept.
    """

    importance: dict[str, dict[str, jax.Array]]
    uncertainty: dict[str, dict[str, jax.Array]]
    kept: dict[str, jax.Array]


class AdaloraPruner(NamedTuple):
    """Two functions, like an Optax optimizer: `init(tunable)`, and `update` after each step."""

    init: Callable[[Any], AdaloraState]
    update: Callable[[Any, Any, AdaloraState, Any], tuple[Any, AdaloraState]]


def adalora_pruner(
    target_rank: int,
    total_steps: int,
    *,
    t_init: int = 0,
    t_final: int = 0,
    every: int = 1,
    beta1: float = 0.85,
    beta2: float = 0.85,
) -> AdaloraPruner:
    """Makes AdaLoRA's rank schedule, which zeroes the least important ranks of all weights.

    The budget is the number of ranks that are kept over all weights. It falls with the cube of the
    remaining steps, from all ranks to `target_rank` per weight. The importance of a rank is that of
    its entry of `e` plus the mean importance of its column of `a` and of its row of `b`. That of an
    entry is the moving average of |factor · gradient| times that of its deviation. A pruned rank
    may come back until the last mask is set.

    Args:
        target_rank: the ranks kept at the end, on average per weight and per entry of its shared
            axes.
        total_steps: the number of training steps.
        t_init: the number of initial steps in which all ranks are kept.
        t_final: the number of final steps in which the mask is fixed.
        every: in between, ranks are pruned in every step that is a multiple of this.
        beta1: the decay of the average of the importance.
        beta2: the decay of the average of its deviation.

    Returns:
        The `AdaloraPruner`: `state = init(tunable)`, and after each step of the optimizer
        `tunable, state = update(tunable, grads, state, step)`. Both run under `jax.jit`, where
        `step` may be traced. Other leaves of `tunable` are unchanged.

    Raises:
        ArgumentError: if the numbers are inconsistent.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from lorax import AdaloraSpec, adalora_pruner, init_lora
        >>> params, spec = {"w": jnp.ones((5, 3))}, {"w": AdaloraSpec(3)}
        >>> _, tunable = init_lora(params, spec, jax.random.key(0))
        >>> pruner = adalora_pruner(1, total_steps=1)
        >>> grads = jax.tree.map(jnp.ones_like, tunable)
        >>> tunable, state = pruner.update(tunable, grads, pruner.init(tunable), 0)
        >>> _, state = pruner.update(tunable, grads, state, 1)
        >>> int(state.kept["w"].sum())
        1
    """
    end = total_steps - t_final
    if not (target_rank >= 1 and every >= 1 and 0 <= t_init < end <= total_steps):
        raise ArgumentError(
            f"adalora_pruner takes target_rank and every from 1, and 0 ≤ t_init < total_steps - "
            f"t_final, but got {target_rank=}, {every=}, {t_init=}, {total_steps=}, "
            f"{t_final=}."
        )

    def init(tunable: Any) -> AdaloraState:
        weights = dict(_weights(tunable))
        zeros = {path: jax.tree.map(jnp.zeros_like, w.factors()) for path, w in weights.items()}
        kept = {path: jnp.ones(w.e.shape, bool) for path, w in weights.items()}
        return AdaloraState(zeros, jax.tree.map(jnp.copy, zeros), kept)

    def update(
        tunable: Any, grads: Any, state: AdaloraState, step: Any
    ) -> tuple[Any, AdaloraState]:
        step = jnp.asarray(step, jnp.int32)
        factors = {path: weight.factors() for path, weight in _weights(tunable)}
        slopes = {path: weight.factors() for path, weight in _weights(grads)}
        state = remembered(factors, slopes, state, step < end)
        kept = state.kept
        if factors:
            kept = _most_important(dict(_weights(tunable)), state, budget(tunable, step))
        # The mask is renewed on a schedule, and stays as it is after the last renewal.
        renews = (step > t_init) & (step % every == 0) & (step < end) | (step == end)
        kept = {path: jnp.where(renews, kept[path], old) for path, old in state.kept.items()}

        def pruned(path: Any, leaf: Any) -> Any:
            if not _is_adalora(leaf):
                return leaf
            # Between renewals, pruned entries may grow again; after the end they stay zero.
            is_out = (renews | (step > end)) & ~kept[path_string(path)]
            return leaf.with_factors(leaf.factors() | {"e": jnp.where(is_out, 0, leaf.e)})

        tunable = jax.tree_util.tree_map_with_path(pruned, tunable, is_leaf=_is_adalora)
        return tunable, state._replace(kept=kept)

    def budget(tunable: Any, step: jax.Array) -> jax.Array:
        """Returns how many ranks are kept over all weights."""
        weights = [weight for _, weight in _weights(tunable)]
        ranks = sum(weight.e.size for weight in weights)
        target = target_rank * sum(weight.e.size // weight.rank for weight in weights)
        # A cubic schedule: 1 until t_init, 0 from `end` on.
        left = jnp.clip((end - step) / (end - t_init), 0, 1)
        return jnp.int32(jnp.floor((ranks - target) * left**3 + target))

    def remembered(factors: Any, slopes: Any, state: AdaloraState, is_open: Any) -> AdaloraState:
        """Returns the averages after one more step."""

        def averaged(beta: float, average: Any, new: Any) -> Any:
            mix = lambda old, new: jnp.where(is_open, beta * old + (1 - beta) * new, old)  # noqa: E731
            return jax.tree.map(mix, average, new)

        # |w · ∂L/∂w| of each entry: how much the loss would change without it, to first order
        now = jax.tree.map(lambda p, g: jnp.abs(p * g.astype(p.dtype)), factors, slopes)
        importance = averaged(beta1, state.importance, now)
        deviation = jax.tree.map(lambda x, mean: jnp.abs(x - mean), now, importance)
        return AdaloraState(importance, averaged(beta2, state.uncertainty, deviation), state.kept)

    return AdaloraPruner(init, update)


def _most_important(
    weights: dict[str, AdaloraWeight], state: AdaloraState, budget: jax.Array
) -> dict[str, jax.Array]:
    """Returns masks of the `budget` most important ranks of all weights."""
    scores: dict[str, jax.Array] = {}
    for path, weight in weights.items():
        parts = state.importance[path], state.uncertainty[path]
        # Importance times uncertainty, each smoothed over the steps.
        score = {name: parts[0][name] * parts[1][name] for name in parts[0]}
        a, b = _matrices(weight.with_factors(score))
        # A rank counts as its entry of e, and the means of its column of a and its row of b.
        means = a.mean(2) + b.mean(2)  # [entries, rank]
        scores[path] = score["e"].astype(means.dtype) + means.reshape(weight.e.shape)
    ordered = jnp.sort(jnp.concatenate([score.reshape(-1) for score in scores.values()]))
    # A threshold over all weights together: ranks move to the weights that need them.
    left_out = ordered.size - budget
    least = jnp.where(left_out > 0, ordered[jnp.maximum(left_out - 1, 0)], -jnp.inf)
    return {path: score > least for path, score in scores.items()}
