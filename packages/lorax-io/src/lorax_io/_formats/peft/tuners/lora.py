"""LoRA, DoRA, BD-LoRA and trained rows: `lora_A`, `lora_B`, `lora_magnitude_vector` and others."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np

from lorax import (
    Adapter,
    BdloraWeight,
    DoraWeight,
    LoconWeight,
    LoraFAWeight,
    LoraWeight,
    TokensWeight,
)

from ...._errors import AdapterFileError, UnsupportedAdapterError
from ...._places import RANK, Array, Factor, Place
from ...._torch_names import MAGNITUDE, Conv, Embedding
from ..config import PeftConfig
from ..patterns import suffixes
from . import bdlora
from .tokens import MARK, row_factors, rows_of_table
from .tuner import Module, Scaling, Shapes, Sides, Tuner, alpha_of, most_frequent, pattern

MID = "lora_mid.weight"  # a Tucker core; only LyCORIS has it, PEFT does not
_ROWS = f"token_adapter.{MARK}"
BIAS = "lora_B.bias"
_PLAIN_INITS = (True, False, "gaussian", "eva", "orthogonal", "mica", "lora_ga")


_RANK = RANK - 1  # the rank on the output side of a core


class Lora(Tuner):
    """LoRA; or DoRA or BD-LoRA, if set in the config."""

    peft_type = "LORA"
    called = "LoRA"
    marks = (
        *("lora_A.weight", "lora_B.weight", "lora_embedding_A", "lora_embedding_B", MAGNITUDE),
        *(_ROWS, BIAS, MID),
    )
    tables = ("lora_embedding_A", "lora_embedding_B", _ROWS)
    fields = (
        *(*Tuner.fields, "use_rslora", "use_dora", "target_parameters", "bias", "lora_dropout"),
        *("use_bdlora", "trainable_token_indices", "lora_bias"),
    )
    lacking = ()
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
    beyond = {
        "layer_replication": "repeats layers of its base",
        "alora_invocation_tokens": "is an activated LoRA, which adapts some tokens only",
        "use_qalora": "is QA-LoRA",
        "kasa_config": "is KaSA",
        "monteclora_config": "is MonteCLoRA",
        "velora_config": "is VeLoRA",
        "arrow_config": "routes between adapters",
        "megatron_config": "is for Megatron's layers",
        "ensure_weight_tying": "ties the factors of embedding and head",
        "enable_lora": "adapts parts of fused projections, as PEFT 0.2 does",
    }
    init = "init_lora_weights"
    folded = "b"

    def writes(self, weight: Any) -> bool:
        plain = weight.delta if isinstance(weight, DoraWeight) else weight
        return isinstance(plain, LoraWeight | LoraFAWeight | BdloraWeight | LoconWeight)

    def check_start(self, value: Any) -> None:
        if value and value not in _PLAIN_INITS:
            raise UnsupportedAdapterError(
                f"has init_lora_weights = {value!r:.80}, which also changes the base weights. "
                "Save it in PEFT with `path_initial_model_for_weight_conversion`, which makes it "
                "plain LoRA.",
            )

    def mixes(self, kinds: Collection[str]) -> bool:
        rest = {*kinds} - {"tokens"}
        return rest == {"dora"} or rest <= {"lora", "lora_fa", "bdlora", "locon"}

    def keys(self, place: Place, config: PeftConfig) -> tuple[str, ...]:
        keys = tuple(factor.key for factor in _factors(place, bool(config.use_dora)))
        if isinstance(place.torch_name, Conv) and not config.is_given:
            keys = (*keys, MID)
        return (*keys, _ROWS) if config.trainable_token_indices else keys

    def targets(self, config: PeftConfig, place: Place, module: str) -> bool | None:
        if isinstance(place.torch_name, Embedding) and isinstance(
            config.trainable_token_indices, dict
        ):
            return config.tokens(module) is not None or super().targets(config, place, module)
        if isinstance(place.torch_name, Embedding) and config.trainable_token_indices:
            return None  # the model's own embedding, whichever that is
        return super().targets(config, place, module)

    def blank(self, place: Place, config: PeftConfig, module: str, shapes: Shapes) -> Adapter:
        if _ROWS in shapes:
            if more := sorted(shapes.keys() - {_ROWS}):
                raise UnsupportedAdapterError(
                    f"has both rows of `{module}` and `{more[0]}` for it; one of both is read."
                )
            return rows_of_table(place, config.tokens(module) or (), shapes[_ROWS])
        if side := bdlora.blocked_side(config, module):
            return bdlora.blank(place, config, module, side)
        name, (shared, inputs, outputs) = place.pattern_name(module), place.axes
        scaling = "rslora" if config.use_rslora else "standard"
        rank, alpha = config.rank(name), config.alpha(name)
        if MID in shapes and MAGNITUDE in shapes:
            raise UnsupportedAdapterError(
                f"is DoRA with a Tucker core for `{module}`, whose norm would need an array as "
                "large as the weight. Merge it with LyCORIS."
            )
        if MID in shapes:
            axes = (place.inputs[0][0], inputs, outputs, shared)
            return LoconWeight(None, None, None, rank, alpha, *axes)
        plain = LoraWeight(None, None, rank, alpha, scaling, inputs, outputs, shared)
        if not config.use_dora:
            return plain
        if not place.magnitude:
            raise UnsupportedAdapterError(
                f"is DoRA, which PEFT does not have for `{place.path}`, which is "
                f"{type(place.torch_name).__name__}."
            )
        return DoraWeight(plain, None)

    def factors(self, place: Place, weight: Any) -> tuple[Factor, ...]:
        if isinstance(weight, TokensWeight):
            return row_factors(place, _ROWS)
        if isinstance(weight, BdloraWeight):
            return bdlora.factors(place, weight)
        if isinstance(weight, LoconWeight):
            return _with_core(place, weight)
        factors = _factors(place, isinstance(weight, DoraWeight))
        if len(factors) < len(weight.factors()):
            raise UnsupportedAdapterError(
                f"`{place.path}` has DoRA, which PEFT does not have for "
                f"{type(place.torch_name).__name__}. Use `save_adapter` or `save_merged`."
            )
        return factors

    def check_keys(self, keys: Collection[str], config: PeftConfig) -> None:
        ends = [f".{mark}" for mark in ("lora_B.weight", BIAS, _ROWS)]
        adapted, biased, tables = (
            {key.removesuffix(end) for key in keys if key.endswith(end)} for end in ends
        )
        if config.lora_bias and (lacking := sorted(adapted - biased)):
            raise AdapterFileError(
                f"lacks `{lacking[0]}.{BIAS}`, a bias in the factors, which `lora_bias` of its "
                "config says that it has."
            )
        indices = config.trainable_token_indices
        named = {end for table in tables for end in suffixes(table)}
        lacking = sorted({*indices} - named) if isinstance(indices, Mapping) else []
        if indices and (lacking or not tables):
            table = lacking[0] if lacking else "the embedding"
            raise AdapterFileError(
                f"lacks the rows of `{table}`, which `trainable_token_indices` of its config says "
                "that it has."
            )

    def separately_listed(self, modules: Sequence[Module]) -> list[Module]:
        return [module for module in modules if isinstance(module.weight, TokensWeight)]

    def bias(
        self, tensors: Mapping[str, Any], config: PeftConfig, module: str
    ) -> Callable[[Array], Array] | None:
        """The base's bias plus that of `lora_B`, which PEFT multiplies by the scale."""
        more = tensors.get(f"{module}.{BIAS}")
        if more is None:
            return None
        scale = config.scale(module)
        return lambda bias: bias + scale * more.view().astype(np.float64).reshape(bias.shape)

    def needs_base(self, config: PeftConfig) -> str | None:
        biases = "its factors have biases, which add to those of the base"
        return biases if config.lora_bias else None

    def sides(self, shapes: Shapes, config: PeftConfig, module: str) -> Sides:
        if rows := shapes.get(_ROWS):
            return Sides(rows[-1], (1 + max(config.tokens(module) or [0]),))
        if side := bdlora.blocked_side(config, module):
            return Sides(*bdlora.sides(shapes, config, side))
        for first, second in (("lora_A.weight", "lora_B.weight"), self.marks[2:4]):
            if first in shapes or second in shapes:
                a, b = shapes.get(first, ()), shapes.get(second, ())
                if not (2 <= len(a) <= 5 and len(a) == len(b)):
                    raise AdapterFileError(
                        f"has no two factors of `{module}` that fit each other: their shapes are "
                        f"{a} and {b}. A factor has 2 axes, or 3 to 5 of a convolution."
                    )
                window = shapes[MID][2:] if MID in shapes else a[2:]
                return Sides(b[0], (a[1], *window))
        raise AdapterFileError(f"lacks the factors of `{module}`, but has its other tensors.")

    def scaling(self, modules: Sequence[Module], fold_scale: bool) -> Scaling:
        tables = {module.name: module.weight for module in self.separately_listed(modules)}
        modules = [module for module in modules if module.name not in tables]
        plain: dict[str, Any] = {}
        for name, _, weight in modules:
            plain[name] = weight.delta if isinstance(weight, DoraWeight) else weight
        ranks = {name: weight.rank for name, weight in plain.items()}
        r = most_frequent(ranks)
        original_scaling: dict[str, dict[str, Any]] = {}
        rslora = False
        alphas: dict[str, Any] = dict.fromkeys(ranks, r)
        if not fold_scale:
            forms = {name: getattr(x, "scaling", "standard") for name, x in plain.items()}
            rslora = {forms[name] for name, x in plain.items() if x.alpha is not None} == {"rslora"}
            form = "rslora" if rslora else "standard"
            for name, weight in plain.items():
                alphas[name] = alpha_of(weight, rslora)
                if (weight.alpha, forms[name]) != (alphas[name], form):
                    original_scaling[name] = {"alpha": weight.alpha, "scaling": forms[name]}
        alpha = most_frequent(alphas)
        config = PeftConfig(
            r=r,
            lora_alpha=alpha,
            use_rslora=rslora,
            rank_pattern=pattern(ranks, r),
            alpha_pattern=pattern(alphas, alpha),
            fan_in_fan_out=any(module.place.torch_name.fan_in_fan_out for module in modules),
            use_dora=any(isinstance(module.weight, DoraWeight) for module in modules),
            use_bdlora=bdlora.settings(modules),
            trainable_token_indices={n: list(x.indices) for n, x in tables.items()} or None,
        )
        return Scaling(config, original_scaling)


def _with_core(place: Place, weight: LoconWeight) -> tuple[Factor, ...]:
    """A Tucker core between two 1×1 convolutions; the core has the window."""
    if not isinstance(place.torch_name, Conv) or place.inputs[0] != (weight.channel_axis,):
        raise UnsupportedAdapterError(
            f"`{place.path}` has a core between its factors, which is for convolutions, and over "
            "the axis of their channels."
        )
    channel, *window = place.inputs
    none = tuple(() for _ in window)
    return (
        Factor("lora_A.weight", "a", ((RANK,), channel, *none)),
        Factor(MID, "core", ((_RANK,), (RANK,), *window)),
        Factor("lora_B.weight", "b", (place.outputs, (_RANK,), *none)),
    )


def _factors(place: Place, dora: bool) -> tuple[Factor, ...]:
    return place.factors + (place.magnitude if dora else ())
