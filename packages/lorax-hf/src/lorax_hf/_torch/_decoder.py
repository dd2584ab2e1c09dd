"""One step of a causal model, with its cache as arrays that go in and come out."""

import inspect
from typing import Any

import torch
import transformers
from transformers.cache_utils import Cache, StaticLayer

from .._errors import StaticCacheError

# The layers that a cache of the keys and values of all positions serves. The masks of sliding
# windows and of chunks are made from positions, so that they need no separate cache.
_ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}

# What the argument is called: in transformers 5.24, and before.
_CACHES = ("cache", "past_key_values")


class Decoder(torch.nn.Module):
    """A causal model as `(ids, mask, positions, state)` to the last token's logits and the state.

    The state is, for each layer, keys, values and how many of them there are; None at first.
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
    """The name of the cache argument; a `StaticCacheError` where it has no constant size."""
    name = type(model).__name__
    if not isinstance(model, transformers.PreTrainedModel) or not model.can_generate():
        raise StaticCacheError(f"{name} is not a model of transformers that generates text.")
    if model.config.is_encoder_decoder:
        raise StaticCacheError(f"{name} is an encoder and a decoder; generate takes causal models.")
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
