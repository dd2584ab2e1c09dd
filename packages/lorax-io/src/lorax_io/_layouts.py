"""How a parameter lies in a PyTorch module: `Linear`, `Embedding`, `Conv`, `Experts`, `Tensor`.

A layout says of each axis of a tensor in PyTorch which axes of the parameter it is made of. That is
all there is to a layout: the same two functions, `pack` and `unpack`, carry every array across, and
`RANK` is an axis like any other.
"""

import dataclasses
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np

from lorax import Axes

from ._errors import AdapterMismatchError

Array = np.ndarray[Any, Any]
Groups = tuple[tuple[int, ...], ...]
RANK = -1
MAGNITUDE = "lora_magnitude_vector"


class Factor(NamedTuple):
    """Where a factor lies: after which key, which of ours it is, and what its axes are made of."""

    key: str
    name: str  # "a", "b" or "magnitude"
    groups: Groups


@dataclasses.dataclass(frozen=True)
class Layout:
    """What all layouts share.

    Args:
        module: the module's name in PyTorch. Where `shared_axes` stack several modules in one
            parameter (the layers of a `scan`), it has one `{}` for each of them:
            `"model.layers.{}.self_attn.q_proj"`.
        in_axes: the parameter's axes that meet the input, as in `lorax.LoraSpec`.
        out_axes: the axes that make the output.
        shared_axes: the axes with a module, or an expert, for each entry.
        parameter: the tensor's name in the module.
    """

    module: str
    _: dataclasses.KW_ONLY
    in_axes: Sequence[int] | None = None
    out_axes: Sequence[int] | None = None
    shared_axes: Sequence[int] = ()
    parameter: str = "weight"

    stacked_in_tensor: ClassVar[int] = 0  # the last shared axes that lie within one tensor
    fan_in_fan_out: ClassVar[bool] = False

    def whole(self, roles: Axes) -> Groups:
        """The axes of the tensor that holds the parameter itself."""
        raise NotImplementedError

    def factors(self, roles: Axes) -> tuple[Factor, ...]:
        """The two tensors that hold its factors."""
        raise NotImplementedError

    def magnitude(self, roles: Axes) -> tuple[Factor, ...]:
        """The tensor that holds DoRA's magnitudes; none where PEFT has no DoRA of such a layer."""
        return ()

    def roles(self, ndim: int) -> Axes:
        """The roles of the axes of a parameter, by the rule of `lorax.LoraSpec`."""
        shared = self._axes("shared_axes", ndim)
        rest = [d for d in range(ndim) if d not in shared]
        if self.in_axes is not None:
            inputs = self._axes("in_axes", ndim)
            others = tuple(d for d in rest if d not in inputs)
            outputs = others if self.out_axes is None else self._axes("out_axes", ndim)
        else:
            outputs = tuple(rest[-1:]) if self.out_axes is None else self._axes("out_axes", ndim)
            inputs = tuple(d for d in rest if d not in outputs)
        if sorted((*shared, *inputs, *outputs)) != list(range(ndim)):
            raise AdapterMismatchError(
                self.module,
                f"its layout uses the {ndim} axes of the parameter as in_axes={inputs}, "
                f"out_axes={outputs}, shared_axes={shared}; each axis must have exactly one role.",
            )
        return Axes(shared, inputs, outputs)

    def _axes(self, name: str, ndim: int) -> tuple[int, ...]:
        """Some axes of a parameter, each counted from the front."""
        return tuple(sorted(self._axis(name, d, ndim) for d in getattr(self, name)))

    def _axis(self, name: str, axis: int, ndim: int) -> int:
        if not -ndim <= axis < ndim:
            raise AdapterMismatchError(
                self.module,
                f"its layout has {name}={getattr(self, name)}, and the parameter has ndim={ndim}.",
            )
        return axis % ndim

    def stack(self, roles: Axes) -> tuple[int, ...]:
        """The shared axes that have a module for each entry."""
        return roles.shared[: len(roles.shared) - self.stacked_in_tensor]

    def modules(self, roles: Axes, sizes: Mapping[int, int]) -> dict[tuple[int, ...], str]:
        """The module of each entry of the stack; one, at `()`, where nothing is stacked.

        Args:
            roles: of the parameter's axes.
            sizes: of its shared axes, by axis.
        """
        entries = itertools.product(*(range(sizes[d]) for d in self.stack(roles)))
        return {index: self.module.format(*index) for index in entries}


@dataclasses.dataclass(frozen=True)
class Linear(Layout):
    """`nn.Linear`: a weight (out, in). Axes of heads are flattened in the parameter's order.

    Example:
        >>> from lorax_io import Linear
        >>> names = {
        ...     f"layers/{i}/attn/{name}/kernel": Linear(f"model.layers.{i}.self_attn.{name}_proj")
        ...     for i in range(30)
        ...     for name in "qv"
        ... }
        >>> names["layers/7/attn/q/kernel"].module
        'model.layers.7.self_attn.q_proj'
    """

    def whole(self, roles: Axes) -> Groups:
        return roles.outputs, roles.inputs

    def factors(self, roles: Axes) -> tuple[Factor, ...]:
        return (
            Factor("lora_A.weight", "a", ((RANK,), roles.inputs)),
            Factor("lora_B.weight", "b", (roles.outputs, (RANK,))),
        )

    def magnitude(self, roles: Axes) -> tuple[Factor, ...]:
        return (Factor(MAGNITUDE, "magnitude", (roles.outputs,)),)


@dataclasses.dataclass(frozen=True)
class Conv1D(Linear):
    """The `Conv1D` of transformers' GPT-2, a linear layer with a weight (in, out)."""

    fan_in_fan_out: ClassVar[bool] = True

    def whole(self, roles: Axes) -> Groups:
        return roles.inputs, roles.outputs


@dataclasses.dataclass(frozen=True)
class Embedding(Layout):
    """`nn.Embedding`: a weight (vocabulary, features).

    Args:
        tied: whether the model's head is this table, too. PEFT then adapts the look-up alone, and
            both once it is merged, so that `save_peft` warns.
    """

    tied: bool = False

    def whole(self, roles: Axes) -> Groups:
        return roles.inputs, roles.outputs

    def factors(self, roles: Axes) -> tuple[Factor, ...]:
        return (
            Factor("lora_embedding_A", "a", ((RANK,), roles.inputs)),
            Factor("lora_embedding_B", "b", (roles.outputs, (RANK,))),
        )

    def magnitude(self, roles: Axes) -> tuple[Factor, ...]:
        return (Factor(MAGNITUDE, "magnitude", (roles.outputs,)),)


@dataclasses.dataclass(frozen=True)
class Conv(Layout):
    """`nn.Conv1d`, `nn.Conv2d` or `nn.Conv3d`: a weight (out, in, *window).

    Args:
        channel_axis: which of the input axes is the channel; the others are the window. By default
            the last of them, as in `(height, width, in, out)`.
        grouped: whether it has several groups; PEFT has no form for an adapter of one.
    """

    channel_axis: int | None = None
    grouped: bool = False

    def _inputs(self, roles: Axes) -> Groups:
        channel = roles.inputs[-1]
        if self.channel_axis is not None:
            channel = self._axis("channel_axis", self.channel_axis, sum(map(len, roles)))
        if channel not in roles.inputs:
            raise AdapterMismatchError(
                self.module, f"its channel_axis={channel} is not among its in_axes={roles.inputs}."
            )
        return ((channel,), *((d,) for d in roles.inputs if d != channel))

    def whole(self, roles: Axes) -> Groups:
        return roles.outputs, *self._inputs(roles)

    def factors(self, roles: Axes) -> tuple[Factor, ...]:
        if self.grouped:
            return ()
        channel, *window = self._inputs(roles)
        return (
            Factor("lora_A.weight", "a", ((RANK,), channel, *window)),
            Factor("lora_B.weight", "b", (roles.outputs, (RANK,), *(() for _ in window))),
        )

    def magnitude(self, roles: Axes) -> tuple[Factor, ...]:
        if self.grouped:
            return ()
        _, *window = self._inputs(roles)
        return (Factor(MAGNITUDE, "magnitude", ((), roles.outputs, *(() for _ in window))),)


@dataclasses.dataclass(frozen=True)
class Experts(Layout):
    """A three-dimensional parameter of a module of experts, such as gpt-oss's `down_proj`.

    The last shared axis is the experts'. PEFT adapts such a parameter through `target_parameters`
    (PEFT 0.17 and later).

    Args:
        order: where the module has several such parameters, their order in it.
        out_first: whether the parameter is (experts, out, in), not (experts, in, out).
        swapped: whether PEFT takes the parameter's outputs for its inputs, as releases from 0.19.1
            do where the model does not declare `is_transposed` (transformers 4), and all of them do
            for `out_first` before. By default a file is written as it should be, and read as its
            shapes say.
    """

    order: int = 0
    out_first: bool = False
    swapped: bool | None = None

    stacked_in_tensor: ClassVar[int] = 1

    def whole(self, roles: Axes) -> Groups:
        sides = (roles.outputs, roles.inputs) if self.out_first else (roles.inputs, roles.outputs)
        return (roles.shared[-1:], *sides)

    def factors(self, roles: Axes) -> tuple[Factor, ...]:
        experts = roles.shared[-1]
        first, second = ("b", "a") if self.swapped else ("a", "b")
        inputs, outputs = roles.inputs, roles.outputs
        if self.swapped:
            inputs, outputs = outputs, inputs
        return (
            Factor("lora_A.weight", first, ((experts, RANK), inputs)),
            Factor("lora_B.weight", second, (outputs, (RANK, experts))),
        )


@dataclasses.dataclass(frozen=True)
class Tensor(Layout):
    """A parameter that lies in PyTorch as it does here: a bias, a scale, a table of positions.

    Args:
        flat: whether it is one-dimensional there, such as the bias of several heads.
    """

    parameter: str = "bias"
    flat: bool = False

    def whole(self, roles: Axes) -> Groups:
        axes = (*roles.inputs, *roles.outputs)
        return (tuple(sorted(axes)),) if self.flat else tuple((d,) for d in sorted(axes))

    def factors(self, roles: Axes) -> tuple[Factor, ...]:
        return ()


LAYOUTS: dict[str, type[Layout]] = {
    layout.__name__: layout for layout in (Linear, Conv1D, Embedding, Conv, Experts, Tensor)
}

Layouts = Mapping[str, Layout]
# A layout, or the same as plain data: `{"layout": "Linear", "module": …}`.
Names = Mapping[str, Layout | Mapping[str, Any]]


def as_layouts(names: Names) -> Layouts:
    """The layouts, of plain data too, each checked.

    Raises:
        AdapterMismatchError: where one is none; its `path` is the parameter's.
    """
    layouts = {path: _as_layout(path, row) for path, row in names.items()}
    for path, layout in layouts.items():
        _check_fields(path, layout)
    return layouts


def _as_layout(path: str, row: Layout | Mapping[str, Any]) -> Layout:
    if isinstance(row, Layout):
        return row
    fields = dict(row)
    kind = LAYOUTS.get(str(fields.pop("layout", None)))
    if kind is None:
        raise AdapterMismatchError(
            path, f"its `layout` is none of {', '.join(LAYOUTS)}: {dict(row)}."
        )
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
    try:
        return kind(**values)
    except TypeError as error:
        raise AdapterMismatchError(path, f"is no layout: {error}.") from error


def _check_fields(path: str, layout: Layout) -> None:
    for field in dataclasses.fields(layout):
        value = getattr(layout, field.name)
        if not _may_hold(field.name, value):
            raise AdapterMismatchError(
                path, f"has {field.name} = {json.dumps(value, default=repr)}."
            )
    *texts, last = layout.module.split("{}")
    stacked = max(len(layout.shared_axes) - layout.stacked_in_tensor, 0)
    if len(texts) != stacked or not {"{", "}"}.isdisjoint("".join([*texts, last])):
        raise AdapterMismatchError(
            path, "needs one `{}` in its module for each axis that stacks modules, and no other."
        )


def _may_hold(field: str, value: Any) -> bool:
    match field:
        case "module" | "parameter":
            return isinstance(value, str)
        case "in_axes" | "out_axes" | "shared_axes":
            is_axes = isinstance(value, tuple | list) and all(type(axis) is int for axis in value)
            return is_axes or (value is None and field != "shared_axes")
        case "channel_axis":
            return value is None or type(value) is int
        case "order":
            return type(value) is int
        case _:
            return isinstance(value, bool) or (value is None and field == "swapped")


def tensor_name(module: str, parameter: str) -> str:
    """The name of a tensor in PyTorch; a parameter of the model itself is in no module."""
    return f"{module}.{parameter}" if module else parameter


def pack(array: Array, axes: Sequence[int], groups: Groups) -> Array:
    """The tensor of these groups, from an array with these axes; a view where that is possible."""
    where = {axis: position for position, axis in enumerate(axes)}
    order = [where[axis] for group in groups for axis in group]
    shape = [math.prod(array.shape[where[axis]] for axis in group) for group in groups]
    return array.transpose(order).reshape(shape)


def unpack(tensor: Array, axes: Sequence[int], groups: Groups, sizes: Mapping[int, int]) -> Array:
    """The array with these axes, from the tensor of these groups."""
    order = [axis for group in groups for axis in group]
    array = tensor.reshape([sizes[axis] for axis in order])
    return array.transpose([order.index(axis) for axis in axes])


def packed_shape(groups: Groups, sizes: Mapping[int, int]) -> tuple[int, ...]:
    """The shape of a tensor of these groups."""
    return tuple(math.prod(sizes[axis] for axis in group) for group in groups)
