"""Resolves which two axes of a weight are split into blocks."""

from collections.abc import Sequence
from typing import Any

from .._axes import Axes, normalize
from .._errors import SpecError, a_kind


def resolve_split(
    path: str, spec: Any, ndim: int, axes: Axes, given: Sequence[int] | None
) -> tuple[int, int]:
    """Returns the input axis and the output axis to split; by default the last of each side.

    Raises:
        SpecError: if `given` is not one input axis and one output axis.
    """
    if given is None:
        return axes.inputs[-1], axes.outputs[-1]
    # `normalize` sorts, so which of the two is the input follows from its role.
    split_axes = normalize(path, ndim, "split_axes", given)
    inputs = [d for d in split_axes if d in axes.inputs]
    outputs = [d for d in split_axes if d in axes.outputs]
    if len(split_axes) != 2 or len(inputs) != 1:
        raise SpecError(
            f"`{path}` has {a_kind(spec)} with split_axes={tuple(given)}; give one of its "
            f"input axes {axes.inputs} and one of its output axes {axes.outputs}."
        )
    if not outputs:
        raise SpecError(
            f"`{path}` has {a_kind(spec)} with split_axes={tuple(given)}, of which one is "
            f"shared; give one of the output axes {axes.outputs}."
        )
    return inputs[0], outputs[0]
