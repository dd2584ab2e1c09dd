"""MiSS: `miss_block`, one row for all inputs with the same index modulo the rank."""

from collections.abc import Sequence
from typing import Any

from lorax import Adapter, MissWeight

from ...._errors import AdapterFileError, UnsupportedAdapterError
from ...._places import RANK, Factor, Place
from ..config import PeftConfig
from .tuner import Module, Scaling, Shapes, Sides, Tuner, check_linear, the_one


class Miss(Tuner):
    """One matrix, [rank, out], whose rows inputs share by their index modulo the rank."""

    peft_type = "MISS"
    called = "MiSS"
    marks = ("miss_block",)
    fields = ("r", "bias")
    defaults = {"r": 64}
    harmless = ("miss_dropout", "mini_r")
    init = "init_weights"
    only_bias = "MiSS_only"
    tells_shape = False

    def check_start(self, value: Any) -> None:
        if isinstance(value, str):
            raise UnsupportedAdapterError(
                f"has init_weights = {value!r:.80}, which is another form of MiSS: its block is "
                "multiplied with the base (bat) or repeated along the outputs (mini). Merge it in "
                "PEFT (`merge_and_unload`)."
            )

    def writes(self, weight: Any) -> bool:
        return isinstance(weight, MissWeight)

    def blank(self, place: Place, config: PeftConfig, module: str, shapes: Shapes) -> Adapter:
        self._check(place, config.r)
        shared, inputs, outputs = place.axes
        return MissWeight(None, config.r, inputs, outputs, shared)

    def factors(self, place: Place, weight: Any) -> tuple[Factor, ...]:
        self._check(place, weight.rank)
        return (Factor("miss_block", "d", ((RANK,), place.outputs)),)

    def _check(self, place: Place, rank: int) -> None:
        """Rejects input axes for which the rows differ: PEFT counts over the flattened inputs.

        `lorax` counts along the last input axis, which is the same if the rank divides it.
        """
        check_linear(place, self.called)
        *outer, last = place.axes.inputs
        if outer and place.sizes[last] < rank:
            raise UnsupportedAdapterError(
                f"is MiSS of {rank} rows on several input axes of `{place.path}`, and does not say "
                "how large these are. Give the whole pair, `lorax.Pair(frozen, tunable)`, or "
                "`params=`."
            )
        if outer and place.sizes[last] % rank:
            raise UnsupportedAdapterError(
                f"is MiSS of {rank} rows, which do not divide the last input axis of "
                f"`{place.path}`, of size {place.sizes[last]}. Give it one input axis in `names`."
            )

    def sides(self, shapes: Shapes, config: PeftConfig, module: str) -> Sides:
        shape = shapes.get("miss_block", ())
        if len(shape) != 2:
            raise AdapterFileError(f"has `miss_block` of `{module}` of shape {shape}.")
        return Sides(shape[1], (shape[0],))

    def scaling(self, modules: Sequence[Module], fold_scale: bool) -> Scaling:
        rank = the_one(modules, self.called, "rank", lambda weight: weight.rank)
        return Scaling(PeftConfig(peft_type=self.peft_type, r=rank))
