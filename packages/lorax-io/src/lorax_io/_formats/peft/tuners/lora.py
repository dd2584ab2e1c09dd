"""LoRA, rsLoRA and DoRA: `lora_A`, `lora_B`, `lora_magnitude_vector`."""

from collections.abc import Sequence
from typing import Any

from lorax import Adapter, DoraWeight, LoraWeight

from ...._errors import AdapterFileError, UnsupportedAdapterError
from ...._layouts import MAGNITUDE
from ...._places import Factor, Place
from ..config import PeftConfig
from .tuner import Module, Scaling, Shapes, Sides, Tuner, alpha_of, most_frequent, pattern


class Lora(Tuner):
    """LoRA, and DoRA where the config says so."""

    peft_type = "LORA"
    called = "LoRA"
    marks = ("lora_A.weight", "lora_B.weight", "lora_embedding_A", "lora_embedding_B", MAGNITUDE)
    fields = (*Tuner.fields, "use_rslora", "use_dora", "target_parameters", "bias", "lora_dropout")
    harmless = (
        "init_lora_weights",
        "eva_config",
        "corda_config",
        "lora_ga_config",
        "loftq_config",
        "qalora_group_size",
        "megatron_core",
        "merge_weights",
    )
    folded = "b"

    def writes(self, weight: Any) -> bool:
        plain = weight.delta if isinstance(weight, DoraWeight) else weight
        return isinstance(plain, LoraWeight)

    def keys(self, place: Place, config: PeftConfig) -> tuple[str, ...]:
        return tuple(factor.key for factor in _factors(place, bool(config.use_dora)))

    def blank(self, place: Place, config: PeftConfig, module: str, shapes: Shapes) -> Adapter:
        name, (shared, inputs, outputs) = place.pattern_name(module), place.axes
        scaling = "rslora" if config.use_rslora else "standard"
        rank, alpha = config.rank(name), config.alpha(name)
        plain = LoraWeight(None, None, rank, alpha, scaling, inputs, outputs, shared)
        if not config.use_dora:
            return plain
        if not place.magnitude:
            raise UnsupportedAdapterError(
                f"is DoRA, which PEFT does not have for `{place.path}` with a layout "
                f"{type(place.layout).__name__}."
            )
        return DoraWeight(plain, None)

    def factors(self, place: Place, weight: Any) -> tuple[Factor, ...]:
        found = _factors(place, isinstance(weight, DoraWeight))
        if len(found) < len(weight.factors()):
            raise UnsupportedAdapterError(
                f"`{place.path}` has DoRA, which PEFT does not have for a layout "
                f"{type(place.layout).__name__}. Use `save_adapter` or `save_merged`."
            )
        return found

    def sides(self, shapes: Shapes, config: PeftConfig, module: str) -> Sides:
        for first, second in (("lora_A.weight", "lora_B.weight"), self.marks[2:4]):
            if first in shapes or second in shapes:
                a, b = shapes.get(first, ()), shapes.get(second, ())
                if not (2 <= len(a) <= 5 and len(a) == len(b)):
                    raise AdapterFileError(
                        f"has no two factors of `{module}` that fit each other: their shapes are "
                        f"{a} and {b}. A factor has 2 axes, or 3 to 5 of a convolution."
                    )
                return Sides(b[0], a[1:])
        raise AdapterFileError(f"lacks the factors of `{module}`, beside its other tensors.")

    def scaling(self, modules: Sequence[Module], fold_scale: bool) -> Scaling:
        plain: dict[str, Any] = {}
        for name, _, weight in modules:
            plain[name] = weight.delta if isinstance(weight, DoraWeight) else weight
        ranks = {name: weight.rank for name, weight in plain.items()}
        r = most_frequent(ranks)
        unsaid: dict[str, dict[str, Any]] = {}
        rslora = False
        alphas: dict[str, Any] = dict.fromkeys(ranks, r)
        if not fold_scale:
            scalings = {x.scaling for x in plain.values() if x.alpha is not None}
            rslora = scalings == {"rslora"}
            said = "rslora" if rslora else "standard"
            for name, weight in plain.items():
                alphas[name] = alpha_of(weight, rslora)
                if (weight.alpha, weight.scaling) != (alphas[name], said):
                    unsaid[name] = {"alpha": weight.alpha, "scaling": weight.scaling}
        alpha = most_frequent(alphas)
        config = PeftConfig(
            r=r,
            lora_alpha=alpha,
            use_rslora=rslora,
            rank_pattern=pattern(ranks, r),
            alpha_pattern=pattern(alphas, alpha),
            fan_in_fan_out=any(module.place.layout.fan_in_fan_out for module in modules),
            use_dora=any(isinstance(module.weight, DoraWeight) for module in modules),
        )
        return Scaling(config, unsaid)


def _factors(place: Place, dora: bool) -> tuple[Factor, ...]:
    return place.factors + (place.magnitude if dora else ())
