"""A tiny config of any model type of transformers, from the class of its config alone."""

import inspect
from typing import Any

import transformers

# What a config is given where it has an attribute of that name.
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

# What else a type needs, where its config says so, or takes too long without.
OVERRIDES: dict[str, dict[str, Any]] = {}


def tiny_config(kind: str) -> Any:
    """The config of a type, with small sizes throughout."""
    return _tiny(transformers.CONFIG_MAPPING[kind], kind)


def _tiny(cls: Any, kind: str) -> Any:
    base = cls()
    options = {name: value for name, value in TINY.items() if _takes(base, name)}
    for name in getattr(cls, "sub_configs", {}):
        part = getattr(base, name, None)
        if isinstance(part, transformers.PretrainedConfig):
            options[name] = _tiny(type(part), part.model_type).to_dict()
    if "kv_lora_rank" in options:
        # Latent attention has a head for every query, of a size that is the sum of two others.
        options.pop("head_dim", None)
        options["num_key_value_heads"] = options["num_attention_heads"]
    for name in ("layer_types", "layers_block_type", "mlp_layer_types"):
        if getattr(base, name, None) is not None and name in inspect.signature(cls).parameters:
            options[name] = None
    return cls(**{**options, **OVERRIDES.get(kind, {})})


def _takes(config: Any, name: str) -> bool:
    value = getattr(config, name, None)
    return value is not None and not callable(value)
