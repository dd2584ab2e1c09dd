"""Transformers with named axes: every product is an einsum over names."""

from typing import Any

import jax
import jax.numpy as jnp
from penzai import pz
from penzai.models.transformer.variants import gpt_neox, llamalike_common

from ..catalog import Subject, model
from ..frameworks import KEY, tokens

VOCABULARY = 19


def language(module: Any) -> Subject:
    unbound, variables = pz.unbind_params(module)
    names = [variable.label for variable in variables]

    def fn(params: Any, ids: jax.Array) -> jax.Array:
        bound = pz.bind_variables(
            unbound,
            [v.__class__(label=n, value=params[n]) for n, v in zip(names, variables, strict=True)],
        )
        named = pz.nx.wrap(ids).tag("batch", "seq")
        positions = pz.nx.wrap(jnp.arange(ids.shape[1])).tag("seq")
        return bound(named, token_positions=positions).unwrap("batch", "seq", "vocabulary")

    frozen = {
        name: variable.freeze().value for name, variable in zip(names, variables, strict=True)
    }
    return Subject(fn, frozen, (tokens(VOCABULARY, 2, 7),))


@model("Gemma-like transformer, layers stacked")
def gemma() -> Subject:
    config = llamalike_common.LlamalikeTransformerConfig(
        num_kv_heads=1,
        query_head_multiplier=3,
        embedding_dim=12,
        projection_dim=8,
        mlp_hidden_dim=22,
        num_decoder_blocks=2,
        vocab_size=VOCABULARY,
        mlp_variant="geglu_approx",
        tie_embedder_and_logits=True,
        use_layer_stack=True,
    )
    return language(llamalike_common.build_llamalike_transformer(config, KEY))


@model("Llama-like transformer")
def llama() -> Subject:
    config = llamalike_common.LlamalikeTransformerConfig(
        num_kv_heads=2,
        query_head_multiplier=2,
        embedding_dim=12,
        projection_dim=6,
        mlp_hidden_dim=22,
        num_decoder_blocks=2,
        vocab_size=VOCABULARY,
        mlp_variant="swiglu",
        tie_embedder_and_logits=False,
    )
    return language(llamalike_common.build_llamalike_transformer(config, KEY))


@model("GPT-NeoX", transforms=True)
def neox() -> Subject:
    config = gpt_neox.GPTNeoXTransformerConfig(
        num_attention_heads=3,
        embedding_dim=12,
        projection_dim=4,
        mlp_hidden_dim=22,
        num_decoder_blocks=2,
        vocab_size=VOCABULARY,
        activation_fn="gelu_exact",
        rope_subset_size=2,
        rope_wavelength=10_000,
        layernorm_epsilon=1e-6,
        parameter_dtype=jnp.float32,
        activation_dtype=jnp.float32,
    )
    return language(gpt_neox.build_gpt_neox_transformer(config, KEY))
