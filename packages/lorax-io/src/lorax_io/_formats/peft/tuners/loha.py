"""LoHa: `hada_w1_a`, `hada_w1_b`, `hada_w2_a`, `hada_w2_b`, with windows flattened.

With Tucker cores, `hada_t1` and `hada_t2`, the window is in the cores, and the four matrices have
the rank as their first axis.
"""

from collections.abc import Sequence
from typing import Any

from lorax import Adapter, LohaWeight

from ...._errors import AdapterFileError
from ...._places import RANK, Factor, Place
from ..config import PeftConfig
from .cores import check_window, core_groups, with_cores
from .tuner import Module, Shapes, Sides, Tuner, check_flat

_FIRST, _SECOND = (RANK, RANK - 2), (RANK - 1, RANK - 3)  # the ranks of a product: in, out


class Loha(Tuner):
    """The elementwise product of two products."""

    peft_type = "LOHA"
    called = "LoHa"
    marks = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")
    renamed = {"alpha": "lora_alpha"}
    fields = (*Tuner.fields, "use_effective_conv2d")
    harmless = ("rank_dropout", "module_dropout", "init_weights")
    folded = "b1"

    def writes(self, weight: Any) -> bool:
        return isinstance(weight, LohaWeight)

    def blank(self, place: Place, config: PeftConfig, module: str, shapes: Shapes) -> Adapter:
        shared, inputs, outputs = place.axes
        rank, alpha = config.rank(module), config.alpha(module)
        channels = None
        if "hada_t1" in shapes:
            check_window(place, module, "hada_t1")
            channels = place.inputs[0][0]
        return LohaWeight(*[None] * 6, rank, alpha, channels, inputs, outputs, shared)

    def factors(self, place: Place, weight: Any) -> tuple[Factor, ...]:
        check_flat(place, self.called)
        if weight.channel_axis is not None:
            return tuple(
                factor
                for k, (left, right) in enumerate((_FIRST, _SECOND), 1)
                for factor in (
                    Factor(f"hada_t{k}", f"core{k}", core_groups(place, weight, left, right)),
                    Factor(f"hada_w{k}_a", f"b{k}", ((right,), place.outputs)),
                    Factor(f"hada_w{k}_b", f"a{k}", ((left,), place.inputs[0])),
                )
            )
        flat = tuple(axis for group in place.inputs for axis in group)
        return tuple(
            factor
            for k, (rank, _) in enumerate((_FIRST, _SECOND), 1)
            for factor in (
                Factor(f"hada_w{k}_a", f"b{k}", (place.outputs, (rank,))),
                Factor(f"hada_w{k}_b", f"a{k}", ((rank,), flat)),
            )
        )

    def in_peft(self, config: PeftConfig, modules: Sequence[Module]) -> PeftConfig:
        cores = {module.name: module.weight.channel_axis is not None for module in modules}
        return with_cores(config, self.called, modules, cores)

    def sides(self, shapes: Shapes, config: PeftConfig, module: str) -> Sides:
        first, second = shapes.get("hada_w1_a", ()), shapes.get("hada_w1_b", ())
        if len(first) != 2 or len(second) != 2:
            raise AdapterFileError(
                f"has no `hada_w1_a` and `hada_w1_b` of two axes for `{module}`, but {first} and "
                f"{second}."
            )
        if core := shapes.get("hada_t1", ()):
            return Sides(first[1], (second[1], *core[2:]))
        return Sides(first[0], (second[1],))
