"""Google's language models on Flax NNX."""

from typing import Any

import jax
import jax.numpy as jnp
from flax.nnx import Rngs
from tunix.models.gemma3 import model as gemma3
from tunix.models.llama3 import model as llama3
from tunix.models.qwen3 import model as qwen3

from ..catalog import Subject, model
from ..frameworks import nnx, tokens

SIZES = {
    "num_layers": 2,
    "embed_dim": 12,
    "hidden_dim": 22,
    "num_heads": 4,
    "head_dim": 6,
    "num_kv_heads": 2,
}
LENGTH = 7


def language(module: Any) -> Subject:
    positions = jnp.tile(jnp.arange(LENGTH), (2, 1))
    mask = jnp.tile(jnp.tril(jnp.ones((LENGTH, LENGTH), bool)), (2, 1, 1))

    def call(module: Any, ids: jax.Array) -> jax.Array:
        return module(ids, positions, None, mask)[0]

    return nnx(module, call, tokens(17, 2, LENGTH))


@model("Gemma 3")
def gemma() -> Subject:
    config = gemma3.ModelConfig(
        **SIZES, num_embed=17, sliding_window_size=5, param_dtype=jnp.float32
    )
    return language(gemma3.Gemma3(config, rngs=Rngs(0)))


@model("Llama 3")
def llama() -> Subject:
    config = llama3.ModelConfig(**SIZES, vocab_size=17, rope_theta=10_000, norm_eps=1e-5)
    return language(llama3.Llama3(config, rngs=Rngs(0)))


@model("Qwen 3, mixture of experts", single=True)
def qwen() -> Subject:
    experts = {"num_experts": 3, "num_experts_per_tok": 2, "use_tied_embedding": True}
    config = qwen3.ModelConfig(**SIZES, **experts, vocab_size=17, rope_theta=10_000, norm_eps=1e-5)
    return language(qwen3.Qwen3(config, rngs=Rngs(0)))
