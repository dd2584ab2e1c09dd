"""Tucker's form: a core over the window of a convolution, between two factors of the channels."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from .._adapter_spec import Initializer, Start
from .._axes import Axes, normalize
from .._errors import SpecError, a_kind


def channel_axis_of(path: str, spec: Any, ndim: int, axes: Axes) -> int:
    """The input axis of the channels; by default the last."""
    if spec.channel_axis is None:
        return axes.inputs[-1]
    (channels,) = normalize(path, ndim, "channel_axis", (spec.channel_axis,))
    if channels not in axes.inputs:
        raise SpecError(
            f"`{path}` has {a_kind(spec)} with channel_axis={spec.channel_axis}; it is one of the "
            f"input axes {axes.inputs}."
        )
    return channels


def channels_of_core(spec: Any, shape: tuple[int, ...], axes: Axes, path: str = "") -> int | None:
    """The axis of the channels where a spec has cores and the weight a window, and None elsewhere.

    As in PEFT, a window of one entry has no core.
    """
    if not spec.tucker:
        return None
    channels = channel_axis_of(path, spec, len(shape), axes)
    return channels if has_window(shape, axes, channels) else None


def has_window(shape: tuple[int, ...], axes: Axes, channels: int) -> bool:
    """Whether the inputs beside the channels have more than one entry."""
    return any(shape[d] != 1 for d in axes.inputs if d != channels)


def check_tucker(path: str, spec: Any, shape: tuple[int, ...], axes: Axes) -> None:
    """Refuses settings of cores that do not fit the weight."""
    if type(spec.tucker) is not bool:
        raise SpecError(f"`{path}` has tucker={spec.tucker!r}; it is True or False.")
    if not spec.tucker and spec.channel_axis is not None:
        raise SpecError(
            f"`{path}` has {a_kind(spec)} with channel_axis={spec.channel_axis}, which only cores "
            "need. Set tucker=True, or leave it out."
        )
    channels_of_core(spec, shape, axes, path)


def draw_core(start: Start, key: jax.Array, init: Initializer, shape: tuple[int, ...]) -> jax.Array:
    """A core, `[*shared, *window, rank, rank]`, whose fan-in is that of the window and a rank."""
    *first, last = shape[len(start.axes.shared) :]
    return start.draw(key, init, (math.prod(first), last), shape)


def draw_outputs(
    start: Start, key: jax.Array, init: Initializer, shape: tuple[int, ...]
) -> jax.Array:
    """`[*shared, rank, *out]` beside a core, whose fan-in is that of the outputs, as in PEFT."""
    shared = len(start.axes.shared)
    rank, *outputs = shape[shared:]
    drawn = start.draw(key, init, (math.prod(outputs), rank), (*shape[:shared], *outputs, rank))
    return jnp.moveaxis(drawn, -1, shared)
