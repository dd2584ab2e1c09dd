"""The name of a parameter in PyTorch: `Linear`, `Embedding`, `Conv`, `Experts` and others.

A name is a module, a tensor in it, and the axes of our parameter that each axis of the tensor
combines. `TorchName.at` resolves a name against the path and shape of one parameter. Reading and
writing need only the resulting `Place`.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import ClassVar

from lorax import Axes, LoraSpec, SpecError

from ._errors import AdapterMismatchError
from ._places import RANK, Factor, Groups, Place

MAGNITUDE = "lora_magnitude_vector"


@dataclasses.dataclass(frozen=True)
class TorchName:
    """The name of a parameter in PyTorch; the base class of `Linear`, `Embedding` and others.

    Args:
        module: the module's name in PyTorch. If the parameter stacks several modules along
            `shared_axes` (such as the layers of a `scan`), the name has one `{}` for each stacked
            axis: `"model.layers.{}.self_attn.q_proj"`.
        in_axes: the parameter's axes that are contracted with the input, as in `lorax.LoraSpec`.
        out_axes: the parameter's axes that appear in the output.
        shared_axes: the parameter's axes that index modules or experts.
        parameter: the tensor's name in the module.
        numbers: the numbers that replace `{}`, one for each entry of a stack, such as `(1, 3, 5)`
            if the stack holds every other layer; by default 0, 1, 2, ….
    """

    module: str
    _: dataclasses.KW_ONLY
    in_axes: Sequence[int] | None = None
    out_axes: Sequence[int] | None = None
    shared_axes: Sequence[int] = ()
    parameter: str = "weight"
    numbers: Sequence[int] | None = None

    stacked_in_tensor: ClassVar[int] = 0  # how many trailing shared axes one tensor contains
    fan_in_fan_out: ClassVar[bool] = False  # PEFT's name for a weight stored as (in, out)
    by_parameter: ClassVar[bool] = False  # whether PEFT adapts it through `target_parameters`

    @property
    def first_module(self) -> str:
        """The name of the module, or of the first one if it stacks several."""
        number = 0 if self.numbers is None else self.numbers[0]
        return self.module.format(*[number] * self.module.count("{}"))

    def fitted(self, axes: Axes) -> "TorchName":
        """This name, with the adapter's axes where it does not specify any."""
        return self

    def inputs(self, roles: Axes) -> Groups:
        """The parameter's axes in each input axis of the tensor: the channel, then the window."""
        return (roles.inputs,)

    def whole(self, roles: Axes) -> Groups:
        """The parameter's axes in each axis of the parameter's own tensor."""
        raise NotImplementedError

    def factors(self, roles: Axes) -> tuple[Factor, ...]:
        """The tensors `lora_A` and `lora_B`; empty if PEFT cannot adapt such a layer."""
        raise NotImplementedError

    def magnitude(self, roles: Axes) -> tuple[Factor, ...]:
        """The tensor of DoRA's magnitudes; empty if PEFT has no DoRA for such a layer."""
        return ()

    def at(self, path: str, shape: Sequence[int]) -> Place:
        """Resolves this name for one parameter.

        Args:
            path: the parameter's path.
            shape: the parameter's shape.

        Returns:
            The parameter's modules in PyTorch, and the axes of its tensors.

        Raises:
            AdapterMismatchError: if the name does not fit the shape.
        """
        try:
            axes = self._roles(path, len(shape))
        except SpecError as error:
            raise AdapterMismatchError(
                f"the entry of `{self.module}` in `names` does not fit: {error}"
            ) from error
        return Place(self, path, tuple(shape), axes)

    def _roles(self, path: str, ndim: int) -> Axes:
        """The roles of the parameter's axes."""
        spec = LoraSpec(1, None, "standard", self.in_axes, self.out_axes, self.shared_axes)
        return spec.axes(path, ndim)


@dataclasses.dataclass(frozen=True)
class Linear(TorchName):
    """`nn.Linear`: a weight (out, in).

    A parameter with several input or output axes, such as (in, heads, features), is flattened in
    the order of its axes.

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
    """transformers' `Conv1D`, as in GPT-2: a linear layer with a weight (in, out)."""

    fan_in_fan_out: ClassVar[bool] = True

    def whole(self, roles: Axes) -> Groups:
        return roles.inputs, roles.outputs


@dataclasses.dataclass(frozen=True)
class Embedding(TorchName):
    """`nn.Embedding`: a weight (vocabulary, features).

    Args:
        tied: whether the model's head uses the same table. In that case PEFT adapts only the
            lookup until the adapter is merged, and both afterwards, so `save_peft` warns.
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
class Conv(TorchName):
    """`nn.Conv1d`, `nn.Conv2d` or `nn.Conv3d`: a weight (out, in, *window).

    Args:
        channel_axis: which of the input axes is the channel; the others are the window. By default
            the last input axis, as in `(height, width, in, out)`.
        grouped: whether the convolution has more than one group. PEFT's format has no adapter for
            one.
    """

    channel_axis: int | None = None
    grouped: bool = False

    def inputs(self, roles: Axes) -> Groups:
        channel, ndim = roles.inputs[-1], sum(map(len, roles))
        if self.channel_axis is not None:
            channel = self.channel_axis + ndim * (self.channel_axis < 0)
        if channel not in roles.inputs:
            raise AdapterMismatchError(
                f"the entry of `{self.module}` in `names` is wrong: its "
                f"channel_axis={channel} is not among its in_axes={roles.inputs}."
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
class Experts(TorchName):
    """A parameter that stacks the weights of all experts, such as gpt-oss's `down_proj`.

    The last shared axis indexes the experts. PEFT adapts such a parameter through
    `target_parameters` (PEFT 0.17 and later).

    Args:
        order: the position of this parameter among those of its module, if the module has several.
        out_first: whether the parameter is (experts, out, in) rather than (experts, in, out).
        swapped: whether PEFT mistakes the parameter's outputs for its inputs. PEFT 0.19.1 and later
            do so if the model does not declare `is_transposed` (transformers 4); earlier releases
            do so for every `out_first` parameter. By default, files are written unswapped, and when
            reading, the shapes decide.
    """

    order: int = 0
    out_first: bool = False
    swapped: bool | None = None

    stacked_in_tensor: ClassVar[int] = 1
    by_parameter: ClassVar[bool] = True

    def with_swapped(self, swapped: bool) -> "Experts":
        """This name, for a file in which PEFT did or did not swap inputs and outputs."""
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
            # PEFT: lora_A [experts * rank, in], lora_B [out, rank * experts]
            Factor("lora_A.weight", first, ((experts, RANK), inputs)),
            Factor("lora_B.weight", second, (outputs, (RANK, experts))),
        )


@dataclasses.dataclass(frozen=True)
class Parameter(TorchName):
    """A matrix in a module of any other class, such as the router of a mixture of experts.

    PEFT adapts it through `target_parameters`, and treats its last axis as the input. Unless
    `in_axes` and `out_axes` are given, either axis may be the adapter's input: the delta is the
    same.

    Args:
        order: the position of this parameter among those of its module, if the module has several.
    """

    order: int = 0

    by_parameter: ClassVar[bool] = True

    def fitted(self, axes: Axes) -> "Parameter":
        if self.in_axes is not None or self.out_axes is not None:
            return self
        return dataclasses.replace(self, in_axes=axes.inputs, out_axes=axes.outputs)

    def _roles(self, path: str, ndim: int) -> Axes:
        is_open = self.in_axes is None and self.out_axes is None
        torch_name = self.fitted(Axes((), (-1,), (-2,))) if is_open else self
        return super(Parameter, torch_name)._roles(path, ndim)

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
class Tensor(TorchName):
    """A parameter that PyTorch stores with the same axes: a bias, a scale, a position table.

    Args:
        flat: whether PyTorch stores it as one axis, as the bias of a layer with several heads.
    """

    parameter: str = "bias"
    flat: bool = False

    def _roles(self, path: str, ndim: int) -> Axes:
        """All axes that are not shared count as outputs, since none is contracted."""
        if not all(-ndim <= d < ndim for d in self.shared_axes):
            raise AdapterMismatchError(
                f"the entry of `{self.module}` in `names` has "
                f"shared_axes={tuple(self.shared_axes)}, and `{path}` has {ndim} axes."
            )
        shared = tuple(sorted(d % ndim for d in self.shared_axes))
        return Axes(shared, (), tuple(d for d in range(ndim) if d not in shared))

    def whole(self, roles: Axes) -> Groups:
        axes = (*roles.inputs, *roles.outputs)
        return (tuple(sorted(axes)),) if self.flat else tuple((d,) for d in sorted(axes))

    def factors(self, roles: Axes) -> tuple[Factor, ...]:
        return ()


TorchNames = Mapping[str, TorchName]


def tensor_name(module: str, parameter: str) -> str:
    """The full name of a tensor in PyTorch; `module` is empty for the model's own parameters."""
    return f"{module}.{parameter}" if module else parameter
