"""The roles of a weight's axes: inputs, outputs and shared, validated and sorted."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from ._errors import SpecError


class Axes(NamedTuple):
    """The roles of a weight's axes, each in the weight's order."""

    shared: tuple[int, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]

    def sizes(self, shape: Sequence[int]) -> tuple[int, int]:
        """Returns the size of the inputs × outputs matrix of each shared entry."""
        return math.prod(shape[d] for d in self.inputs), math.prod(shape[d] for d in self.outputs)

    def matrices(self, array: Any) -> Any:
        """Returns a weight as `[entries, inputs, outputs]`, one matrix per shared entry."""
        matrices = array.transpose((*self.shared, *self.inputs, *self.outputs))
        return matrices.reshape(-1, *self.sizes(array.shape))

    def check(self, path: str, ndim: int) -> "Axes":
        """Returns the same roles, sorted; raises `SpecError` if they do not fit `ndim` axes."""
        return resolve_axes(path, ndim, self.inputs, self.outputs, self.shared)


def resolve_axes(
    path: str,
    ndim: int,
    in_axes: Sequence[int] | None,
    out_axes: Sequence[int] | None,
    shared_axes: Sequence[int],
) -> Axes:
    """Returns the roles of the axes of a weight with `ndim` axes.

    If neither inputs nor outputs are given, the last axis that is not shared is the output, as in a
    `(in, out)`, `(heads, head_dim, out)` or `(height, width, in, out)` kernel. If one of them is
    given, the other is the rest.

    Raises:
        SpecError: if an axis does not have exactly one role, or inputs or outputs are empty.
    """
    shared = normalize(path, ndim, "shared_axes", shared_axes)
    rest = [d for d in range(ndim) if d not in shared]
    if in_axes is None and out_axes is None:
        inputs, outputs = tuple(rest[:-1]), tuple(rest[-1:])
    elif in_axes is None:
        outputs = normalize(path, ndim, "out_axes", out_axes or ())
        inputs = tuple(d for d in rest if d not in outputs)
    else:
        inputs = normalize(path, ndim, "in_axes", in_axes)
        outputs = (
            tuple(d for d in rest if d not in inputs)
            if out_axes is None
            else normalize(path, ndim, "out_axes", out_axes)
        )
    axes = Axes(shared, inputs, outputs)
    if sorted((*shared, *inputs, *outputs)) != list(range(ndim)):
        raise SpecError(
            f"`{path}` has {ndim} axes, but its spec uses them as in_axes={inputs}, "
            f"out_axes={outputs}, shared_axes={shared}; each axis must have exactly one role."
        )
    if not inputs or not outputs:
        raise SpecError(
            f"`{path}` has {ndim} axes, and its spec results in in_axes={inputs}, "
            f"out_axes={outputs}; a low-rank delta needs at least one input and one output axis. "
            "Give it LORA_FREEZE or LORA_FULL."
        )
    return axes


def normalize(path: str, ndim: int, name: str, axes: Sequence[int]) -> tuple[int, ...]:
    """Returns axes of a weight with `ndim` axes as sorted non-negative numbers."""
    out = []
    for axis in axes:
        if type(axis) is not int or not -ndim <= axis < ndim:
            raise SpecError(
                f"`{path}` has {ndim} axes; {name}={tuple(axes)} names an axis that it does not "
                "have."
            )
        out.append(axis % ndim)
    if len(set(out)) != len(out):
        raise SpecError(f"`{path}`: {name}={tuple(axes)} names an axis twice.")
    return tuple(sorted(out))
