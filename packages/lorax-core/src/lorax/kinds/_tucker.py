"""The Tucker form of a convolution kernel: a core over the window between two channel factors.

delta[*window, in, out]  =  Σ_rq a[in, r] · core[*window, r, q] · b[q, out]
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from .._adapter_spec import Initializer, Start
from .._axes import Axes, normalize
from .._errors import SpecError, a_kind


def channel_axis_of(path: str, spec: Any, ndim: int, axes: Axes) -> int:
    """Returns the input axis of the channels; by default the last input axis.

    Raises:
        SpecError: if `spec.channel_axis` is not an input.
    """
    if spec.channel_axis is None:
        return axes.inputs[-1]
    (channels,) = normalize(path, ndim, "channel_axis", (spec.channel_axis,))
    if channels not in axes.inputs:
        raise SpecError(
            f"`{path}` has {a_kind(spec)} with channel_axis={spec.channel_axis}; it must be "
            f"one of the input axes {axes.inputs}."
        )
    return channels


def channels_of_core(spec: Any, shape: tuple[int, ...], axes: Axes, path: str = "") -> int | None:
    """Returns the channel axis if the adapter has cores, or None if it does not.

    Cores need `spec.tucker` and a window with more than one entry; PEFT makes the same exception.
    """
    if not spec.tucker:
        return None
    channels = channel_axis_of(path, spec, len(shape), axes)
    return channels if has_window(shape, axes, channels) else None


def has_window(shape: tuple[int, ...], axes: Axes, channels: int) -> bool:
    """Whether the input axes other than the channels have more than one entry."""
    return any(shape[d] != 1 for d in axes.inputs if d != channels)


def check_tucker(path: str, spec: Any, shape: tuple[int, ...], axes: Axes) -> None:
    """Raises `SpecError` for core settings that do not fit the weight."""
    if type(spec.tucker) is not bool:
        raise SpecError(f"`{path}` has tucker={spec.tucker!r}; it must be True or False.")
    if not spec.tucker and spec.channel_axis is not None:
        raise SpecError(
            f"`{path}` has {a_kind(spec)} with channel_axis={spec.channel_axis}, which only cores "
            "need. Set tucker=True, or leave it out."
        )
    channels_of_core(spec, shape, axes, path)


def draw_core(start: Start, key: jax.Array, init: Initializer, shape: tuple[int, ...]) -> jax.Array:
    """Draws a core `[*shared, *window, rank, rank]`; its fan-in is the window times a rank."""
    # [*shared, *window, r, q]: as a matrix, [window · r, q].
    *first, last = shape[len(start.axes.shared) :]
    return start.draw(key, init, (math.prod(first), last), shape)


def draw_outputs(
    start: Start, key: jax.Array, init: Initializer, shape: tuple[int, ...]
) -> jax.Array:
    """Draws `[*shared, rank, *out]` for a core, with the fan-in of the outputs, as PEFT does."""
    shared = len(start.axes.shared)
    rank, *outputs = shape[shared:]
    drawn = start.draw(key, init, (math.prod(outputs), rank), (*shape[:shared], *outputs, rank))
    # [*shared, *out, rank] -> [*shared, rank, *out]
    return jnp.moveaxis(drawn, -1, shared)
