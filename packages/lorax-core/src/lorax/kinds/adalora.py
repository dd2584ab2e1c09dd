"""AdaLoRA: a product of two factors with a weight for each rank, as singular values are.

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
    """The three factors of one weight.

        delta = scale · a @ diag(e) @ b      for a kernel [in, out]

    `scale` is `alpha / rank`, and 1 where `alpha` is None. A rank whose entry of `e` is zero takes
    no part. Zhang et al. 2023, arXiv:2303.10512.

    Attributes:
        a: `[*shared, *in, rank]`, the fan-in factor.
        e: `[*shared, rank]`, the weights of the ranks.
        b: `[*shared, rank, *out]`, the fan-out factor.
        rank: the inner size.
        alpha: the numerator of the scale, or None for a scale of 1.
        in_axes: the weight's axes that meet the input.
        out_axes: the weight's axes that make the output.
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
        """The number that multiplies the product."""
        return lora_scale(self.rank, self.alpha, "standard")

    def layout(self, shape: tuple[int, ...]) -> Layout:
        """How the factors run along a weight of `shape`."""
        axes = Labeled.of(self.axes, shape)
        a, b = two_factors(axes, self.rank)
        # Δ = scale · a [in, rank] · diag(e [rank]) · b [rank, out], as U · diag(σ) · Vᵀ
        return Layout(axes.out, {"a": a, "e": (*axes.shared, axes.inner(0, self.rank)), "b": b})


@dataclasses.dataclass(frozen=True)
class AdaloraSpec(AdapterSpec):
    """AdaLoRA of one weight.

        delta = scale · a @ diag(e) @ b

    At first `e` is zero, and the entries of `a` and `b` are normal with a standard deviation of
    0.02, whatever `init_lora` has for initializers: a zero `b` would leave all gradients zero.

    Args:
        rank: the inner size at first.
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
        """Refuses what `LoraSpec` refuses."""
        check_rank(path, self, self.rank)
        check_scale(path, self.alpha)
        warn_of_high_rank(path, self.rank, shape, axes)

    def blank(self, shape: tuple[int, ...], axes: Axes) -> AdaloraWeight:
        """The adapter without arrays."""
        return AdaloraWeight(
            None, None, None, self.rank, self.alpha, axes.inputs, axes.outputs, axes.shared
        )

    def start(self, start: Start) -> Started:
        """Small factors, and a delta of zero."""
        a, b = draw_two(start, self.rank, _normal, _normal)
        weight = self.blank(start.base.shape, start.axes)
        shape = weight.layout(start.base.shape).shapes()["e"]
        # e is zero, so Δ is; a and b are not, so e has a gradient.
        return Started(weight.with_factors({"a": a, "e": jnp.zeros(shape, start.dtype), "b": b}))


def _normal(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return jax.random.normal(key, shape, dtype) * 0.02


def adalora_orthogonality(tunable: Any) -> jax.Array:
    """How far the factors of all AdaLoRA weights are from orthonormal: a penalty for the loss.

        mean of ‖aᵀ a − I‖ and ‖b bᵀ − I‖, in the Frobenius norm

    over both factors of each weight, and of each entry of its shared axes. PEFT adds half of it.

    Args:
        tunable: the tunable tree; its other leaves do not count.

    Returns:
        A number in float32 or wider; zero where there is no AdaLoRA weight.

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
            # A root has no gradient at zero.
            is_zero = square == 0
            root = jnp.sqrt(jnp.where(is_zero, 1.0, square))
            distances.append(jnp.where(is_zero, 0.0, root))
    return jnp.concatenate(distances).sum() / max(1, sum(x.size for x in distances))


def _weights(tunable: Any) -> list[tuple[str, AdaloraWeight]]:
    """The AdaLoRA weights of a tree, in order, with their paths."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tunable, is_leaf=_is_adalora)
    return [(path_string(path), leaf) for path, leaf in leaves if _is_adalora(leaf)]


def _is_adalora(node: Any) -> bool:
    return isinstance(node, AdaloraWeight)


def _matrices(weight: AdaloraWeight) -> tuple[jax.Array, jax.Array]:
    """Both factors as `[entries, rank, rest]`, an entry for each of the shared axes."""
    shared = len(weight.shared_axes)
    wide = wide_dtype(weight.a.dtype)
    entries = math.prod(weight.a.shape[:shared])
    a = weight.a.astype(wide).reshape(entries, -1, weight.rank)
    # [*shared, *in, rank] -> [entries, rank, in], and [*shared, rank, *out] -> [entries, rank, out]
    return jnp.swapaxes(a, 1, 2), weight.b.astype(wide).reshape(entries, weight.rank, -1)


class AdaloraState(NamedTuple):
    """A pruner's averages for each AdaLoRA weight, by its path.

    Attributes:
        importance: the moving average of |factor · gradient|, for each entry of the factors.
        uncertainty: that of how far it is from this average.
        kept: which ranks take part.
    """

    importance: dict[str, dict[str, jax.Array]]
    uncertainty: dict[str, dict[str, jax.Array]]
    kept: dict[str, jax.Array]


class AdaloraPruner(NamedTuple):
    """Two functions, as an optimizer of optax: `init(tunable)`, and `update` after each step."""

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
    """AdaLoRA's schedule of ranks: the least important of all weights' ranks are set to zero.

    The budget, how many ranks are kept in all, falls with the third power of the steps that are
    left, from all ranks to `target_rank` for each weight. A rank is as important as its entry of
    `e`, and the mean entry of `a` and of `b` that go with it; an entry's importance is the moving
    average of |factor · gradient| times that of its deviation. Until the last mask a rank may come
    back.

    Args:
        target_rank: how many ranks are kept at the end, on average, of each weight and of each
            entry of its shared axes.
        total_steps: of the training.
        t_init: for so many steps at first all ranks are kept.
        t_final: for so many steps at last the mask stays as it is.
        every: between, ranks are set to zero in each step that is a multiple of this.
        beta1: of the average of the importance.
        beta2: of the average of its deviation.

    Returns:
        The `AdaloraPruner`: `state = init(tunable)`, and after each step of the optimizer
        `tunable, state = update(tunable, grads, state, step)`. Both run under `jax.jit`, where
        `step` may be traced. Other leaves of `tunable` stay as they are.

    Raises:
        ValueError: where the numbers do not fit each other.

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
        raise ValueError(
            f"adalora_pruner takes target_rank and every from 1, and 0 ≤ t_init < total_steps - "
            f"t_final, and was given {target_rank=}, {every=}, {t_init=}, {total_steps=}, "
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
            is_out = (renews | (step > end)) & ~kept[path_string(path)]
            return leaf.with_factors(leaf.factors() | {"e": jnp.where(is_out, 0, leaf.e)})

        tunable = jax.tree_util.tree_map_with_path(pruned, tunable, is_leaf=_is_adalora)
        return tunable, state._replace(kept=kept)

    def budget(tunable: Any, step: jax.Array) -> jax.Array:
        """How many ranks are kept."""
        weights = [weight for _, weight in _weights(tunable)]
        ranks = sum(weight.e.size for weight in weights)
        target = target_rank * sum(weight.e.size // weight.rank for weight in weights)
        # A cubic schedule: 1 until t_init, 0 from `end` on.
        left = jnp.clip((end - step) / (end - t_init), 0, 1)
        return jnp.int32(jnp.floor((ranks - target) * left**3 + target))

    def remembered(factors: Any, slopes: Any, state: AdaloraState, is_open: Any) -> AdaloraState:
        """The averages after one more step."""

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
    """Which ranks are among the `budget` most important ones of all weights."""
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
