"""DoRA: the adapted weight, normalized over its inputs, times a learned magnitude.

W'  =  magnitude ⊙ (W + Δ) / ‖W + Δ‖
"""

import dataclasses
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from .._adapter import Adapter, Labeled, Layout, Neutral, defkind, make_term, static
from .._adapter_spec import AdapterSpec, Start, Started
from .._axes import Axes
from .._errors import SpecError, a_kind
from .._factored import FactoredArray
from .._norm import Norm, norm_squared


@defkind
class DoraWeight(Adapter):
    """The magnitudes of one weight, and the adapter whose sum they normalize.

        W'[in, out]  =  magnitude[out] · (W + Δ)[in, out] / ‖(W + Δ)[:, out]‖

    The norm runs over the inputs; it is computed from `‖W‖²`, which is frozen, and from products as
    small as the factors. Liu et al. 2024, arXiv:2402.09353.

    Attributes:
        delta: the adapter of the sum, such as plain LoRA.
        magnitude: `[*shared, *out]`.
        detached: whether the norm is a constant to the gradient, as in the paper's section 4.3 and
            in PEFT.

    The frozen tree holds `square`, `‖W‖²` of `[*shared, *out]`, beside the base.
    """

    kind = "dora"

    delta: Adapter
    magnitude: Any
    detached: bool = static(True)

    @property
    def axes(self) -> Axes:
        """The roles of the weight's axes."""
        return self.delta.axes

    @property
    def rank(self) -> int | None:
        """That of the adapter within."""
        return getattr(self.delta, "rank", None)

    def layout(self, shape: tuple[int, ...]) -> Layout:
        """How the factors run along a weight of `shape`."""
        axes = Labeled.of(self.axes, shape)
        kept = (*axes.shared, *axes.outputs)
        # W' = magnitude [*out] ⊙ (W + Δ) / ‖W + Δ‖ [*out], the norm over the inputs
        inner = self.delta.layout(shape)
        if inner.gains:
            raise SpecError(f"DoRA normalizes a sum, and a {self.delta.kind} adapter is a gain.")
        factors = {**inner.factors, "magnitude": kept}
        gains = frozenset({"magnitude", "square"})
        return Layout(inner.out, factors, {**inner.held, "square": kept}, gains)

    def derived(self, base: Any) -> dict[str, Any]:
        """The squares of the norms."""
        return {
            **self.delta.derived(base),
            "square": norm_squared(jnp.asarray(base), _kept(self.axes)),
        }

    def neutral(self) -> dict[str, Neutral] | None:
        """Those of the adapter within, and the norms of the base as magnitudes."""
        inner = self.delta.neutral()
        if inner is None:
            return None
        return {**inner, "magnitude": lambda held: jnp.sqrt(held["square"])}

    def applied(
        self, base: Any, held: Mapping[str, Any] | None = None, source: Hashable = None
    ) -> FactoredArray:
        """The adapted base under a gain whose norm is still to be computed."""
        held = held or {}
        weight = self.delta.applied(base, held, source)
        axes = Labeled.of(self.axes, base.shape)
        kept = (*axes.shared, *axes.outputs)
        # `square` is ‖W‖², [*shared, *out]: computed once, so that a step computes only what Δ
        # adds.
        factors = {"magnitude": self.magnitude, "square": jax.lax.stop_gradient(held["square"])}
        term = make_term(factors, dict.fromkeys(factors, kept), axes.out, source)
        fan_in, _ = self.axes.sizes(base.shape)
        return dataclasses.replace(weight, norm=Norm(term, fan_in, self.detached))


@dataclasses.dataclass(frozen=True)
class DoraSpec(AdapterSpec):
    """DoRA of another kind of adapter, whose axes and settings are those of its spec.

    Args:
        spec: of the adapter that is normalized: any whose delta is a product of two narrow factors,
            such as `LoraSpec`; an int is a rank of plain LoRA.
        detached: whether the norm has no gradient, as in PEFT; this saves memory.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from lorax import DoraSpec, LoraSpec, init_lora
        >>> spec = {"w": DoraSpec(LoraSpec(rank=2, alpha=4))}
        >>> frozen, tunable = init_lora({"w": jnp.ones((5, 3))}, spec, jax.random.key(0))
        >>> tunable["w"].magnitude.shape, frozen["w"].factors["square"].tolist()
        ((3,), [5.0, 5.0, 5.0])
    """

    spec: Any
    detached: bool = True

    def __post_init__(self) -> None:
        from .lora import LoraSpec

        if type(self.spec) is int:
            object.__setattr__(self, "spec", LoraSpec(self.spec))
        if not isinstance(self.spec, AdapterSpec):
            raise SpecError(f"A DoraSpec is made of a spec or of a rank, not of {self.spec!r}.")

    @property
    def in_axes(self) -> Sequence[int] | None:
        """Those of the spec within."""
        return self.spec.in_axes

    @property
    def out_axes(self) -> Sequence[int] | None:
        """Those of the spec within."""
        return self.spec.out_axes

    @property
    def shared_axes(self) -> Sequence[int]:
        """Those of the spec within."""
        return self.spec.shared_axes

    def with_axes(self, axes: Axes) -> "DoraSpec":
        """The same for a weight whose axes have these roles."""
        return dataclasses.replace(self, spec=self.spec.with_axes(axes))

    @property
    def collects(self) -> Any:
        """The start whose statistics the inner spec collects."""
        return self.spec.collects

    @property
    def size(self) -> int | None:
        """The rank of the spec within."""
        return self.spec.size

    def with_size(self, rank: int) -> "DoraSpec":
        """The same with another rank."""
        return dataclasses.replace(self, spec=self.spec.with_size(rank))

    def check(self, path: str, shape: tuple[int, ...], axes: Axes) -> None:
        """Refuses an adapter whose norm would materialize the weight."""
        self.spec.check(path, shape, axes)
        if not self.spec.has_narrow_delta:
            raise SpecError(
                f"`{path}` has a DoraSpec of {a_kind(self.spec)}, the norm of which takes "
                "an array as large as the weight. Use a LoraSpec within, or the other spec alone."
            )

    def blank(self, shape: tuple[int, ...], axes: Axes) -> DoraWeight:
        """The adapter without arrays."""
        return DoraWeight(self.spec.blank(shape, axes), None, self.detached)

    @property
    def common_key(self) -> Hashable:
        """That of the spec within."""
        return self.spec.common_key

    def common(self, weights: Any, key: jax.Array) -> Any:
        """The value that weights of the inner spec share."""
        return self.spec.common(weights, key)

    def start(self, start: Start) -> Started:
        """The magnitude is the norm of the base with the first factors."""
        given = start.array(self, "the norms of the weight")
        inner = self.spec.start(start)
        base = given if inner.base is None else inner.base
        # Of the base as it is from now on: a start such as PiSSA moves a part of it into the
        # factors.
        square = norm_squared(base, _kept(start.axes))
        adapted = inner.adapter.applied(base, inner.held).array()
        magnitude = jnp.sqrt(norm_squared(adapted, _kept(start.axes)))
        # A norm is real, also of a complex weight.
        if not jnp.issubdtype(start.dtype, jnp.complexfloating):
            magnitude = magnitude.astype(start.dtype)
        weight = DoraWeight(inner.adapter, magnitude, self.detached)
        return Started(weight, {**inner.held, "square": square}, inner.base)


def _kept(axes: Axes) -> tuple[int, ...]:
    """The axes of the norms: `[*shared, *out]`."""
    return (*axes.shared, *axes.outputs)
