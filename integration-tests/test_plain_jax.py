"""Models in plain JAX: parameters in dicts, lists, named tuples and dataclasses."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax


class Layer(NamedTuple):
    kernel: Any
    bias: Any


def normal(seed, *shape):
    return jnp.asarray(
        np.random.default_rng(seed).normal(size=shape) / shape[0] ** 0.5, jnp.float32
    )


def mlp(layers, x, activation):
    *hidden, last = layers
    for layer in hidden:
        x = activation(x @ layer.kernel + layer.bias)
    return x @ last.kernel + last.bias


@pytest.mark.parametrize("activation", [jax.nn.relu, jnp.tanh])
def test_mlp_with_a_function_argument(check_adapter, activation):
    sizes = (5, 11, 7, 3)
    layers = [
        Layer(normal(k, n, m), jnp.zeros(m))
        for k, (n, m) in enumerate(zip(sizes, sizes[1:], strict=False))
    ]
    x = normal(9, 13, 5)
    spec = lorax.spec_from_rules(layers, [("*kernel", 2), ("2/bias", lorax.LORA_FULL)])
    _, tunable = check_adapter(mlp, layers, spec, x, activation=activation)
    assert tunable[0].bias is None and tunable[2].bias.shape == (3,)


def test_rules_and_trace_agree_on_a_plain_kernel():
    layers = [Layer(normal(0, 5, 7), jnp.zeros(7))]
    spec = lorax.infer_spec(mlp, layers, normal(9, 13, 5), jnp.tanh, rank=2)
    assert spec[0].kernel == lorax.LoraSpec(2, in_axes=(0,), out_axes=(1,))
    assert spec[0].bias == lorax.LORA_FREEZE


def test_conv_net(check_adapter):
    params = {
        "strided": normal(0, 3, 3, 5, 11) / 4,
        "depthwise": normal(1, 3, 3, 1, 11),
        "transposed": normal(2, 2, 2, 11, 7) / 4,
    }

    def conv_net(p, x):
        numbers = ("NHWC", "HWIO", "NHWC")
        conv = jax.lax.conv_general_dilated
        x = jax.nn.relu(conv(x, p["strided"], (2, 2), "SAME", dimension_numbers=numbers))
        x = conv(x, p["depthwise"], (1, 1), "SAME", None, (2, 2), numbers, feature_group_count=11)
        return jax.lax.conv_transpose(jax.nn.relu(x), p["transposed"], (2, 2), "VALID")

    x = normal(3, 3, 9, 15, 5)
    check_adapter(conv_net, params, lorax.infer_spec(conv_net, params, x, rank=2), x)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Block:
    qkv: Any
    out: Any
    mlp: tuple[Any, Any]


WIDTH, HEADS, SIZE, LAYERS = 10, 2, 5, 3


def norm(x):
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)


def block(p, x):
    q, k, v = jnp.einsum("btd,dchk->cbthk", norm(x), p.qkv)
    scores = jnp.einsum("bqhk,bthk->bhqt", q, k) / SIZE**0.5
    mixed = jnp.einsum("bhqt,bthk->bqhk", jax.nn.softmax(scores), v)
    x = x + jnp.einsum("bqhk,hkd->bqd", mixed, p.out)
    return x + jax.nn.gelu(norm(x) @ p.mlp[0]) @ p.mlp[1]


@pytest.mark.parametrize("remat", [False, True])
def test_language_model_with_stacked_layers(check_adapter, remat):
    def model(params, tokens):
        run = jax.checkpoint(block) if remat else block
        x = params["embedding"][tokens]
        x, _ = jax.lax.scan(lambda x, p: (run(p, x), None), x, params["blocks"])
        return norm(x) @ params["embedding"].T

    params = {
        "embedding": normal(0, 17, WIDTH),
        "blocks": Block(
            normal(1, LAYERS, WIDTH, 3, HEADS, SIZE) / 4,
            normal(2, LAYERS, HEADS, SIZE, WIDTH) / 4,
            (normal(3, LAYERS, WIDTH, 21) / 4, normal(4, LAYERS, 21, WIDTH) / 4),
        ),
    }
    tokens = jnp.array([[3, 1, 4, 1], [5, 9, 2, 16]])
    spec = lorax.infer_spec(model, params, tokens, rank=2)
    assert spec["blocks"].qkv == lorax.LoraSpec(
        2, in_axes=(1,), out_axes=(2, 3, 4), shared_axes=(0,)
    )
    assert spec["blocks"].out == lorax.LoraSpec(2, in_axes=(1, 2), out_axes=(3,), shared_axes=(0,))
    check_adapter(model, params, spec, tokens, transforms=remat)
