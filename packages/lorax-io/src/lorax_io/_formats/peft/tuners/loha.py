"""LoHa: `hada_w1_a`, `hada_w1_b`, `hada_w2_a`, `hada_w2_b`, where windows are flat."""

from typing import Any

from lorax import Adapter, LohaWeight

from ...._errors import AdapterFileError
from ...._places import RANK, Factor, Place
from ..config import PeftConfig
from .tuner import Shapes, Sides, Tuner, check_flat

_SECOND = RANK - 1  # the rank of the second product


class Loha(Tuner):
    """The elementwise product of two products."""

    peft_type = "LOHA"
    called = "LoHa"
    marks = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    renamed = {"alpha": "lora_alpha"}
    harmless = ("rank_dropout", "module_dropout", "use_effective_conv2d", "init_weights")
    folded = "b1"

    def writes(self, weight: Any) -> bool:
        return isinstance(weight, LohaWeight)

    def blank(self, place: Place, config: PeftConfig, module: str, shapes: Shapes) -> Adapter:
        shared, inputs, outputs = place.axes
        rank, alpha = config.rank(module), config.alpha(module)
        return LohaWeight(None, None, None, None, rank, alpha, inputs, outputs, shared)

    def factors(self, place: Place, weight: Any) -> tuple[Factor, ...]:
        check_flat(place, self.called)
        flat = tuple(axis for group in place.inputs for axis in group)
        return (
            Factor("hada_w1_a", "b1", (place.outputs, (RANK,))),
            Factor("hada_w1_b", "a1", ((RANK,), flat)),
            Factor("hada_w2_a", "b2", (place.outputs, (_SECOND,))),
            Factor("hada_w2_b", "a2", ((_SECOND,), flat)),
        )

    def sides(self, shapes: Shapes, config: PeftConfig, module: str) -> Sides:
        first, second = shapes.get("hada_w1_a", ()), shapes.get("hada_w1_b", ())
        if len(first) != 2 or len(second) != 2:
            raise AdapterFileError(
                f"has no `hada_w1_a` and `hada_w1_b` of two axes for `{module}`, but {first} and "
                f"{second}."
            )
        return Sides(first[0], (second[1],))
