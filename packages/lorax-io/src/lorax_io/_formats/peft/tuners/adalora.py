"""AdaLoRA: `lora_A`, `lora_B` and `lora_E`, which has a weight for each rank."""

from collections.abc import Sequence
from typing import Any

from lorax import AdaloraWeight, Adapter

from ...._errors import AdapterFileError, UnsupportedAdapterError
from ...._places import RANK, Factor, Place
from ..config import PeftConfig
from .lora import Lora
from .tuner import Module, Scaling, Shapes, Sides, Tuner, check_flat, most_frequent

# PEFT's scale is alpha / (initial rank + 1e-5), even after ranks were pruned.
_MORE = 1e-5


class Adalora(Tuner):
    """Two factors, and a weight for each rank between them."""

    peft_type = "ADALORA"
    called = "AdaLoRA"
    marks = ("lora_A", "lora_B", "lora_E")
    renamed = {"init_r": "r"}
    fields = ("r", "lora_alpha", "bias", "lora_dropout")
    harmless = (
        *("r", "target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight"),
        *("total_step", "rank_pattern", "alpha_pattern", "init_lora_weights", "loftq_config"),
        *("eva_config", "corda_config", "lora_ga_config", "megatron_core", "qalora_group_size"),
        *("use_rslora", "use_dora", "target_parameters"),
    )

    beyond = {
        **Lora.beyond,
        "lora_bias": "has a bias in its factors",
        "use_bdlora": "has factors of blocks",
        "trainable_token_indices": "replaces rows of the embedding",
    }
    init = Lora.init

    def written(self, config: PeftConfig) -> dict[str, Any]:
        # PEFT rejects a config without `total_step`, or with `target_r` above the initial rank.
        return {"target_r": config.r, "total_step": 1, "rank_pattern": None}

    def check_start(self, value: Any) -> None:
        Lora().check_start(value)

    def writes(self, weight: Any) -> bool:
        return isinstance(weight, AdaloraWeight)

    def blank(self, place: Place, config: PeftConfig, module: str, shapes: Shapes) -> Adapter:
        # Pruned ranks are not in the file, so the rank comes from `lora_E`: [rank, 1].
        shape = shapes.get("lora_E", ())
        if len(shape) != 2:
            raise AdapterFileError(f"has `lora_E` of `{module}` of shape {shape}, not (rank, 1).")
        alpha = config.lora_alpha * shape[0] / (config.r + _MORE)
        shared, inputs, outputs = place.axes
        return AdaloraWeight(None, None, None, shape[0], alpha, inputs, outputs, shared)

    def factors(self, place: Place, weight: Any) -> tuple[Factor, ...]:
        check_flat(place, self.called)
        if len(place.inputs) > 1 or "embedding" in place.factors[0].key:
            raise UnsupportedAdapterError(
                f"`{place.path}` has AdaLoRA, which PEFT has for linear layers alone."
            )
        return (
            Factor("lora_A", "a", ((RANK,), *place.inputs)),
            Factor("lora_B", "b", (place.outputs, (RANK,))),
            Factor("lora_E", "e", ((RANK,), ())),
        )

    def sides(self, shapes: Shapes, config: PeftConfig, module: str) -> Sides:
        a, b = shapes.get("lora_A", ()), shapes.get("lora_B", ())
        if len(a) != 2 or len(b) != 2:
            raise AdapterFileError(f"has `lora_A` and `lora_B` of `{module}` of {a} and {b}.")
        return Sides(b[0], a[1:])

    def scaling(self, modules: Sequence[Module], fold_scale: bool) -> Scaling:
        ranks = {module.name: module.weight.rank for module in modules}
        scales = {module.name: module.weight.scale for module in modules}
        if len(set(ranks.values())) > 1 or len(set(scales.values())) > 1 or fold_scale:
            raise UnsupportedAdapterError(
                "is AdaLoRA of several ranks or scales, or with its scale folded in, for which "
                "PEFT has no key. Use `save_adapter` or `save_merged`."
            )
        r, scale = most_frequent(ranks), most_frequent(scales)
        return Scaling(PeftConfig(peft_type=self.peft_type, r=r, lora_alpha=scale * (r + _MORE)))
