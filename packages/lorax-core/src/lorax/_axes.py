"""Which axes of a weight are its inputs, its outputs, and shared: checked, and put in order."""

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
        """The sizes of the matrix (inputs × outputs) that each shared entry is."""
        return math.prod(shape[d] for d in self.inputs), math.prod(shape[d] for d in self.outputs)

    def matrices(self, array: Any) -> Any:
        """A weight as `[entries, inputs, outputs]`, one matrix for each shared entry."""
        matrices = array.transpose((*self.shared, *self.inputs, *self.outputs))
        return matrices.reshape(-1, *self.sizes(array.shape))

    def check(self, path: str, ndim: int) -> "Axes":
        """The same, in order; raises `SpecError` where a weight of `ndim` axes has others."""
        return resolve_axes(path, ndim, self.inputs, self.outputs, self.shared)


def resolve_axes(
    path: str,
    ndim: int,
    in_axes: Sequence[int] | None,
    out_axes: Sequence[int] | None,
    shared_axes: Sequence[int],
) -> Axes:
    """The roles of the axes of a weight with `ndim` axes.

    Where neither inputs nor outputs are given, the last axis that is not shared is the output,
    as in a `(in, out)`, `(heads, head_dim, out)` or `(height, width, in, out)` kernel; where one
    of them is given, the other is the rest.
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
            f"`{path}` has {ndim} axes, and its spec leaves in_axes={inputs}, "
            f"out_axes={outputs}; a low-rank delta needs at least one input and one output "
            "axis. Give it LORA_FREEZE or LORA_FULL."
        )
    return axes


def normalize(path: str, ndim: int, name: str, axes: Sequence[int]) -> tuple[int, ...]:
    """Axes of a weight with `ndim` axes, none of them negative, in order."""
    out = []
    for axis in axes:
        if type(axis) is not int or not -ndim <= axis < ndim:
            raise SpecError(
                f"`{path}` has {ndim} axes; {name}={tuple(axes)} names one that is not among them."
            )
        out.append(axis % ndim)
    if len(set(out)) != len(out):
        raise SpecError(f"`{path}`: {name}={tuple(axes)} names an axis twice.")
    return tuple(sorted(out))
