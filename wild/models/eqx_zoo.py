"""Language models on Equinox, in Hugging Face's architecture."""

from typing import Any

from eqx_zoo.models.causal_lm import CausalLM, Config

from ..catalog import Subject, model
from ..frameworks import KEY, equinox, tokens


def language(**options: Any) -> Subject:
    sizes = {"vocab_size": 17, "hidden_size": 12, "intermediate_size": 22, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6}
    rest = {"rms_norm_eps": 1e-5, "rope_theta": 1e4, "rope_scaling": None}
    config = Config(**sizes, **heads, **rest, **options)
    return equinox(CausalLM(config, key=KEY), lambda module, ids: module(ids)[0], tokens(17, 7))


@model("Qwen 3, tied embedding")
def qwen() -> Subject:
    kind = {"architecture": "Qwen3ForCausalLM", "qk_norm": True, "attention_bias": False}
    return language(**kind, tie_word_embeddings=True)


@model("Qwen 3, mixture of experts")
def experts() -> Subject:
    kind = {"architecture": "Qwen3MoeForCausalLM", "qk_norm": True, "attention_bias": False}
    routed = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 10}
    return language(**kind, **routed, moe_layers=(0, 1), tie_word_embeddings=False)
