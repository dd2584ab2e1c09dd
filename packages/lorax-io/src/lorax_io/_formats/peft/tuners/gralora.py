"""GraLoRA: `gralora_A` and `gralora_B`, with factors for each block of inputs and outputs."""

from collections.abc import Sequence
from typing import Any

from lorax import Adapter, GraloraWeight

from ...._errors import AdapterFileError, UnsupportedAdapterError
from ...._places import RANK, Factor, Place
from ..config import PeftConfig
from .tuner import Module, Scaling, Shapes, Sides, Tuner, alpha_of, check_linear, the_one

# Inner axes of the adapter's layout: the entries within a block of each split axis, and the rank.
_PART_IN, _PART_OUT, _RANK = RANK, RANK - 1, RANK - 2


class Gralora(Tuner):
    """A grid of low-rank products, one for each block of inputs and outputs."""

    peft_type = "GRALORA"
    called = "GraLoRA"
    marks = ("gralora_A", "gralora_B")
    renamed = {"alpha": "lora_alpha"}
    fields = ("r", "lora_alpha", "gralora_k", "bias")
    lacking = ("exclude_modules",)
    defaults = {"r": 32, "lora_alpha": 64}
    harmless = ("gralora_dropout", "init_weights")
    beyond = {"hybrid_r": "has a second product in addition to its grid"}
    init = "init_weights"
    only_bias = "gralora_only"
    folded = "b"

    def writes(self, weight: Any) -> bool:
        return isinstance(weight, GraloraWeight)

    def blank(self, place: Place, config: PeftConfig, module: str, shapes: Shapes) -> Adapter:
        check_linear(place, self.called)
        shared, inputs, outputs = place.axes
        # PEFT splits the flattened side; splitting its first axis gives the same blocks.
        cut, blocks = (inputs[0], outputs[0]), config.gralora_k
        if config.r % blocks or any(place.sizes[axis] % blocks for axis in cut):
            raise AdapterFileError(
                f"is GraLoRA of {blocks} blocks, which do not divide the rank {config.r} and the "
                f"axes of `{place.path}`, of shape {place.shape}."
            )
        none = (None, None)
        return GraloraWeight(
            *none, config.r, config.lora_alpha, blocks, cut, inputs, outputs, shared
        )

    def factors(self, place: Place, weight: Any) -> tuple[Factor, ...]:
        check_linear(place, self.called)
        if weight.split_axes != (place.axes.inputs[0], place.outputs[0]):
            raise UnsupportedAdapterError(
                f"`{place.path}` cuts the axes {weight.split_axes}, and PEFT the first of each "
                "side. Use `save_adapter` or `save_merged`."
            )
        i, o = weight.split_axes
        inputs = (_PART_IN, *place.axes.inputs[1:])
        outputs = (_PART_OUT, *place.outputs[1:])
        return (
            Factor("gralora_A", "a", ((i,), inputs, (o, _RANK))),
            Factor("gralora_B", "b", ((o,), (i, _RANK), outputs)),
        )

    def sides(self, shapes: Shapes, config: PeftConfig, module: str) -> Sides:
        a, b = shapes.get("gralora_A", ()), shapes.get("gralora_B", ())
        if len(a) != 3 or len(b) != 3:
            raise AdapterFileError(f"has `gralora_A` and `gralora_B` of `{module}` of {a} and {b}.")
        return Sides(b[0] * b[2], (a[0] * a[1],))

    def scaling(self, modules: Sequence[Module], fold_scale: bool) -> Scaling:
        one = lambda label, of: the_one(modules, self.called, label, of)  # noqa: E731
        rank = one("rank", lambda weight: weight.rank)
        alpha = rank if fold_scale else one("alpha", lambda weight: alpha_of(weight, False))
        blocks = one("blocks", lambda weight: weight.blocks)
        return Scaling(
            PeftConfig(peft_type=self.peft_type, r=rank, lora_alpha=alpha, gralora_k=blocks)
        )
