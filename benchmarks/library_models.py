"""Models made of a library's modules, and hand-written versions with the same parameters."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from transformers import FlaxGPT2Model, GPT2Config

from models import Leaf, Library, Model, attend, split_heads


def layer_norm(p, x, epsilon):
    mean = x.mean(-1, keepdims=True)
    variance = ((x - mean) ** 2).mean(-1, keepdims=True)
    return (x - mean) * jax.lax.rsqrt(variance + epsilon) * p["scale"] + p["bias"]


class Attention(nn.Module):
    """Residual layers of Linen's attention, whose kernels are (D, H, K) and (H, K, D)."""

    layers: int
    heads: int

    @nn.compact
    def __call__(self, x):
        for k in range(self.layers):
            h = nn.LayerNorm(name=f"norm_{k}")(x)
            x = x + nn.MultiHeadDotProductAttention(self.heads, name=f"attention_{k}")(h)
        return x


def linen_attention(layers=4, width=512, heads=8, batch=4, time=128) -> Model:
    module = Attention(layers, heads)
    x = jax.random.normal(jax.random.key(1), (batch, time, width))

    def forward(ops, factors, params, x):
        for k in range(layers):
            f, p = factors[f"attention_{k}"], params[f"attention_{k}"]
            h = layer_norm(params[f"norm_{k}"], x, 1e-6)
            q, k, v = (
                ops.to_heads(f[name]["kernel"], p[name]["kernel"], h) + p[name]["bias"]
                for name in ("query", "key", "value")
            )
            scores = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q / q.shape[-1] ** 0.5, k))
            mixed = jnp.einsum("bhqk,bkhd->bqhd", scores, v)
            x = x + ops.from_heads(f["out"]["kernel"], p["out"]["kernel"], mixed) + p["out"]["bias"]
        return x

    params = module.init(jax.random.key(0), x)["params"]
    library = Library(lambda params, x: module.apply({"params": params}, x), module)
    return Model(forward, params, x, library)


def flax_gpt2(batch=2, time=64, **sizes) -> Model:
    """FlaxGPT2Model of transformers, by default GPT-2 small, with adapters in its blocks."""
    config = GPT2Config(**sizes)
    model = FlaxGPT2Model(config, seed=0)
    tokens = jax.random.randint(jax.random.key(1), (batch, time), 0, config.vocab_size)

    def linear(ops, f, p, x):
        return ops.transposed(f["kernel"], p["kernel"], x) + p["bias"]

    def norm(p, x):
        return layer_norm(p, x, config.layer_norm_epsilon)

    def forward(ops, factors, params, tokens):
        x = params["wte"]["embedding"][tokens] + params["wpe"]["embedding"][: tokens.shape[1]]
        for k in range(config.n_layer):
            f, p = factors["h"][str(k)], params["h"][str(k)]
            h = linear(ops, f["attn"]["c_attn"], p["attn"]["c_attn"], norm(p["ln_1"], x))
            heads = (split_heads(part, config.n_head) for part in jnp.split(h, 3, -1))
            mixed = attend(*heads)
            mixed = mixed.reshape(*mixed.shape[:2], -1)
            x = x + linear(ops, f["attn"]["c_proj"], p["attn"]["c_proj"], mixed)
            h = linear(ops, f["mlp"]["c_fc"], p["mlp"]["c_fc"], norm(p["ln_2"], x))
            x = x + linear(ops, f["mlp"]["c_proj"], p["mlp"]["c_proj"], jax.nn.gelu(h))
        return norm(params["ln_f"], x)

    def apply(params, tokens):
        return model(tokens, params=params, train=False).last_hidden_state

    def call(method, first, tokens):
        positions = jnp.broadcast_to(jnp.arange(time), tokens.shape)
        return method(first, tokens, jnp.ones_like(tokens), positions, return_dict=False)

    library = Library(apply, model.module, call, lambda outputs: outputs[0])
    return Model(forward, model.params, tokens, library, "h/*", Leaf(("h", "0", "ln_1", "bias")))
