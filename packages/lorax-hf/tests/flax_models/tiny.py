"""Tiny models of every Flax class of transformers, and their inputs."""

import importlib
import inspect
import pathlib
import pkgutil
from typing import Any

import jax.numpy as jnp
import numpy as np
import transformers
from transformers import models

_SIZES = {"vocab_size": 61, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
_TEXT = {**_SIZES, "intermediate_size": 24, "max_position_embeddings": 32}
_VISION = {**_SIZES, "intermediate_size": 24, "image_size": 8, "patch_size": 4}
del _VISION["vocab_size"]
_SEQ2SEQ: dict[str, Any] = {
    **{"vocab_size": 61, "d_model": 16, "max_position_embeddings": 32},
    **{f"{side}_layers": 2 for side in ("encoder", "decoder")},
    **{f"{side}_attention_heads": 4 for side in ("encoder", "decoder")},
    **{f"{side}_ffn_dim": 24 for side in ("encoder", "decoder")},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1},
}
_T5 = {"vocab_size": 61, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4}
_T5["decoder_start_token_id"] = 0
_CAUSAL = {"vocab_size": 61, "hidden_size": 16, "n_layer": 2, "n_head": 4}
_GPT2 = {"vocab_size": 61, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 32}
_SPEECH: dict[str, Any] = {
    **{**_TEXT, "conv_dim": (8, 8), "conv_kernel": (3, 3), "conv_stride": (2, 2)},
    **{"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2},
    **{"do_stable_layer_norm": True, "feat_extract_norm": "layer"},
    **{"num_codevectors_per_group": 6, "codevector_dim": 8, "proj_codevector_dim": 8},
}

CONFIGS: dict[str, dict[str, Any]] = {
    "albert": {**_TEXT, "embedding_size": 12},
    "bart": _SEQ2SEQ,
    "beit": {**_VISION, "vocab_size": 61, "use_relative_position_bias": True},
    "bert": _TEXT,
    "big_bird": {**_TEXT, "attention_type": "original_full"},
    "blenderbot": _SEQ2SEQ,
    "blenderbot-small": _SEQ2SEQ,
    "bloom": _CAUSAL,
    "clip": {
        "vision_config": _VISION,
        "text_config": {**_TEXT, "eos_token_id": 2},
        "projection_dim": 12,
    },
    "clip_text_model": {**_TEXT, "eos_token_id": 2, "projection_dim": 12},
    "clip_vision_model": _VISION,
    "dinov2": _VISION,
    "distilbert": {
        **{"vocab_size": 61, "dim": 16, "n_layers": 2, "n_heads": 4, "hidden_dim": 24},
        "max_position_embeddings": 32,
    },
    "electra": {**_TEXT, "embedding_size": 12},
    "gemma": {**_TEXT, "num_key_value_heads": 2, "head_dim": 4},
    "gpt2": _GPT2,
    "gpt_neo": {
        **{"vocab_size": 61, "hidden_size": 16, "num_layers": 2, "num_heads": 4},
        **{"intermediate_size": 24, "max_position_embeddings": 32, "window_size": 4},
        "attention_types": [[["global", "local"], 1]],
    },
    "gptj": {**_GPT2, "rotary_dim": 4},
    "llama": {**_TEXT, "num_key_value_heads": 2},
    "longt5": {**_T5, "local_radius": 3, "global_block_size": 4},
    "marian": _SEQ2SEQ,
    "mbart": _SEQ2SEQ,
    "mistral": {**_TEXT, "num_key_value_heads": 2},
    "mt5": _T5,
    "opt": {**_SIZES, "ffn_dim": 24, "word_embed_proj_dim": 16, "max_position_embeddings": 32},
    "pegasus": _SEQ2SEQ,
    "regnet": {"embedding_size": 40, "hidden_sizes": [40, 56], "depths": [1, 2], "groups_width": 8},
    "resnet": {"embedding_size": 40, "hidden_sizes": [40, 56], "depths": [1, 2]},
    "roberta": _TEXT,
    "roberta-prelayernorm": _TEXT,
    "roformer": {**_TEXT, "embedding_size": 16},
    "t5": _T5,
    "vit": _VISION,
    "wav2vec2": _SPEECH,
    "whisper": {
        **_SEQ2SEQ,
        **{"num_mel_bins": 8, "max_source_positions": 10, "max_target_positions": 32},
    },
    "xglm": {
        **{"vocab_size": 61, "d_model": 16, "ffn_dim": 24, "num_layers": 2, "attention_heads": 4},
        "max_position_embeddings": 32,
    },
    "xlm-roberta": _TEXT,
}

_PARTS = {
    "encoder-decoder": ("bert", "gpt2"),
    "speech-encoder-decoder": ("wav2vec2", "bart"),
    "vision-encoder-decoder": ("vit", "gpt2"),
    "vision-text-dual-encoder": ("vit", "bert"),
}


def config_of(kind: str) -> Any:
    """The tiny config of a model type."""
    if kind in _PARTS:
        first, second = map(config_of, _PARTS[kind])
        if kind == "speech-encoder-decoder":
            # Its first inputs are long, and all of them need positions.
            second.max_position_embeddings = 512
        composite: Any = transformers.CONFIG_MAPPING[kind]
        if kind == "vision-text-dual-encoder":
            return composite.from_vision_text_configs(first, second, projection_dim=12)
        return composite.from_encoder_decoder_configs(first, second)
    return transformers.CONFIG_MAPPING[kind](**CONFIGS[kind])


def classes() -> dict[str, str]:
    """The names of all Flax classes, with their model types."""
    model_types: dict[str, str] = {}
    for package in pkgutil.iter_modules(models.__path__):
        name = f"transformers.models.{package.name}.modeling_flax_{package.name}"
        path = pathlib.Path(models.__path__[0], package.name, f"{name.rpartition('.')[2]}.py")
        if package.name == "auto" or not path.exists():
            continue
        module = importlib.import_module(name)
        for kind in module.__all__:
            cls = getattr(module, kind)
            if kind.startswith("Flax") and "PreTrained" not in kind:
                model_types[kind] = cls.config_class.model_type
    return model_types


def make(name: str, **options: Any) -> Any:
    """A model of a class, by name."""
    cls = getattr(transformers, name)
    config = config_of(cls.config_class.model_type)
    config.architectures = [name.removeprefix("Flax")]
    if name == "FlaxBeitForMaskedImageModeling":
        config.use_mask_token = True
    return cls(config, **options)


def inputs_of(model: Any) -> dict[str, Any]:
    """Inputs of a model, by argument name."""
    arguments = inspect.signature(model.__call__).parameters
    ids = np.array([[3, 5, 7, 11, 13, 17, 2]])
    if "MultipleChoice" in type(model).__name__:
        ids = ids[None]
    parts = [getattr(model.config, part, None) for part in ("vision_config", "encoder")]
    sides = [getattr(config, "image_size", None) for config in (model.config, *parts)]
    side = next((side for side in sides if side is not None), 13)
    values = {
        "input_ids": ids,
        "decoder_input_ids": np.array([[1, 3, 5]]),
        "pixel_values": _waves(1, 3, side, side),
        "input_features": _waves(1, 8, 20),
        "input_values": _waves(1, 64),
        "inputs": _waves(1, 64),
    }
    chosen = {name: jnp.asarray(x) for name, x in values.items() if name in arguments}
    if type(model).__name__ == "FlaxBeitForMaskedImageModeling":
        chosen["bool_masked_pos"] = jnp.array([[True, False, True, False]])
    if model.config.model_type == "electra":
        chosen["token_type_ids"] = jnp.zeros_like(chosen["input_ids"])  # the default is ones
    if "SequenceClassification" in type(model).__name__:
        chosen.pop("decoder_input_ids", None)  # made of the inputs, whose last token is looked for
    return chosen


def _waves(*shape: int) -> np.ndarray[Any, Any]:
    return np.sin(np.arange(np.prod(shape))).reshape(shape).astype(np.float32)
