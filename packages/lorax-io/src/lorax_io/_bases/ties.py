"""Recognizes embeddings and heads by name, and whether a config ties them."""

from collections.abc import Iterable, Mapping
from typing import Any

from .._errors import UnsupportedAdapterError

# The last part of the module's name, in the models of transformers.
EMBEDDINGS = frozenset(
    "embed_tokens wte word_embeddings shared embed_in tok_embeddings wte_embeddings".split()
)
HEADS = frozenset("lm_head embed_out output_layer".split())

# Models that scale the head's input if and only if the head is tied, so untying changes outputs.
_SCALED_WHERE_TIED = frozenset("t5 mt5 umt5 longt5 switch_transformers pix2struct".split())
_KEY = "tie_word_embeddings"


def is_embedding(module: str) -> bool:
    """Whether a module is a token embedding, by its name."""
    return module.rpartition(".")[2] in EMBEDDINGS


def is_head(module: str) -> bool:
    """Whether a module computes the logits of tokens, by its name."""
    return module.rpartition(".")[2] in HEADS


def find_embedding(names: Iterable[str]) -> str | None:
    """The name of the token embedding; None if there is not exactly one."""
    embeddings = [name for name in names if is_embedding(name.removesuffix(".weight"))]
    return embeddings[0] if len(embeddings) == 1 else None


def ties(config: Mapping[str, Any] | None) -> bool | None:
    """Whether a model's config ties its head to its embedding; None if it does not specify."""
    tied_values = [part[_KEY] for part in _parts(config or {}) if _KEY in part]
    return any(tied_values) if tied_values else None


def untied(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of the model with an untied head.

    Raises:
        UnsupportedAdapterError: if untying would change what the model computes.
    """
    if ties(config) and any(
        part.get("model_type") in _SCALED_WHERE_TIED for part in _parts(config)
    ):
        raise UnsupportedAdapterError(
            f"has a head that differs from the embedding, and a {config.get('model_type')} model "
            f"with `{_KEY}` scales its outputs: no config can give this head its own weight and "
            "keep the scale. Use the adapter without merging it.",
        )
    changed = {**config, _KEY: False}
    for name, part in config.items():
        if isinstance(part, dict) and _KEY in part:
            changed[name] = {**part, _KEY: False}
    return changed


def _parts(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The config and its nested configs, such as that of the text model."""
    return [config, *(part for part in config.values() if isinstance(part, dict))]
