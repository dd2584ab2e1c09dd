"""Haiku: transformed functions, with state and random keys."""

import haiku as hk
import jax
import numpy as np

import lorax

KEY = jax.random.PRNGKey(0)


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_mlp_with_dropout(check_adapter):
    model = hk.transform(lambda x, key: hk.nets.MLP([11, 3])(x, dropout_rate=0.3, rng=key))
    x, key = normal(1, 13, 5), jax.random.PRNGKey(1)
    params = jax.jit(model.init)(KEY, x, key)
    spec = lorax.spec_from_rules(params, [("*/w", 2)])
    check_adapter(model.apply, params, spec, None, x, key)


def test_conv_net_with_state(check_adapter):
    def net(x, is_training):
        x = hk.Conv2D(11, 3, stride=2)(x)
        x = hk.BatchNorm(True, True, 0.9)(x, is_training)
        x = hk.DepthwiseConv2D(3, 3)(jax.nn.relu(x))
        x = hk.Conv2DTranspose(7, 2, stride=2)(jax.nn.relu(x))
        return hk.Linear(3)(x.mean((1, 2)))

    model = hk.without_apply_rng(hk.transform_with_state(net))
    x = normal(1, 2, 9, 15, 5)
    params, state = jax.jit(model.init, static_argnums=2)(KEY, x, True)
    spec = lorax.infer_spec(model.apply, params, state, x, rank=2, is_training=True)
    frozen, tunable = check_adapter(
        model.apply, params, spec, state, x, is_training=True, tolerance=1e-4
    )
    jit = lambda fn: jax.jit(fn, static_argnames="is_training")  # noqa: E731
    adapted = jit(lorax.lora(model.apply))((frozen, tunable), state, x, is_training=True)[1]
    merged = jit(model.apply)(lorax.merge_params(frozen, tunable), state, x, is_training=True)[1]
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), adapted, merged)


def test_transformer(check_adapter):
    def net(tokens):
        embed = hk.Embed(29, 10)
        x = embed(tokens)

        def block(x):
            attention = hk.MultiHeadAttention(2, 5, w_init=hk.initializers.VarianceScaling(1.0))
            h = hk.LayerNorm(-1, True, True)(x)
            x = x + attention(h, h, h)
            h = hk.LayerNorm(-1, True, True)(x)
            return x + hk.Linear(10)(jax.nn.gelu(hk.Linear(21)(h)))

        x = hk.layer_stack(2)(block)(x)
        x = hk.remat(block)(x)
        return x @ embed.embeddings.T

    model = hk.without_apply_rng(hk.transform(net))
    tokens = np.array([[3, 1, 4, 1], [5, 9, 2, 6]])
    params = jax.jit(model.init)(KEY, tokens)
    spec = lorax.infer_spec(model.apply, params, tokens, rank=2)
    stacked = [leaf for leaf in jax.tree.leaves(spec) if leaf and leaf.shared_axes == (0,)]
    assert len(stacked) == 6
    check_adapter(model.apply, params, spec, tokens, tolerance=1e-4, transforms=True)
