"""The modules that PEFT adapts by default for each model type, as of PEFT 0.21.

Targets are ends of names, or a regular expression for the whole name. Model types that are not in
transformers are left out.
"""

_Q_V = ("q_proj", "v_proj")
_QUERY_VALUE = ("query", "value")
_FUSED = ("query_key_value",)

DEFAULT_TARGETS: dict[str, tuple[str, ...] | str] = {
    "bart": _Q_V,
    "bert": _QUERY_VALUE,
    "blip-2": ("q", "v", "q_proj", "v_proj"),
    "bloom": _FUSED,
    "chatglm": _FUSED,
    "codegen": ("qkv_proj",),
    "deberta": ("in_proj",),
    "deberta-v2": ("query_proj", "value_proj"),
    "electra": _QUERY_VALUE,
    "falcon": _FUSED,
    "gemma": _Q_V,
    "gemma2": _Q_V,
    "gemma3_text": _Q_V,
    "gemma4": r".*language_model\..*\.(q_proj|v_proj)",
    "gpt2": ("c_attn",),
    "gpt_bigcode": ("c_attn",),
    "gpt_neo": _Q_V,
    "gpt_neox": _FUSED,
    "gptj": _Q_V,
    "layoutlm": _QUERY_VALUE,
    "llama": _Q_V,
    "llama4": _Q_V,
    "mistral": _Q_V,
    "mixtral": _Q_V,
    "mpt": ("Wqkv",),
    "mt5": ("q", "v"),
    "nemotron_h": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "opt": _Q_V,
    "phi": ("q_proj", "v_proj", "fc1", "fc2"),
    "qwen2": _Q_V,
    "qwen3": _Q_V,
    "roberta": _QUERY_VALUE,
    "rwkv": ("key", "value", "receptance", "output"),
    "stablelm": _Q_V,
    "t5": ("q", "v"),
    "xlm-roberta": _QUERY_VALUE,
}
