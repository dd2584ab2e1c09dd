"""Tiny configs of transformers' model types, made from the config classes."""

import inspect
from typing import Any

import transformers

# Values for the attributes that a config has.
TINY: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "embed_dim", "hidden_dim"), 48),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers"), 2),
    **dict.fromkeys(("encoder_layers", "decoder_layers", "num_decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "encoder_ffn_dim"), 80),
    **dict.fromkeys(("decoder_ffn_dim", "ffn_hidden_size", "mlp_dim"), 80),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), 64),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk", "top_k_experts"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 40),
    **{"vocab_size": 199, "head_dim": 12, "d_kv": 12, "n_group": 1, "topk_group": 1},
    **{"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8},
    **{"v_head_dim": 12, "state_size": 4, "first_k_dense_replace": 1, "n_shared_experts": 1},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1},
    **{"image_size": 32, "patch_size": 8, "num_channels": 3, "type_vocab_size": 2},
    **{"num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 64},
    **{"conv_dim": (8, 8), "conv_kernel": (3, 3), "conv_stride": (2, 2)},
    **{
        "num_conv_pos_embeddings": 4,
        "num_conv_pos_embedding_groups": 2,
        "num_codevectors_per_group": 6,
    },
    **{"hidden_sizes": [24, 40], "depths": [1, 1], "embedding_size": 24, "projection_dim": 24},
}

_MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 24, "mamba_expand": 2}
_ROTARY = {"rotary_dim": 8, "n_ctx": 64}
_SAME_HEADS = {"head_dim": 12, "num_key_value_heads": 4}

# Additional values that the config of a type requires.
OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": _MAMBA,
    "codegen": _ROTARY,
    "falcon_mamba": {"conv_kernel": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 4},
    "gptj": _ROTARY,
    "granitemoehybrid": _MAMBA,
    "hunyuan_v1_dense": {"head_dim": 12},
    "hunyuan_v1_moe": {"head_dim": 12},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba": {"conv_kernel": 4},
    "mamba2": {"conv_kernel": 4, "num_heads": 4, "head_dim": 24, "n_groups": 2},
    "ministral": {"head_dim": 12},
    "deepseek_v2": {"topk_method": "greedy", "num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "esm": {"vocab_size": 199, "mask_token_id": 3},
    "wav2vec2-bert": {"vocab_size": 199, "feature_projection_input_dim": 8},
    "wav2vec2-conformer": {"vocab_size": 199},
    "granite_speech5_ctc": {"context_size": 16},
}


def tiny_config(kind: str) -> Any:
    """A config of a model type with small sizes."""
    return _tiny(transformers.CONFIG_MAPPING[kind], kind)


def _tiny(cls: Any, kind: str) -> Any:
    base = cls()
    options = {name: value for name, value in TINY.items() if _takes(base, name)}
    for name in getattr(cls, "sub_configs", {}):
        part = getattr(base, name, None)
        if isinstance(part, transformers.PretrainedConfig):
            options[name] = _tiny(type(part), part.model_type).to_dict()
    if "kv_lora_rank" in options:
        # Latent attention has one key head for each query head, and derives the head size.
        options.pop("head_dim", None)
        options["num_key_value_heads"] = options["num_attention_heads"]
    for name in ("layer_types", "layers_block_type", "mlp_layer_types"):
        if isinstance(getattr(base, name, None), list) and name in _parameters(cls):
            options[name] = None
    return cls(**{**options, **OVERRIDES.get(kind, {})})


def _takes(config: Any, name: str) -> bool:
    """Whether a config has an attribute that can be set."""
    if isinstance(getattr(type(config), name, None), property):
        return False
    try:
        value = getattr(config, name, None)
    except Exception:
        return False  # an attribute that differs between layers
    if value is None or callable(value):
        return False
    return isinstance(value, list | tuple) == isinstance(TINY[name], list | tuple)


def _parameters(cls: Any) -> set[str]:
    return set(inspect.signature(cls).parameters)
