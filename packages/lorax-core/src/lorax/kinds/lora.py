"""LoRA and rsLoRA: the delta is a product of two factors.

delta[shared, in, out]  =  scale · Σ_r a[shared, in, r] · b[shared, r, out]
"""

import dataclasses
import math
import numbers
import warnings
from collections.abc import Sequence
from typing import Any, Literal

import jax

from .._adapter import Adapter, Labeled, Layout, defkind, sizes, static
from .._adapter_spec import AdapterSpec, Initializer, Start, Started
from .._axes import Axes
from .._base_format import format_of
from .._errors import RankWarning, SpecError, a_kind
from .._terms import Labels
from .collected import COLLECTED, CollectedStart
from .starts import (
    LOFTQ,
    MOVING,
    STARTS,
    loftq_format,
    start_from_collected,
    start_from_matrix,
)

Scaling = Literal["standard", "rslora"]


def lora_scale(rank: int, alpha: float | None, scaling: Scaling) -> float:
    """Returns `alpha / rank`, or `alpha / √rank` for rsLoRA; 1 if alpha is None."""
    if alpha is None:
        return 1.0
    return alpha / (math.sqrt(rank) if scaling == "rslora" else rank)


@defkind
class LoraWeight(Adapter):
    """The trainable factors of one weight.

    For a kernel `[in, out]` the delta is `scale · a @ b`; in general, with the axes of each group
    in the weight's order,

        delta[shared, in, out] = scale · Σ_r a[shared, in, r] · b[shared, r, out]

    `scale` is `alpha / rank`, or `alpha / √rank` where `scaling` is "rslora" (Kalajdzievski 2023,
    arXiv:2312.03732), and 1 where `alpha` is None. LoRA is Hu et al. 2021, arXiv:2106.09685.

    `a` and `b` are the only leaves of the pytree, and everything else is static, so optimizers,
    `jax.vmap` and checkpoints see two arrays.

    Attributes:
        a: `[*shared, *in, rank]`, the fan-in factor: it meets the input first.
        b: `[*shared, rank, *out]`, the fan-out factor.
        rank: the inner size.
        alpha: the numerator of the scale, or None for a scale of 1.
        scaling: "standard" or "rslora".
        in_axes: the weight's axes that meet the input.
        out_axes: the weight's axes that produce the output.
        shared_axes: the weight's axes with their own factors for each entry: stacked layers,
            experts.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from lorax import LoraWeight, materialize
        >>> weight = LoraWeight(jnp.ones((3, 1)), jnp.ones((1, 2)), rank=1, alpha=2.0)
        >>> materialize(jnp.zeros((3, 2)), weight).tolist()
        [[2.0, 2.0], [2.0, 2.0], [2.0, 2.0]]
    """

    kind = "lora"

    # [*shared, *in, rank]: multiplies the input, initially random.
    a: Any
    # [*shared, rank, *out]: produces the output, initially zero.
    b: Any
    rank: int = static()
    alpha: float | None = static(None)
    scaling: Scaling = static("standard")
    in_axes: tuple[int, ...] = static((0,))
    out_axes: tuple[int, ...] = static((1,))
    shared_axes: tuple[int, ...] = static(())

    @property
    def scale(self) -> float:
        """The scalar that multiplies `a @ b`."""
        return lora_scale(self.rank, self.alpha, self.scaling)

    def check_settings(self, path: str) -> None:
        """Raises `SpecError` for an invalid rank, alpha or scaling."""
        check_rank(path, self, self.rank)
        check_scale(path, self.alpha, self.scaling)

    def summary(self) -> str:
        """Returns the rank; tables show the kind of other adapters only."""
        return str(self.rank)

    def layout(self, shape: tuple[int, ...]) -> Layout:
        """Returns the labels of the factors for a weight of `shape`."""
        axes = Labeled.of(self.axes, shape)
        a, b = two_factors(axes, self.rank)
        return Layout(axes.out, {"a": a, "b": b})


@dataclasses.dataclass(frozen=True)
class LoraSpec(AdapterSpec):
    """The spec of plain LoRA for one weight.

    Args:
        rank: the inner size of the factors.
        alpha: the delta is `alpha / rank · a @ b`; None means `alpha = rank`, a scale of 1.
        scaling: "standard", or "rslora" for `alpha / √rank` (arXiv:2312.03732).
        in_axes: the axes that meet the input; None means every axis but the outputs.
        out_axes: the axes that produce the output; None means the rest, or the last axis if
            `in_axes` is None as well.
        shared_axes: axes with their own factors for each entry, such as the layers of a
            `scan` or the experts of a mixture.
        init: how the initial factors are made, if not by the initializers of `init_lora`. "pissa"
            and "olora" take them from the weight and subtract them from its base in the frozen
            tree.
            "loftq" quantizes the weight as NF4 (or as another format, as in "loftq:int8") and takes
            them from the quantization error. "orthogonal" makes random factors whose product is
            zero. "eva", "corda" and "lora_ga", or an `EvaStart`, `CordaStart` or `LoraGAStart`, use
            the result of `collect_starts`.

    Example:
        >>> from lorax import LoraSpec
        >>> LoraSpec(rank=8, alpha=16)                     # a kernel (in, out)
        LoraSpec(rank=8, alpha=16, scaling='standard', in_axes=None, out_axes=None, shared_axes=())
        >>> attention_query = LoraSpec(rank=8, in_axes=[0])   # (D, H, K) with input D
        >>> scanned_layers = LoraSpec(rank=8, shared_axes=[0])   # (layer, in, out)
    """

    has_narrow_delta = True
    has_matrix_rank = True

    rank: int
    alpha: float | None = None
    scaling: Scaling = "standard"
    in_axes: Sequence[int] | None = None
    out_axes: Sequence[int] | None = None
    shared_axes: Sequence[int] = ()
    init: str | CollectedStart | None = dataclasses.field(default=None, repr=False)

    def check(self, path: str, shape: tuple[int, ...], axes: Axes) -> None:
        """Raises `SpecError` for invalid settings, and warns of a rank that is too high."""
        check_rank(path, self, self.rank)
        check_scale(path, self.alpha, self.scaling)
        if self.collects is not None:
            scale = lora_scale(self.rank, self.alpha, self.scaling)
            self.collects.check(path, self.rank, scale, *axes.sizes(shape))
        elif self.init is not None:
            self._check_init(path, min(axes.sizes(shape)))
        warn_of_high_rank(path, self.rank, shape, axes)

    @property
    def collects(self) -> CollectedStart | None:
        """The start that computes the initial factors from inputs or gradients, or None."""
        if isinstance(self.init, str):
            return COLLECTED.get(self.init)
        return self.init if isinstance(self.init, CollectedStart) else None

    def _check_init(self, path: str, most: int) -> None:
        format = loftq_format(self.init) if isinstance(self.init, str) else None
        if format is not None:
            format_of(format)
        elif self.init not in STARTS:
            known = ", ".join(map(repr, (*STARTS, LOFTQ, *COLLECTED)))
            raise SpecError(f"`{path}` has init={self.init!r}; it must be one of {known}, or None.")
        if (self.init in MOVING or format) and self.rank > most:
            raise SpecError(
                f"`{path}` has rank {self.rank} and init={self.init!r}, which takes its factors "
                f"from a matrix of rank {most} at most. Lower the rank, or leave `init` out."
            )
        if self.init == "orthogonal" and self.rank % 2:
            raise SpecError(
                f"`{path}` has rank {self.rank} and init='orthogonal', which takes an even rank."
            )
        of_values = self.init == "pissa" or format is not None
        if of_values and lora_scale(self.rank, self.alpha, self.scaling) <= 0:
            raise SpecError(
                f"`{path}` has alpha {self.alpha} and init={self.init!r}: alpha must be positive."
            )

    def blank(self, shape: tuple[int, ...], axes: Axes) -> LoraWeight:
        """Returns the adapter without arrays."""
        return LoraWeight(
            None, None, self.rank, self.alpha, self.scaling, axes.inputs, axes.outputs, axes.shared
        )

    def start(self, start: Start) -> Started:
        """Returns `a` and `b` from the initializers, or as `init` says."""
        weight = self.blank(start.base.shape, start.axes)
        if self.collects is not None:
            return start_from_collected(self.collects, start, weight)
        if self.init is not None:
            return start_from_matrix(str(self.init), start, weight)
        a, b = draw_two(start, self.rank, *start.initializers)
        return Started(weight.with_factors({"a": a, "b": b}))


def at_same_scale(weight: LoraWeight, a: Any, b: Any) -> LoraWeight:
    """Returns the weight with factors of another rank, and the alpha that keeps its scale."""
    rank = a.shape[-1]
    # The scale is alpha / rank, or alpha / √rank, so alpha grows like the rank or like its root.
    growth = rank / weight.rank
    if weight.scaling == "rslora":
        growth = math.sqrt(growth)
    alpha = None if weight.alpha is None else weight.alpha * growth
    return dataclasses.replace(weight, a=a, b=b, rank=rank, alpha=alpha)


def two_factors(axes: Labeled, rank: int) -> tuple[Labels, Labels]:
    """Returns the labels of `a` and `b`, which share inner label 0, the rank."""
    # a [*shared, *in, rank] · b [*shared, rank, *out] -> [*shared, *in, *out]
    inner = axes.inner(0, rank)
    return (*axes.shared, *axes.inputs, inner), (*axes.shared, inner, *axes.outputs)


def draw_two(
    start: Start, rank: int, a_init: Initializer, b_init: Initializer
) -> tuple[jax.Array, jax.Array]:
    """Draws `a` and `b` of a rank from two initializers."""
    shape, axes = start.base.shape, start.axes
    a, b = map(sizes, two_factors(Labeled.of(axes, shape), rank))
    fan_in, fan_out = axes.sizes(shape)
    keys = jax.random.split(start.key)
    # Drawn as matrices and then reshaped, so that initializers see the fan-in and the fan-out.
    return (
        start.draw(keys[0], a_init, (fan_in, rank), a),
        start.draw(keys[1], b_init, (rank, fan_out), b),
    )


def warn_of_high_rank(path: str, rank: int, shape: tuple[int, ...], axes: Axes) -> None:
    """Warns of a rank that exceeds that of any matrix of this shape."""
    fan_in, fan_out = axes.sizes(shape)
    if rank > min(fan_in, fan_out):
        warnings.warn(
            f"`{path}` has shape {tuple(shape)}: a matrix of {fan_in} inputs × {fan_out} "
            f"outputs, whose rank is at most {min(fan_in, fan_out)}. An adapter of rank "
            f"{rank} has more parameters and no more capacity. Lower the rank, or give "
            "it LORA_FULL.",
            RankWarning,
            stacklevel=5,
        )


def check_rank(path: str, spec: Any, rank: Any, name: str = "rank") -> None:
    """Raises `SpecError` for an invalid rank."""
    if type(rank) is not int:
        raise SpecError(f"`{path}` has {name} {rank!r}; a {name} is a positive int.")
    if rank < 1:
        raise SpecError(
            f"`{path}` has {a_kind(spec)} of {name} {rank}; {name}s begin at 1. To freeze it "
            "give it LORA_FREEZE, to train it in full LORA_FULL."
        )


def check_scale(path: str, alpha: Any, scaling: Any = "standard") -> None:
    """Raises `SpecError` for an invalid alpha or scaling."""
    if scaling not in ("standard", "rslora"):
        raise SpecError(f"`{path}` has scaling {scaling!r}; it must be 'standard' or 'rslora'.")
    if alpha is not None and not (isinstance(alpha, numbers.Real) and math.isfinite(alpha)):
        raise SpecError(f"`{path}` has alpha {alpha!r}; it must be a finite number or None.")
