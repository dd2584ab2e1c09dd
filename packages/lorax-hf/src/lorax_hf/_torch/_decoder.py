"""One decoding step of a causal model, with its cache passed in and returned as arrays."""

import inspect
import warnings
from typing import Any

import torch
import transformers
from transformers.cache_utils import Cache, StaticLayer

from lorax import ArgumentError

from .._errors import ModuleWarning, StaticCacheError

# Types of layers that work with a cache of all positions. The masks of sliding windows and chunks
# are computed from positions, so these layers do not need a cache of their own.
_ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}

# Types that take the last rows of a table of masks, by the length of the cache.
_BY_LENGTH = {"bark", "coarse_acoustics", "gpt_neo", "imagegpt", "semantic"}

# The name of the cache argument in transformers 5.24, and before.
_CACHES = ("cache", "past_key_values")


class Decoder(torch.nn.Module):
    """A causal model that maps `(ids, mask, positions, state)` to `(logits, state)`.

    The logits are those of the last token. The state has, for each layer, the keys, the values and
    the number of cached positions; it is None for the first step.
    """

    def __init__(self, model: Any, length: int) -> None:
        super().__init__()
        self.cache = _cache_argument(model)
        self.model = model
        self.length = length
        self.layers = model.config.get_text_config(decoder=True).num_hidden_layers
        self.takes = inspect.signature(model.forward).parameters

    def forward(self, ids: Any, mask: Any, positions: Any, state: Any) -> Any:
        layers = [StaticLayer(self.length) for _ in range(self.layers)]
        if state is not None:
            for layer, (keys, values, used) in zip(layers, state, strict=True):
                layer.lazy_initialization(keys, values)
                layer.keys, layer.values, layer.cumulative_length = keys, values, used
        options = {"attention_mask": mask, "position_ids": positions}
        given = {name: value for name, value in options.items() if name in self.takes}
        given[self.cache] = Cache(layers=list(layers))
        output = self.model(ids, use_cache=True, **given)
        if not all(layer.is_initialized for layer in layers):
            raise StaticCacheError(
                f"{type(self.model).__name__} does not use the cache it is given."
            )
        after = [(layer.keys, layer.values, layer.cumulative_length) for layer in layers]
        return output.logits[:, -1], after


def _cache_argument(model: Any) -> str:
    """The name of the cache argument; raises `StaticCacheError` if it has no constant size."""
    name = type(model).__name__
    if not isinstance(model, transformers.PreTrainedModel) or not model.can_generate():
        raise StaticCacheError(f"{name} is not a model of transformers that generates text.")
    if model.config.is_encoder_decoder:
        raise StaticCacheError(
            f"{name} is an encoder-decoder model; generate takes decoder-only models."
        )
    if not hasattr(model.config.get_text_config(decoder=True), "num_hidden_layers"):
        raise StaticCacheError(
            f"{name} has no single list of layers (`num_hidden_layers`). Generate in PyTorch."
        )
    if _is_encoder(model):
        raise StaticCacheError(
            f"{name} is an encoder, whose tokens attend to later ones. Set `is_decoder=True` in "
            "its config."
        )
    if model.config.model_type in _BY_LENGTH:
        raise StaticCacheError(
            f"{name} ({model.config.model_type}) computes its mask from the length of its cache, "
            "which is then not of constant size. Generate in PyTorch."
        )
    kinds = set(getattr(model.config.get_text_config(decoder=True), "layer_types", None) or ())
    taken = inspect.signature(model.forward).parameters
    argument = next((cache for cache in _CACHES if cache in taken), None)
    if argument is None or model._is_stateful or kinds - _ATTENTION:
        states = ", ".join(sorted(kinds - _ATTENTION)) or "its layers"
        raise StaticCacheError(
            f"{name} ({model.config.model_type}) keeps a state other than keys and values "
            f"({states}), for which there is no cache of constant size. Call `fn` on the whole "
            "sequence for each token, or generate in PyTorch."
        )
    return argument


def _is_encoder(model: torch.nn.Module) -> bool:
    """Whether a model of a type that may be either, such as BERT, is an encoder."""
    owners = list(model.modules())
    roles = [owner.is_decoder for owner in owners if hasattr(owner, "is_decoder")]
    causal = any(getattr(owner, "is_causal", False) for owner in owners)
    return bool(roles) and not any(roles) and not causal


def check_length(model: Any, length: int) -> None:
    """Raises `ArgumentError` if a length exceeds a table of positions; warns beyond training."""
    config: Any = getattr(model, "config", None)
    if not isinstance(config, transformers.PretrainedConfig):
        return
    config = config.get_text_config(decoder=True)
    longest = getattr(config, "max_position_embeddings", None)
    if not isinstance(longest, int) or length <= longest or getattr(config, "alibi", False):
        return
    problem = (
        f"the prompt and the new tokens are {length} tokens, and {type(model).__name__} has "
        f"positions for {longest} (`max_position_embeddings`)"
    )
    if not any("inv_freq" in name for name, _ in model.named_buffers()):
        raise ArgumentError(f"{problem}. Take a shorter prompt or fewer new tokens.")
    warnings.warn(
        f"{problem}. It computes rotary positions beyond them, for which it was not trained.",
        ModuleWarning,
        stacklevel=4,
    )
