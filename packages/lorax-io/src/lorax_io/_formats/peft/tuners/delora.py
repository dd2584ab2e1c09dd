"""DeLoRA: `delora_A`, `delora_B`, `delora_lambda`, and the base's norms, `delora_w_norm`."""

from collections.abc import Sequence
from typing import Any

from lorax import Adapter, DeloraWeight

from ...._errors import AdapterFileError
from ...._places import RANK, Factor, Place
from ..config import PeftConfig
from .tuner import Module, Scaling, Shapes, Sides, Tuner, check_linear, most_frequent, pattern


class Delora(Tuner):
    """Two normalized factors, and the length of their product."""

    peft_type = "DELORA"
    called = "DeLoRA"
    marks = ("delora_A", "delora_B", "delora_lambda", "delora_w_norm")
    fields = ("r", "rank_pattern", "bias")
    harmless = ("delora_lambda", "lambda_pattern", "module_dropout", "init_weights")
    init = "init_weights"
    only_bias = "delora_only"

    def writes(self, weight: Any) -> bool:
        return isinstance(weight, DeloraWeight)

    def blank(self, place: Place, config: PeftConfig, module: str, shapes: Shapes) -> Adapter:
        check_linear(place, self.called)
        shared, inputs, outputs = place.axes
        return DeloraWeight(None, None, None, config.rank(module), inputs, outputs, shared)

    def factors(self, place: Place, weight: Any) -> tuple[Factor, ...]:
        check_linear(place, self.called)
        return (
            Factor("delora_A", "a", ((RANK,), *place.inputs)),
            Factor("delora_B", "b", (place.outputs, (RANK,))),
            Factor("delora_lambda", "length", ((),)),
            Factor("delora_w_norm", "norm", place.inputs),
        )

    def sides(self, shapes: Shapes, config: PeftConfig, module: str) -> Sides:
        a, b = shapes.get("delora_A", ()), shapes.get("delora_B", ())
        if len(a) != 2 or len(b) != 2:
            raise AdapterFileError(f"has `delora_A` and `delora_B` of `{module}` of {a} and {b}.")
        return Sides(b[0], a[1:])

    def scaling(self, modules: Sequence[Module], fold_scale: bool) -> Scaling:
        ranks = {module.name: module.weight.rank for module in modules}
        r = most_frequent(ranks)
        return Scaling(PeftConfig(peft_type=self.peft_type, r=r, rank_pattern=pattern(ranks, r)))
