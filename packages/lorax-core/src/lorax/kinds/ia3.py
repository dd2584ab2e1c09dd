"""IA³: a trained gain over the outputs or the inputs of a weight, without a delta.

W'[shared, in, out]  =  W[shared, in, out] · gain[shared, out]
"""

import dataclasses
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Literal

import jax.numpy as jnp

from .._adapter import Adapter, Labeled, Layout, Neutral, defkind, make_term, static
from .._adapter_spec import AdapterSpec, Start, Started
from .._axes import Axes, normalize
from .._errors import SpecError
from .._factored import FactoredArray

Side = Literal["out", "in"]


@defkind
class IA3Weight(Adapter):
    """The trained gain of one weight.

    `W[in, out] · gain[out]`, or `W[in, out] · gain[in]` if `side` is "in". Each entry of the shared
    axes has a gain of its own. Liu et al. 2022, arXiv:2205.05638.

    Attributes:
        gain: `[*shared, *out]`, or `[*shared, *in]`.
        side: "out" or "in".
        gain_axes: the axes of that side that the gain varies along; None means all of them.
        in_axes: the weight's axes that meet the input.
        out_axes: the weight's axes that produce the output.
        shared_axes: the weight's axes with their own gain for each entry.
    """

    kind = "ia3"

    gain: Any
    side: Side = static("out")
    gain_axes: tuple[int, ...] | None = static(None)
    in_axes: tuple[int, ...] = static((0,))
    out_axes: tuple[int, ...] = static((1,))
    shared_axes: tuple[int, ...] = static(())

    def layout(self, shape: tuple[int, ...]) -> Layout:
        """Returns the labels of the gain for a weight of `shape`."""
        axes = Labeled.of(self.axes, shape)
        over = axes.inputs if self.side == "in" else axes.outputs
        if self.gain_axes is not None:
            # Along the other axes of the side, the gain is constant.
            over = tuple(label for label in over if label.id in self.gain_axes)
        return Layout(axes.out, {"gain": (*axes.shared, *over)}, gains=frozenset({"gain"}))

    def neutral(self) -> dict[str, Neutral]:
        """Returns a gain of one."""
        return {"gain": 1.0}

    def applied(
        self, base: Any, frozen: Mapping[str, Any] | None = None, source: Hashable = None
    ) -> FactoredArray:
        """Returns the base with one gain; arguments as in `Adapter.applied`."""
        layout = self.layout(base.shape)
        # W' = W ⊙ gain, [*out] or [*in] broadcast over the rest
        gain = make_term(self.factors(), layout.factors, layout.out, source)
        return FactoredArray(base, (), (gain,))


@dataclasses.dataclass(frozen=True)
class IA3Spec(AdapterSpec):
    """The spec of IA³ for one weight.

    Args:
        side: "out", as used for keys and values, or "in", as used for the last product of an MLP.
        gain_axes: the axes of that side that the gain varies along; None means all of them. On the
            input side of a convolution, give the channel axis: a gain that varies along the window
            as well materializes the kernel.
        in_axes: as in `LoraSpec`.
        out_axes: as in `LoraSpec`.
        shared_axes: as in `LoraSpec`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from lorax import IA3Spec, init_lora
        >>> spec = {"key": IA3Spec(), "down": IA3Spec("in")}
        >>> params = {"key": jnp.ones((5, 3)), "down": jnp.ones((7, 5))}
        >>> frozen, tunable = init_lora(params, spec, jax.random.key(0))
        >>> tunable["key"].gain.shape, tunable["down"].gain.shape
        ((3,), (7,))
    """

    side: Side = "out"
    gain_axes: Sequence[int] | None = None
    in_axes: Sequence[int] | None = None
    out_axes: Sequence[int] | None = None
    shared_axes: Sequence[int] = ()

    def check(self, path: str, shape: tuple[int, ...], axes: Axes) -> None:
        """Raises `SpecError` for an invalid side, and for axes that are not of that side."""
        if self.side not in ("out", "in"):
            raise SpecError(
                f"`{path}` has an IA3Spec of side {self.side!r}; it must be 'out' or 'in'."
            )
        over = axes.inputs if self.side == "in" else axes.outputs
        if not set(self._gain_axes(path, len(shape)) or over) <= set(over):
            raise SpecError(
                f"`{path}` has an IA3Spec with gain_axes={self.gain_axes}, but the axes of side "
                f"{self.side!r} are {over}."
            )

    def _gain_axes(self, path: str, ndim: int) -> tuple[int, ...] | None:
        if self.gain_axes is None:
            return None
        return normalize(path, ndim, "gain_axes", self.gain_axes)

    def blank(self, shape: tuple[int, ...], axes: Axes) -> IA3Weight:
        """Returns the adapter without arrays."""
        over = self._gain_axes("", len(shape))
        return IA3Weight(None, self.side, over, axes.inputs, axes.outputs, axes.shared)

    def start(self, start: Start) -> Started:
        """Returns a gain of one."""
        shape = start.base.shape
        weight = self.blank(shape, start.axes)
        ones = jnp.ones(weight.layout(shape).shapes()["gain"], start.dtype)
        return Started(weight.with_factors({"gain": ones}))
