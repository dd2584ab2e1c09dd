"""Initial factors of plain LoRA that are made from the inputs of a weight or from its gradient.

Each is a class of settings with two steps. `reduced` computes small arrays for one matrix `[in,
out]` from its collected statistics, and `factors` computes `a [in, r]` and `b [r, out]` from these.
"""

import dataclasses
import math
import numbers
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from .._errors import ArgumentError, SpecError
from .leading import leading_vectors

Factors = tuple[jax.Array, jax.Array | None]
Reduced = dict[str, jax.Array]


class CollectedStart:
    """A value of `LoraSpec.init` that computes initial factors from inputs or gradients."""

    # What is collected: "inputs", "scaled inputs" or "gradients".
    source: ClassVar[str]
    # Whether the product of the factors is subtracted from the base.
    moves: ClassVar[bool] = False

    def check(self, path: str, rank: int, scale: float, fan_in: int, fan_out: int) -> None:
        """Raises `SpecError` if a matrix cannot have such factors."""

    def reduced(self, matrix: jax.Array, collected: Any, rank: int) -> Reduced:
        """Returns the vectors to keep of the moments or the gradient of one matrix."""
        raise NotImplementedError

    def factors(self, kept: Reduced, rank: int, scale: float, key: jax.Array) -> Factors:
        """Returns the initial factors of one matrix, with None for a `b` of zeros."""
        raise NotImplementedError


def _check_rank(path: str, init: str, rank: int, most: int, source: str) -> None:
    if rank > most:
        raise SpecError(
            f"`{path}` has rank {rank} and init={init!r}, which takes its factors from {source} of "
            f"rank {most} at most. Lower the rank, or leave `init` out."
        )


def _check_choice(path: str, name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        known = ", ".join(map(repr, choices))
        raise SpecError(f"`{path}` has {name} {value!r}; it must be one of {known}.")


@dataclasses.dataclass(frozen=True)
class EvaStart(CollectedStart):
    """EVA: `a` holds the principal components of the inputs, and `b` is zero.

        Σ (x − x̄)(x − x̄)ᵀ  =  V diag(s²) Vᵀ,      a = V[:, :rank],  or V[:, :rank] / √s

    Paischer et al. 2024, arXiv:2410.07170. The base is unchanged.

    Args:
        whiten: whether each component is divided by the root of its singular value.
        rho: `eva_ranks` gives a weight up to `rho` times its rank; at least 1.

    Example:
        >>> from lorax import EvaStart, LoraSpec
        >>> spec = LoraSpec(rank=8, alpha=16, init=EvaStart(rho=2.0))
    """

    source = "inputs"

    whiten: bool = False
    rho: float = 1.0

    def check(self, path: str, rank: int, scale: float, fan_in: int, fan_out: int) -> None:
        """Raises `SpecError` for more components than inputs."""
        _check_rank(path, "eva", rank, fan_in, "inputs")
        if not _is_number(self.rho) or self.rho < 1:
            raise SpecError(
                f"`{path}` has an EvaStart with rho={self.rho!r}; it must be at least 1."
            )

    def reduced(self, matrix: jax.Array, collected: Any, rank: int) -> Reduced:
        """Returns the largest components, their singular values, and shares of the variance."""
        # Sums over all inputs x: second Σ x xᵀ [in, in], first Σ x [in], and how many there were.
        second, first, count = collected
        mean = first / jnp.maximum(count, 1)
        # This difference loses digits if the mean is large compared to the variance.
        variance = second - count * mean[:, None] * mean[None]
        kept = min(round(rank * self.rho), len(mean))
        vectors, squares, _ = leading_vectors(variance, kept)
        # A singular vector is determined up to its sign, so its largest entry is made positive.
        largest = jnp.argmax(jnp.abs(vectors), 0)
        signs = jnp.sign(vectors[largest, jnp.arange(kept)])
        # All variance, of which `ratios` are shares; never zero, to divide by.
        total = jnp.maximum(jnp.trace(variance), jnp.finfo(variance.dtype).tiny)
        return {
            "components": vectors * signs[None],
            "values": jnp.sqrt(squares),
            "ratios": squares / total,
        }

    def factors(self, kept: Reduced, rank: int, scale: float, key: jax.Array) -> Factors:
        """Returns the first components."""
        a = kept["components"][:, :rank]
        if self.whiten:
            a = a / jnp.sqrt(kept["values"][None, :rank])
        return a, None


@dataclasses.dataclass(frozen=True)
class CordaStart(CollectedStart):
    """CorDA: the singular vectors of the weight times its input covariance. The base changes.

        C = mean of x xᵀ over the batches,    Wᵀ C = U diag(s) Vᵀ,    scale · a b = C⁻¹ V diag(s) Uᵀ

    of which the factors hold `rank` vectors: the largest with "ipm", to adapt to the task of the
    batches, or the smallest with "kpm", to preserve the base's knowledge of them. As in PEFT, the
    inputs of a batch are divided by their largest entry, and a hundredth of C's mean diagonal is
    added to its diagonal, doubled until the inverse is accurate. Yang et al. 2024,
    arXiv:2406.05223.

    Args:
        method: "ipm" or "kpm".

    Example:
        >>> from lorax import CordaStart, LoraSpec
        >>> spec = LoraSpec(rank=8, alpha=16, init=CordaStart("kpm"))
    """

    source = "scaled inputs"
    moves = True

    method: Literal["ipm", "kpm"] = "ipm"

    def check(self, path: str, rank: int, scale: float, fan_in: int, fan_out: int) -> None:
        """Raises `SpecError` for more vectors than the weight has."""
        _check_choice(path, "a CordaStart of method", self.method, ("ipm", "kpm"))
        _check_rank(path, "corda", rank, min(fan_in, fan_out), "a matrix")
        _check_positive(path, "corda", scale)

    def reduced(self, matrix: jax.Array, collected: Any, rank: int) -> Reduced:
        """Returns `rank` singular vectors of both sides, and their values."""
        second, _, count = collected
        # [in, in]
        mean = second / jnp.maximum(count, 1)
        identity = jnp.eye(len(mean), dtype=mean.dtype)
        weight = jnp.mean(jnp.diag(mean))
        highest = jax.lax.Precision.HIGHEST

        def damped(damp: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
            # Too few inputs leave the covariance singular, so more is added to its diagonal until
            # the inverse is accurate.
            covariance = mean + weight * damp * identity
            inverse = jnp.linalg.inv(covariance)
            error = jnp.linalg.norm(jnp.matmul(covariance, inverse, precision=highest) - identity)
            return covariance, inverse, error

        damp = jax.lax.while_loop(
            # The bound ends the loop if nothing was collected, when no damping helps.
            lambda damp: ~(damped(damp)[2] < 0.05) & (damp < 1e6),
            lambda damp: 2 * damp,
            jnp.asarray(0.01, mean.dtype),
        )
        covariance, inverse, _ = damped(damp)
        seen = jnp.matmul(matrix.T, covariance, precision=highest)  # [out, in]
        if self.method == "ipm":
            left, values, right = leading_vectors(seen, rank)
        else:
            left, values, right = jnp.linalg.svd(seen, full_matrices=False)
            # The components with the smallest values.
            left, values, right = left[:, -rank:], values[-rank:], right[-rank:]
        # Vᵀ C⁻¹ undoes the covariance, so that the product approximates Wᵀ itself.
        back = jnp.matmul(right, inverse, precision=highest)  # [rank, in]
        return dict(zip(self._names, (back.T, values, left.T), strict=True))

    @property
    def _names(self) -> list[str]:
        # Named by the method, so that `factors` does not take what another start has collected.
        return [f"{self.method} {name}" for name in ("inputs", "values", "outputs")]

    def factors(self, kept: Reduced, rank: int, scale: float, key: jax.Array) -> Factors:
        """Returns factors that each take the root of the values."""
        # scale · a b  =  (V C⁻¹)ᵀ diag(values) Uᵀ, the part of W that the factors take over
        inputs, values, outputs = (kept[name] for name in self._names)
        root = jnp.sqrt(values / scale)
        return inputs * root[None], root[:, None] * outputs


Direction = Literal["ArBr", "A2rBr", "ArB2r", "random"]
Scale = Literal["stable", "weight_svd", "gd_scale", "unit"]


@dataclasses.dataclass(frozen=True)
class LoraGAStart(CollectedStart):
    """LoRA-GA: the singular vectors of the gradient of the loss. The base changes.

        G = mean of the gradients over the batches,      Gᵀ = U diag(s) Vᵀ

    `a` and `b` each take half of the first `2 · rank` singular vectors, which makes the first step
    of LoRA closest to that of full fine-tuning. Wang et al. 2024, arXiv:2407.05000.

    Args:
        direction: which half each takes. "ArB2r" gives the first half to `a` and the second to `b`,
            and "A2rBr" the reverse. "ArBr" alternates, beginning with `b`. "random" gives both the
            same vectors, drawn with the key of `init_lora`.
        scale: the scale of `b`. "stable" is `fan_out^¼ / √stable_gamma`; "weight_svd" makes its
            largest value that of the weight; "gd_scale" divides both factors by the scale of LoRA;
            "unit" leaves them unscaled.
        stable_gamma: the constant of the scale "stable".

    Example:
        >>> from lorax import LoraGAStart, LoraSpec
        >>> spec = LoraSpec(rank=8, alpha=16, init=LoraGAStart(scale="gd_scale"))
    """

    source = "gradients"
    moves = True

    direction: Direction = "ArB2r"
    scale: Scale = "stable"
    stable_gamma: float = 16

    def check(self, path: str, rank: int, scale: float, fan_in: int, fan_out: int) -> None:
        """Raises `SpecError` for more vectors than a gradient has."""
        directions = ("ArBr", "A2rBr", "ArB2r", "random")
        _check_choice(path, "a LoraGAStart of direction", self.direction, directions)
        scales = ("stable", "weight_svd", "gd_scale", "unit")
        _check_choice(path, "a LoraGAStart of scale", self.scale, scales)
        gamma: Any = self.stable_gamma
        if not _is_number(gamma) or gamma <= 0:
            raise SpecError(
                f"`{path}` has a LoraGAStart with stable_gamma={gamma!r}; it must be above 0."
            )
        if 2 * rank > (most := min(fan_in, fan_out)):
            raise SpecError(
                f"`{path}` has rank {rank} and init='lora_ga', which takes twice as many vectors "
                f"from a gradient of rank {most} at most. Lower the rank, or leave `init` out."
            )
        if self.scale == "gd_scale":
            _check_positive(path, "lora_ga", scale)

    def reduced(self, matrix: jax.Array, collected: Any, rank: int) -> Reduced:
        """Returns `2 · rank` singular vectors of both sides, and their values."""
        left, values, right = leading_vectors(collected, 2 * rank)
        kept = {"inputs": left, "values": values, "outputs": right}
        if self.scale == "weight_svd":
            kept["weight"] = leading_vectors(matrix, 1)[1][0]
        return kept

    def factors(self, kept: Reduced, rank: int, scale: float, key: jax.Array) -> Factors:
        """Returns factors that each take half of the vectors."""
        # Of the 2 · rank singular vectors, a takes `rank` of the input side, and b takes `rank` of
        # the output side.
        if len(kept["values"]) < 2 * rank:
            raise ArgumentError(f"{len(kept['values'])} vectors of a gradient, of {2 * rank}")
        every = jnp.arange(2 * rank)
        drawn = jax.random.permutation(key, every)[:rank]
        of_a, of_b = {
            "ArBr": (every[1::2], every[::2]),
            "A2rBr": (every[rank:], every[:rank]),
            "ArB2r": (every[:rank], every[rank:]),
            "random": (drawn, drawn),
        }[self.direction]
        a, values = kept["inputs"][:, of_a], kept["values"][of_b]
        # [rank] ⊙ [rank, out]
        b = values[:, None] * kept["outputs"][of_b]
        if self.scale == "stable":
            b = b * (b.shape[1] ** 0.25 / math.sqrt(self.stable_gamma))
        elif self.scale == "weight_svd":
            b = b * jnp.where(
                values[0] > 0, kept["weight"] / jnp.where(values[0] > 0, values[0], 1), 1
            )
        elif self.scale == "gd_scale":
            a, b = a / scale, b / scale
        return a, b


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and math.isfinite(value)


def _check_positive(path: str, init: str, scale: float) -> None:
    if scale <= 0:
        raise SpecError(f"`{path}` has scale {scale} and init={init!r}: alpha must be positive.")


COLLECTED: dict[str, CollectedStart] = {
    "eva": EvaStart(),
    "corda": CordaStart(),
    "lora_ga": LoraGAStart(),
}
