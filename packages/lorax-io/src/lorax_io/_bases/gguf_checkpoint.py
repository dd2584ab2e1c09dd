"""Opens a GGUF file as a base to merge adapters into, with transformers' names for its tensors."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .._errors import (
    AdapterFileError,
    AdapterMismatchError,
    UnsupportedAdapterError,
    about,
    warn,
)
from .._formats.llama_cpp import KINDS, import_gguf
from .._places import Array
from .._torch_names import tensor_name
from .checkpoint import CONFIG_NAME, Checkpoint, by_end, config_of, roots
from .gguf import PLAIN, GGUFSource
from .ties import is_head, ties

ARCHITECTURES = ("llama", "qwen2", "qwen3")
"""Those whose tensors are those of transformers, but for names and the rows of q and k."""

_OUTER = ("model.embed_tokens", "model.norm", "lm_head")
_IN_A_LAYER = (
    "input_layernorm",
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "self_attn.q_norm",
    "self_attn.k_norm",
    "post_attention_layernorm",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
# Follows from the config, and is not a parameter in transformers.
_MADE_BY_THE_CONVERTER = frozenset(["rope_freqs.weight"])
# The key in a config of what a GGUF file states as well.
_STATED = {
    "num_hidden_layers": "block_count",
    "hidden_size": "embedding_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
}


class GGUFWeight(NamedTuple):
    """One tensor of the file, decoded when it is read."""

    name: str  # of transformers
    own: str  # of llama.cpp
    source: GGUFSource
    shape: tuple[int, ...]
    dtype: Any  # that it is written in

    def array(self) -> Array:
        """The decoded tensor, in float32 or wider."""
        array = self.source.floats(self.own)
        if not np.isfinite(array).all():
            reason = f"has NaN or infinity in `{self.own}`."
            raise AdapterFileError(reason, self.source.path)
        return array


def open_gguf(path: Path, dtype: Any = None) -> Checkpoint:
    """The base in a GGUF file, of which no tensor has been decoded.

    Args:
        path: the file. A `config.json` in its folder is used as the model's.
        dtype: that tensors are written in. By default that of the file's matrices if all have
            one float type, and else bfloat16.

    Raises:
        UnsupportedAdapterError: for a model whose weights llama.cpp holds in another form, a tensor
            without a name in transformers, or a type that `gguf` does not decode.
        AdapterFileError: if the file is damaged.
        AdapterMismatchError: if the config is that of another model.
    """
    with about(path):
        source = GGUFSource(path)
        _check_kind(source)
        owns = _names(source)
        _check_types(source, owns)
        written = np.dtype(_dtype(source) if dtype is None else dtype)
        weights = {
            name: GGUFWeight(name, own, source, source.shape(own), written)
            for name, own in owns.items()
        }
        config = config_of(path.parent)
        if config is not None:
            _check_config(config, source, weights)
    shapes = {n: jax.ShapeDtypeStruct(w.shape, w.dtype) for n, w in weights.items()}
    return Checkpoint(path, [], shapes, config, by_end(shapes), roots(shapes), coded=weights)


def _check_kind(source: GGUFSource) -> None:
    if source.field("general.type", "model") != "model":
        raise UnsupportedAdapterError(
            f"is a GGUF file of the type {source.field('general.type')!r}, not a model."
        )
    if source.arch not in ARCHITECTURES:
        raise UnsupportedAdapterError(
            f"is a GGUF file of the architecture {source.arch!r}; adapters are merged into those "
            f"of {', '.join(ARCHITECTURES)}. llama.cpp may store the weights of others in another "
            "form, such as norms with 1 added. Merge into the model's Hugging Face checkpoint, "
            "and convert the result."
        )


def _names(source: GGUFSource) -> dict[str, str]:
    """llama.cpp's name of each tensor, by transformers' name, in the order of the file."""
    layers = [f"model.layers.{k}.{end}" for k in range(source.layers) for end in _IN_A_LAYER]
    known = {
        source.name_of(module, parameter): tensor_name(module, parameter)
        for module in [*_OUTER, *layers]
        for parameter in ("weight", "bias")
    }
    if made := sorted(_MADE_BY_THE_CONVERTER & source.names.keys()):
        warn(
            f"has `{made[0]}`, which llama.cpp computes from the model's config, and which cannot "
            "be written."
        )
    wanted = [own for own in source.names if own not in _MADE_BY_THE_CONVERTER]
    if strange := [own for own in wanted if own not in known]:
        raise UnsupportedAdapterError(
            f"has `{strange[0]}`, which is not known as a tensor of {source.arch} models in "
            "transformers. Merge into the model's Hugging Face checkpoint, and convert the result."
        )
    _check_whole(source)
    return {known[own]: own for own in wanted}


def _check_whole(source: GGUFSource) -> None:
    """Rejects a file that lacks tensors that every model has, or that its other layers have."""
    ends = {own.split(".", 2)[2] for own in source.names if own.startswith("blk.")}
    layers = [f"blk.{k}.{end}" for k in range(source.layers) for end in sorted(ends)]
    needed = ["token_embd.weight", "output_norm.weight", *layers]
    if lost := [own for own in needed if own not in source.names]:
        raise AdapterFileError(f"lacks `{lost[0]}`, so it is not a complete model.")


def _check_types(source: GGUFSource, owns: Mapping[str, str]) -> None:
    """Decodes a block of zeros of each type, to find unknown types before files are written."""
    gguf = import_gguf()
    example = {source.names[own].tensor_type: own for own in owns.values()}
    for kind, own in example.items():
        if kind.name in PLAIN:
            continue
        try:
            gguf.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
        except Exception as error:  # NotImplementedError, KeyError, by the version of gguf
            raise UnsupportedAdapterError(
                f"has `{own}` in the type {kind.name}, which the gguf package does not decode."
            ) from error


def _dtype(source: GGUFSource) -> Any:
    kinds = {t.tensor_type.name for own, t in source.names.items() if len(source.shape(own)) > 1}
    return PLAIN.get(kinds.pop(), jnp.bfloat16) if len(kinds) == 1 else jnp.bfloat16


def _check_config(
    config: Mapping[str, Any], source: GGUFSource, weights: Mapping[str, Any]
) -> None:
    """Raises if the config is of a different model."""
    config_file = f"the {CONFIG_NAME} next to it"
    remedy = "Move the GGUF file to the folder of its own config."
    kind = config.get("model_type")
    if isinstance(kind, str) and KINDS.get(kind, (source.arch,))[0] != source.arch:
        raise AdapterMismatchError(
            f"is of the architecture {source.arch!r}, but {config_file} is of a {kind} model. "
            f"{remedy}"
        )
    for key, own in _STATED.items():
        value = source.field(f"{source.arch}.{own}")
        if None not in (value, config.get(key)) and config[key] != value:
            raise AdapterMismatchError(
                f"has {own} = {value}, but {config_file} has {key} = {config[key]}. {remedy}"
            )
    has_head = any(is_head(name.removesuffix(".weight")) for name in weights)
    if not has_head and not ties(config):
        raise AdapterMismatchError(
            f"has no head of its own, so the head is the embedding, but {config_file} does not "
            f"have tie_word_embeddings = true. {remedy}"
        )
