"""AdaLoRA: a product of two factors with a weight for each rank, as singular values are.

delta[shared, in, out]  =  scale · Σ_r a[shared, in, r] · e[shared, r] · b[shared, r, out]
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from .._adapter import Adapter, AdapterSpec, Labeled, Layout, Start, Started, defkind, static
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
        shared_axes: the weight's axes with factors of their own for each entry.
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
        """Where the factors lie on a weight of `shape`."""
        axes = Labeled.of(self.axes, shape)
        a, b = two_factors(axes, self.rank)
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

    rank: int
    alpha: float | None = None
    in_axes: Sequence[int] | None = None
    out_axes: Sequence[int] | None = None
    shared_axes: Sequence[int] = ()

    @property
    def size(self) -> int:
        """The rank."""
        return self.rank

    def with_size(self, rank: int) -> "AdaloraSpec":
        """The same with another rank."""
        return dataclasses.replace(self, rank=rank)

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
            gram = jnp.einsum("nri,nsi->nrs", matrix, matrix.conj(), precision="highest")
            apart = gram - jnp.eye(weight.rank, dtype=gram.dtype)[None]
            square = jnp.sum(jnp.abs(apart) ** 2, (1, 2))
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
    return jnp.swapaxes(a, 1, 2), weight.b.astype(wide).reshape(entries, weight.rank, -1)
