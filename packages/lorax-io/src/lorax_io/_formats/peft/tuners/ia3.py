"""IA³: `ia3_l`, a column of gains for the outputs, or a row of gains for the inputs."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from lorax import Adapter, IA3Weight

from ...._errors import AdapterFileError, UnsupportedAdapterError
from ...._places import Array, Factor, Place
from ..config import PeftConfig
from .tuner import Module, Scaling, Shapes, Sides, Tuner, check_flat


class IA3(Tuner):
    """Gains of a module's outputs, or of its inputs if it is a feedforward module."""

    peft_type = "IA3"
    called = "IA³"
    marks = ("ia3_l",)
    fields = ("feedforward_modules",)
    lacking = ("layers_to_transform", "layers_pattern")
    harmless = ("init_ia3_weights",)
    init = "init_ia3_weights"

    def writes(self, weight: Any) -> bool:
        return isinstance(weight, IA3Weight)

    def blank(self, place: Place, config: PeftConfig, module: str, shapes: Shapes) -> Adapter:
        check_flat(place, self.called)
        shared, inputs, outputs = place.axes
        if not config.is_feedforward(module):
            return IA3Weight(None, "out", None, inputs, outputs, shared)
        channel = place.inputs[0] if len(place.inputs) > 1 else None
        return IA3Weight(None, "in", channel, inputs, outputs, shared)

    def factors(self, place: Place, weight: Any) -> tuple[Factor, ...]:
        check_flat(place, self.called)
        window = tuple(() for _ in place.inputs[1:])
        if weight.side == "in":
            gained = place.axes.inputs if weight.gain_axes is None else weight.gain_axes
            if gained != place.inputs[0]:
                raise UnsupportedAdapterError(
                    f"`{place.path}` has gains along the axes {gained}, and PEFT along the "
                    "channels. Use `save_adapter` or `save_merged`."
                )
            groups = ((), place.inputs[0], *window)
        else:
            if weight.gain_axes not in (None, place.outputs):
                raise UnsupportedAdapterError(
                    f"`{place.path}` has gains along some of its outputs, and PEFT along all. Use "
                    "`save_adapter` or `save_merged`."
                )
            groups = ((), place.outputs, *window) if window else (place.outputs, ())
        return (Factor("ia3_l", "gain", groups),)

    def sides(self, shapes: Shapes, config: PeftConfig, module: str) -> Sides:
        shape = shapes.get("ia3_l", ())
        if len(shape) not in (2, 4, 5):
            raise AdapterFileError(f"has `ia3_l` of `{module}` of shape {shape}.")
        window = tuple(1 for _ in shape[2:])
        if config.is_feedforward(module):
            return Sides(1, (shape[1], *window))
        return Sides(shape[1] if window else shape[0], (1, *window))

    def bias(
        self, tensors: Mapping[str, Any], config: PeftConfig, module: str
    ) -> Callable[[Array], Array] | None:
        """The scaled bias: PEFT multiplies a layer's bias by the gains of its outputs, too."""
        gain = tensors.get(f"{module}.ia3_l")
        if gain is None or config.is_feedforward(module):
            return None
        return lambda bias: bias * gain.view().astype(np.float64).reshape(bias.shape)

    def scaling(self, modules: Sequence[Module], fold_scale: bool) -> Scaling:
        inner = sorted(module.name for module in modules if module.weight.side == "in")
        conv1d = any(module.place.torch_name.fan_in_fan_out for module in modules)
        config = PeftConfig(
            peft_type=self.peft_type, feedforward_modules=inner, fan_in_fan_out=conv1d
        )
        return Scaling(config)
