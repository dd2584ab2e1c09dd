"""Where one parameter is in PyTorch: its modules, and the axes of each of its tensors.

A parameter's axes are numbered from 0. Further axes of a factor, such as the rank, are negative.
Each axis of a tensor is a group of these, flattened: `((RANK,), (1, 2))` is a tensor of two axes,
the second of which combines axes 1 and 2 of the parameter. `pack` and `unpack` convert between
arrays and tensors.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from lorax import Adapter, Axes

from ._errors import AdapterMismatchError

if TYPE_CHECKING:
    from ._torch_names import TorchName

Array = np.ndarray[Any, Any]
Groups = tuple[tuple[int, ...], ...]  # for each axis of a tensor, the axes it combines
RANK = -1


class Factor(NamedTuple):
    """How a factor is stored: its PEFT key, our name for it, and the axes of its tensor."""

    key: str  # as in `lora_A.weight`
    name: str  # as in `a`
    groups: Groups


@dataclasses.dataclass(frozen=True)
class Place:
    """A name, resolved against the path and the shape of a parameter."""

    torch_name: "TorchName"
    path: str
    shape: tuple[int, ...]
    axes: Axes

    @functools.cached_property
    def sizes(self) -> dict[int, int]:
        """The size of each axis."""
        return dict(enumerate(self.shape))

    @functools.cached_property
    def stack(self) -> tuple[int, ...]:
        """The shared axes that index modules; those within one tensor are not among them."""
        shared = self.axes.shared
        return shared[: len(shared) - self.torch_name.stacked_in_tensor]

    @functools.cached_property
    def modules(self) -> dict[tuple[int, ...], str]:
        """The module's name by index into the stack; only `()` if nothing is stacked."""
        entries = itertools.product(*(range(self.shape[d]) for d in self.stack))
        numbers = self.torch_name.numbers
        sizes = [self.shape[d] for d in self.stack]
        if numbers is not None and sizes != [len(numbers)]:
            raise AdapterMismatchError(
                f"its entry in `names` numbers {len(numbers)} modules, and it stacks {sizes}.",
                self.path,
            )
        named = lambda index: index if numbers is None else (numbers[index[0]],)  # noqa: E731
        return {index: self.torch_name.module.format(*named(index)) for index in entries}

    @functools.cached_property
    def whole(self) -> Groups:
        """The axes of the parameter's own tensor."""
        return self.torch_name.whole(self.axes)

    @functools.cached_property
    def inputs(self) -> Groups:
        """The input axes of the tensor: the channel, then the window."""
        return self.torch_name.inputs(self.axes)

    @property
    def outputs(self) -> tuple[int, ...]:
        """The output axes, which a tensor combines into one."""
        return self.axes.outputs

    @functools.cached_property
    def factors(self) -> tuple[Factor, ...]:
        """The tensors of LoRA's factors."""
        return self.torch_name.factors(self.axes)

    @functools.cached_property
    def magnitude(self) -> tuple[Factor, ...]:
        """The tensor of DoRA's magnitudes."""
        return self.torch_name.magnitude(self.axes)

    def pattern_name(self, module: str) -> str:
        """The name by which PEFT targets a module, or a parameter of one (`by_parameter`)."""
        return f"{module}.{self.torch_name.parameter}" if self.torch_name.by_parameter else module

    def with_torch_name(self, torch_name: "TorchName") -> "Place":
        """The same parameter under another name."""
        return dataclasses.replace(self, torch_name=torch_name)


class Axed(NamedTuple):
    """The axes of the factors of an adapter on a parameter."""

    of: dict[str, tuple[int, ...]]  # by name of the factor, trained or frozen
    sizes: dict[int, int]  # by axis


def axes_of(weight: Adapter, shape: tuple[int, ...]) -> Axed:
    """The axes of each factor: the parameter's own, and −1, −2, … for inner ones such as the rank.

    If the adapter's kind splits an axis of the parameter into blocks, the size of that axis is the
    number of blocks.
    """
    layout = weight.layout(shape)
    labels = {**layout.factors, **layout.frozen}
    numbered = lambda d: d if d < len(shape) else len(shape) - 1 - d  # noqa: E731
    return Axed(
        {name: tuple(numbered(label.id) for label in row) for name, row in labels.items()},
        {numbered(label.id): label.size for row in labels.values() for label in row},
    )


def pack(array: Array, axes: Sequence[int], groups: Groups) -> Array:
    """Transposes and flattens an array with these axes to a tensor; a view where possible."""
    where = {axis: position for position, axis in enumerate(axes)}
    order = [where[axis] for group in groups for axis in group]
    shape = [math.prod(array.shape[where[axis]] for axis in group) for group in groups]
    return array.transpose(order).reshape(shape)


def unpack(tensor: Array, axes: Sequence[int], groups: Groups, sizes: Mapping[int, int]) -> Array:
    """The inverse of `pack`: the array with these axes."""
    order = [axis for group in groups for axis in group]
    array = tensor.reshape([sizes[axis] for axis in order])
    return array.transpose([order.index(axis) for axis in axes])


def packed_shape(groups: Groups, sizes: Mapping[int, int]) -> tuple[int, ...]:
    """The shape of a tensor of these groups."""
    return tuple(math.prod(sizes[axis] for axis in group) for group in groups)
