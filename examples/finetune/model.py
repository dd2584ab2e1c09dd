"""A Llama in plain JAX, and its weights from a GGUF file.

Nothing in this file is specific to LoRA: parameters are a nested dict of arrays, and the model is a
function. The dict has the paths that Flax and PyTorch use for this architecture. Kernels are
(in, out).
"""

import dataclasses

import gguf
import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings that do not follow from the shapes of the weights."""

    layers: int
    heads: int
    kv_heads: int
    rope_theta: float
    norm_eps: float


def rms_norm(x, weight, eps):
    """Normalize to unit root mean square, then scale by `weight`."""
    return x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + eps) * weight


def rotate(x, theta):
    """Rotate each pair (x[i], x[i + d/2]) by an angle that grows with its position in time."""
    time, half = x.shape[1], x.shape[-1] // 2
    angle = jnp.arange(time)[:, None] * theta ** (-jnp.arange(half) / half)
    cos, sin = jnp.cos(angle)[:, None, :], jnp.sin(angle)[:, None, :]  # [time, 1, half]
    left, right = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)


def attention(p, x, config):
    """Causal attention in which several query heads share one key and value head."""
    batch, time, _ = x.shape
    q = (x @ p["q_proj"]["kernel"]).reshape(batch, time, config.heads, -1)
    k = (x @ p["k_proj"]["kernel"]).reshape(batch, time, config.kv_heads, -1)
    v = (x @ p["v_proj"]["kernel"]).reshape(batch, time, config.kv_heads, -1)
    q, k = rotate(q, config.rope_theta), rotate(k, config.rope_theta)
    mixed = jax.nn.dot_product_attention(q, k, v, is_causal=True)
    return mixed.reshape(batch, time, -1) @ p["o_proj"]["kernel"]


def mlp(p, x):
    """A gated feed-forward network."""
    gate = jax.nn.silu(x @ p["gate_proj"]["kernel"])
    return (gate * (x @ p["up_proj"]["kernel"])) @ p["down_proj"]["kernel"]


def layer(p, x, config):
    """Attention and feed-forward network, each added to its input."""
    normed = rms_norm(x, p["input_layernorm"]["weight"], config.norm_eps)
    x = x + attention(p["self_attn"], normed, config)
    normed = rms_norm(x, p["post_attention_layernorm"]["weight"], config.norm_eps)
    return x + mlp(p["mlp"], normed)


def next_token_logits(params, tokens, last, config):
    """Logits for the token after position `last` [batch] of `tokens` [batch, time].

    Attention is causal, so padding to the right of `last` has no effect.
    """
    model = params["model"]
    x = model["embed_tokens"]["embedding"][tokens]
    for i in range(config.layers):
        x = layer(model["layers"][str(i)], x, config)
    x = jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0]
    x = rms_norm(x, model["norm"]["weight"], config.norm_eps)
    return x @ model["embed_tokens"]["embedding"].T  # the head is the embedding, transposed


_PATHS = {
    "attn_norm": "input_layernorm/weight",
    "attn_q": "self_attn/q_proj/kernel",
    "attn_k": "self_attn/k_proj/kernel",
    "attn_v": "self_attn/v_proj/kernel",
    "attn_output": "self_attn/o_proj/kernel",
    "ffn_norm": "post_attention_layernorm/weight",
    "ffn_gate": "mlp/gate_proj/kernel",
    "ffn_up": "mlp/up_proj/kernel",
    "ffn_down": "mlp/down_proj/kernel",
    "token_embd": "embed_tokens/embedding",
    "output_norm": "norm/weight",
}


def load_llama(reader):
    """Parameters, dequantized to float32, and configuration from an open `gguf.GGUFReader`."""
    config = Config(
        layers=reader.fields["llama.block_count"].contents(),
        heads=reader.fields["llama.attention.head_count"].contents(),
        kv_heads=reader.fields["llama.attention.head_count_kv"].contents(),
        rope_theta=reader.fields["llama.rope.freq_base"].contents(),
        norm_eps=reader.fields["llama.attention.layer_norm_rms_epsilon"].contents(),
    )
    params = {}
    for tensor in reader.tensors:
        array = gguf.dequantize(tensor.data, tensor.tensor_type)
        *layer, name, _ = tensor.name.split(".")  # blk.0.attn_q.weight, or output_norm.weight
        if name == "attn_q":
            array = unpermute(array, config.heads)
        if name == "attn_k":
            array = unpermute(array, config.kv_heads)
        *path, leaf = ["model", *(["layers", layer[1]] if layer else []), *_PATHS[name].split("/")]
        node = params
        for key in path:
            node = node.setdefault(key, {})
        node[leaf] = jnp.asarray(array.T if leaf == "kernel" else array)
    return params, config


def unpermute(weight, heads):
    """Rows of q or k in the order of `rotate`. llama.cpp stores the two rows of a pair together."""
    out, features = weight.shape
    pairs = weight.reshape(heads, out // heads // 2, 2, features)
    return np.swapaxes(pairs, 1, 2).reshape(out, features)
