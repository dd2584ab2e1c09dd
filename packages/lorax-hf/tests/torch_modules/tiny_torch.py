"""Tiny transformers 5 models and custom ones, with inputs."""

from typing import Any

import numpy as np
import torch
import transformers
from torch import nn

IDS = np.array([[3, 5, 7, 11, 13, 17, 2], [19, 23, 29, 31, 37, 41, 2]])

_SIZES: dict[str, Any] = {
    **{"vocab_size": 199, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "head_dim": 12, "intermediate_size": 80},
    **{"max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}
_EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2}
CAUSAL: dict[str, dict[str, Any]] = {
    "llama": _SIZES,
    "qwen3": {**_SIZES, "tie_word_embeddings": True},
    "gpt2": {"n_embd": 48, "n_layer": 2, "n_head": 4, "vocab_size": 199, "n_positions": 64},
    "mixtral": {**_SIZES, **_EXPERTS},
    "gpt_oss": {**_SIZES, **_EXPERTS, "layer_types": ["full_attention"] * 2},
}


def causal(kind: str, seed: int = 0, **changes: Any) -> Any:
    """A causal model of a type, with random weights, in evaluation mode."""
    torch.manual_seed(seed)
    options = {**CAUSAL[kind], "bos_token_id": 1, "eos_token_id": 2, **changes}
    config = transformers.CONFIG_MAPPING[kind](**options)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def randomized(module: nn.Module, seed: int = 0) -> nn.Module:
    """A module with random values in every parameter and floating-point buffer."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in [*module.parameters(), *module.buffers()]:
            if tensor.is_floating_point():
                tensor.copy_(0.3 * torch.rand(tensor.shape, generator=generator) + 0.1)
    return module.eval()


def randomized_causal(kind: str, **changes: Any) -> Any:
    """A causal model with larger weights than the initial ones, so that its tokens differ."""
    model = causal(kind, **changes)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model
