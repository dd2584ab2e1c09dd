"""How PyTorch stores a parameter: `Linear`, `Embedding`, `Conv`, `Experts` and others.

A layout says of each axis of a tensor in PyTorch which axes of the parameter it is made of. `at`
resolves it against one parameter; a `Place` is all that reading and writing need.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import ClassVar

from lorax import Axes, LoraSpec, SpecError

from ._errors import AdapterMismatchError
from ._places import RANK, Factor, Groups, Place

MAGNITUDE = "lora_magnitude_vector"


@dataclasses.dataclass(frozen=True)
class Layout:
    """The base class of all layouts.

    Args:
        module: the module's name in PyTorch. Where `shared_axes` stack several modules in one
            parameter (the layers of a `scan`), it has one `{}` for each of them:
            `"model.layers.{}.self_attn.q_proj"`.
        in_axes: the parameter's axes that meet the input, as in `lorax.LoraSpec`.
        out_axes: the axes that make the output.
        shared_axes: the axes with a module, or an expert, for each entry.
        parameter: the tensor's name in the module.
        numbers: what replaces `{}` in the modules of one stack, such as `(1, 3, 5)` where every
            other layer is in it; by default 0, 1, 2, ….
    """

    module: str
    _: dataclasses.KW_ONLY
    in_axes: Sequence[int] | None = None
    out_axes: Sequence[int] | None = None
    shared_axes: Sequence[int] = ()
    parameter: str = "weight"
    numbers: Sequence[int] | None = None

    stacked_in_tensor: ClassVar[int] = 0  # the last shared axes that are within one tensor
    fan_in_fan_out: ClassVar[bool] = False
    by_parameter: ClassVar[bool] = False  # whether PEFT adapts it through `target_parameters`

    def fitted(self, axes: Axes) -> "Layout":
        """The same for an adapter with these axes, where the layout leaves them open."""
        return self

    def inputs(self, roles: Axes) -> Groups:
        """The input axes of a tensor in PyTorch: one, and those of a window."""
        return (roles.inputs,)

    def whole(self, roles: Axes) -> Groups:
        """The axes of the tensor that holds the parameter itself."""
        raise NotImplementedError

    def factors(self, roles: Axes) -> tuple[Factor, ...]:
        """The two tensors that hold its factors."""
        raise NotImplementedError

    def magnitude(self, roles: Axes) -> tuple[Factor, ...]:
        """The tensor that holds DoRA's magnitudes; none where PEFT has no DoRA of such a layer."""
        return ()

    def at(self, path: str, shape: Sequence[int]) -> Place:
        """Where a parameter of this layout is in PyTorch.

        Args:
            path: of the parameter.
            shape: of the parameter.

        Raises:
            AdapterMismatchError: where the layout does not fit the shape.
        """
        try:
            axes = self._roles(path, len(shape))
        except SpecError as error:
            raise AdapterMismatchError(
                f"the layout of `{self.module}` does not fit: {error}"
            ) from error
        return Place(self, path, tuple(shape), axes)

    def _roles(self, path: str, ndim: int) -> Axes:
        """The roles of the parameter's axes."""
        spec = LoraSpec(1, None, "standard", self.in_axes, self.out_axes, self.shared_axes)
        return spec.axes(path, ndim)


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

    def inputs(self, roles: Axes) -> Groups:
        channel, ndim = roles.inputs[-1], sum(map(len, roles))
        if self.channel_axis is not None:
            channel = self.channel_axis + ndim * (self.channel_axis < 0)
        if channel not in roles.inputs:
            raise AdapterMismatchError(
                f"the layout of `{self.module}` is wrong: its channel_axis={channel} is not among "
                f"its in_axes={roles.inputs}."
            )
        return ((channel,), *((d,) for d in roles.inputs if d != channel))

    def whole(self, roles: Axes) -> Groups:
        return roles.outputs, *self.inputs(roles)

    def factors(self, roles: Axes) -> tuple[Factor, ...]:
        if self.grouped:
            return ()
        channel, *window = self.inputs(roles)
        return (
            Factor("lora_A.weight", "a", ((RANK,), channel, *window)),
            Factor("lora_B.weight", "b", (roles.outputs, (RANK,), *(() for _ in window))),
        )

    def magnitude(self, roles: Axes) -> tuple[Factor, ...]:
        if self.grouped:
            return ()
        _, *window = self.inputs(roles)
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
    by_parameter: ClassVar[bool] = True

    def with_swapped(self, swapped: bool) -> "Experts":
        """The same, where it is known whether PEFT swapped inputs and outputs."""
        return dataclasses.replace(self, swapped=swapped)

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
class Parameter(Layout):
    """A matrix in a module of any other class, such as the router of a mixture of experts.

    PEFT adapts it through `target_parameters`, and takes its last axis for the inputs. Unless
    `in_axes` and `out_axes` say so, either axis may be the adapter's input: the delta is the same.

    Args:
        order: where the module has several such parameters, their order in it.
    """

    order: int = 0

    by_parameter: ClassVar[bool] = True

    def fitted(self, axes: Axes) -> "Parameter":
        if self.in_axes is not None or self.out_axes is not None:
            return self
        return dataclasses.replace(self, in_axes=axes.inputs, out_axes=axes.outputs)

    def _roles(self, path: str, ndim: int) -> Axes:
        is_open = self.in_axes is None and self.out_axes is None
        layout = self.fitted(Axes((), (-1,), (-2,))) if is_open else self
        return super(Parameter, layout)._roles(path, ndim)

    def whole(self, roles: Axes) -> Groups:
        first, second = sorted((roles.outputs, roles.inputs))
        return first, second

    def factors(self, roles: Axes) -> tuple[Factor, ...]:
        first, second = self.whole(roles)
        of_second, of_first = ("a", "b") if second == roles.inputs else ("b", "a")
        return (
            Factor("lora_A.weight", of_second, ((RANK,), second)),
            Factor("lora_B.weight", of_first, (first, (RANK,))),
        )


@dataclasses.dataclass(frozen=True)
class Tensor(Layout):
    """A parameter that is in PyTorch as it is here: a bias, a scale, a table of positions.

    Args:
        flat: whether it is one-dimensional there, such as the bias of several heads.
    """

    parameter: str = "bias"
    flat: bool = False

    def _roles(self, path: str, ndim: int) -> Axes:
        """All axes that are not shared are outputs: there is nothing that they meet."""
        if not all(-ndim <= d < ndim for d in self.shared_axes):
            raise AdapterMismatchError(
                f"the layout of `{self.module}` has shared_axes={tuple(self.shared_axes)}, and "
                f"`{path}` has {ndim} axes."
            )
        shared = tuple(sorted(d % ndim for d in self.shared_axes))
        return Axes(shared, (), tuple(d for d in range(ndim) if d not in shared))

    def whole(self, roles: Axes) -> Groups:
        axes = (*roles.inputs, *roles.outputs)
        return (tuple(sorted(axes)),) if self.flat else tuple((d,) for d in sorted(axes))

    def factors(self, roles: Axes) -> tuple[Factor, ...]:
        return ()


Layouts = Mapping[str, Layout]


def tensor_name(module: str, parameter: str) -> str:
    """The name of a tensor in PyTorch; a parameter of the model itself is in no module."""
    return f"{module}.{parameter}" if module else parameter
