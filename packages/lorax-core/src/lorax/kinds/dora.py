"""DoRA: the adapted weight, normalized over its inputs, times a trained magnitude.

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
    """The trained magnitudes of one weight, around the adapter that is normalized.

        W'[in, out]  =  magnitude[out] · (W + Δ)[in, out] / ‖(W + Δ)[:, out]‖

    The norm runs over the inputs; it is computed from `‖W‖²`, which is frozen, and from products as
    small as the factors. Liu et al. 2024, arXiv:2402.09353.

    Attributes:
        delta: the adapter that is added to the base, such as plain LoRA.
        magnitude: `[*shared, *out]`.
        detached: whether the norm has no gradient, as in section 4.3 of the paper and in PEFT.

    Besides the base, the frozen tree holds `square`: `‖W‖²`, `[*shared, *out]`.
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
        """The rank of the wrapped adapter, if it has one."""
        return getattr(self.delta, "rank", None)

    def layout(self, shape: tuple[int, ...]) -> Layout:
        """Returns the labels of the factors for a weight of `shape`."""
        axes = Labeled.of(self.axes, shape)
        kept = (*axes.shared, *axes.outputs)
        # W' = magnitude [*out] ⊙ (W + Δ) / ‖W + Δ‖ [*out], the norm over the inputs
        inner = self.delta.layout(shape)
        if inner.gains:
            raise SpecError(
                f"DoRA needs an adapter that adds a delta, but a {self.delta.kind} adapter "
                "multiplies the weight."
            )
        factors = {**inner.factors, "magnitude": kept}
        gains = frozenset({"magnitude", "square"})
        return Layout(inner.out, factors, {**inner.frozen, "square": kept}, gains)

    def derived(self, base: Any) -> dict[str, Any]:
        """Returns the squared norms of the base."""
        return {
            **self.delta.derived(base),
            "square": norm_squared(jnp.asarray(base), _kept(self.axes)),
        }

    def neutral(self) -> dict[str, Neutral] | None:
        """Returns those of the wrapped adapter, and the norms of the base as magnitudes."""
        inner = self.delta.neutral()
        if inner is None:
            return None
        return {**inner, "magnitude": lambda frozen: jnp.sqrt(frozen["square"])}

    def applied(
        self, base: Any, frozen: Mapping[str, Any] | None = None, source: Hashable = None
    ) -> FactoredArray:
        """Returns the adapted base with a pending gain, whose norm is computed on use."""
        frozen = frozen or {}
        weight = self.delta.applied(base, frozen, source)
        axes = Labeled.of(self.axes, base.shape)
        kept = (*axes.shared, *axes.outputs)
        # `square` is ‖W‖², [*shared, *out]. It is computed once, so that a training step only
        # computes what Δ adds to it.
        factors = {"magnitude": self.magnitude, "square": frozen["square"]}
        term = make_term(factors, dict.fromkeys(factors, kept), axes.out, source)
        fan_in, _ = self.axes.sizes(base.shape)
        return dataclasses.replace(weight, norm=Norm(term, fan_in, self.detached))


@dataclasses.dataclass(frozen=True)
class DoraSpec(AdapterSpec):
    """The spec of DoRA around another spec, which has the axes and other settings.

    Args:
        spec: the spec of the adapter that is normalized, whose delta must be a product of narrow
            factors, such as a `LoraSpec`; an int is a rank of plain LoRA.
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
            raise SpecError(f"DoraSpec takes a spec or a rank, not {self.spec!r}.")

    @property
    def in_axes(self) -> Sequence[int] | None:
        """The axes of the wrapped spec."""
        return self.spec.in_axes

    @property
    def out_axes(self) -> Sequence[int] | None:
        """The axes of the wrapped spec."""
        return self.spec.out_axes

    @property
    def shared_axes(self) -> Sequence[int]:
        """The axes of the wrapped spec."""
        return self.spec.shared_axes

    def with_axes(self, axes: Axes) -> "DoraSpec":
        """Returns the same spec for a weight whose axes have these roles."""
        return dataclasses.replace(self, spec=self.spec.with_axes(axes))

    @property
    def collects(self) -> Any:
        """The start of the wrapped spec that needs collected statistics, or None."""
        return self.spec.collects

    @property
    def size(self) -> int | None:
        """The rank of the wrapped spec."""
        return self.spec.size

    def with_size(self, rank: int) -> "DoraSpec":
        """Returns the same spec with another rank."""
        return dataclasses.replace(self, spec=self.spec.with_size(rank))

    def check(self, path: str, shape: tuple[int, ...], axes: Axes) -> None:
        """Raises `SpecError` for an adapter whose norm would materialize the weight."""
        self.spec.check(path, shape, axes)
        if not self.spec.has_narrow_delta:
            raise SpecError(
                f"`{path}` has a DoraSpec of {a_kind(self.spec)}, whose norm would need an array "
                "as large as the weight. Use a LoraSpec inside, or the other spec without DoRA."
            )

    def blank(self, shape: tuple[int, ...], axes: Axes) -> DoraWeight:
        """Returns the adapter without arrays."""
        return DoraWeight(self.spec.blank(shape, axes), None, self.detached)

    @property
    def common_key(self) -> Hashable:
        """The key of the wrapped spec."""
        return self.spec.common_key

    def common(self, weights: Any, key: jax.Array) -> Any:
        """Returns the value that weights of the wrapped spec share."""
        return self.spec.common(weights, key)

    def start(self, start: Start) -> Started:
        """Returns the wrapped adapter's state, with the norms of the adapted base as magnitudes."""
        given = start.array(self, "the norms of the weight")
        # The wrapped adapter may change the base, as PiSSA does, so it starts first.
        inner = self.spec.start(start)
        base = given if inner.base is None else inner.base
        # Of the new base, if the start has changed it: PiSSA moves a part of it into the factors.
        square = norm_squared(base, _kept(start.axes))
        adapted = inner.adapter.applied(base, inner.frozen).array()
        magnitude = jnp.sqrt(norm_squared(adapted, _kept(start.axes)))
        # A norm is real, also of a complex weight.
        if not jnp.issubdtype(start.dtype, jnp.complexfloating):
            magnitude = magnitude.astype(start.dtype)
        weight = DoraWeight(inner.adapter, magnitude, self.detached)
        return Started(weight, {**inner.frozen, "square": square}, inner.base)


def _kept(axes: Axes) -> tuple[int, ...]:
    """Returns the axes of the norms: `[*shared, *out]`."""
    return (*axes.shared, *axes.outputs)
