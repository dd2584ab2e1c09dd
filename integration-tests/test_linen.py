"""Flax Linen: modules of its library, with and without `nn.scan` and `nn.remat`."""

import jax
import numpy as np
import pytest
from flax import linen as nn

import lorax

KEY = jax.random.PRNGKey(0)


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_mlp_with_state_and_dropout(check_adapter):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            x = nn.BatchNorm(use_running_average=not train)(nn.Dense(11)(x))
            x = nn.Dropout(0.3, deterministic=not train)(nn.relu(x))
            return nn.Dense(3)(x)

    model, x = Model(), normal(1, 13, 5)
    variables = jax.jit(model.init, static_argnums=2)(KEY, x, False)

    def apply(params, stats, key, x, train):
        variables = {"params": params, "batch_stats": stats}
        return model.apply(variables, x, train, mutable=["batch_stats"], rngs={"dropout": key})

    params, stats = variables["params"], variables["batch_stats"]
    key = jax.random.PRNGKey(1)
    spec = lorax.spec_from_rules(params, [("*kernel", 2), ("*BatchNorm*", lorax.LORA_FULL)])
    for train in (False, True):
        frozen, tunable = check_adapter(
            apply, params, spec, stats, key, x, train=train, tolerance=1e-4
        )
    # The new statistics equal those of the plain model.
    jit = lambda fn: jax.jit(fn, static_argnames="train")  # noqa: E731
    adapted = jit(lorax.lora(apply))((frozen, tunable), stats, key, x, train=True)[1]
    merged = jit(apply)(lorax.merge_params(frozen, tunable), stats, key, x, train=True)[1]
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), adapted, merged)
    assert not np.allclose(adapted["batch_stats"]["BatchNorm_0"]["mean"], 0)


def test_conv_net(check_adapter):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Conv(11, (3, 3), strides=2)(x))
            x = nn.relu(nn.Conv(33, (3, 3), feature_group_count=11)(x))
            x = nn.ConvTranspose(7, (2, 2), strides=(2, 2))(nn.GroupNorm(3)(x))
            return nn.Dense(3)(x.mean((1, 2)))

    model, x = Model(), normal(1, 2, 9, 15, 5)
    params = jax.jit(model.init)(KEY, x)
    spec = lorax.infer_spec(model.apply, params, x, rank=2)
    check_adapter(model.apply, params, spec, x, tolerance=1e-4)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        h = nn.LayerNorm()(x)
        attention = nn.MultiHeadDotProductAttention(2, dropout_rate=0.2, deterministic=not train)
        x = x + attention(h, mask=nn.make_causal_mask(h[..., 0]))
        h = nn.DenseGeneral((3, 7))(nn.LayerNorm()(x))
        x = x + nn.DenseGeneral(x.shape[-1], axis=(-2, -1))(nn.gelu(h))
        return nn.Dropout(0.2, deterministic=not train)(x)


class Unrolled(nn.Module):
    block = Block

    @nn.compact
    def __call__(self, tokens, train):
        embed = nn.Embed(29, 10)
        x = embed(tokens)
        for _ in range(2):
            x = self.block()(x, train)
        return embed.attend(x)


class Remat(Unrolled):
    block = nn.remat(Block, static_argnums=(2,))


class Scanned(nn.Module):
    block = Block

    @nn.compact
    def __call__(self, tokens, train):
        embed = nn.Embed(29, 10)
        scan = nn.scan(
            lambda block, x, _: (block(x, train), None),
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            length=2,
        )
        x, _ = scan(self.block(), embed(tokens), None)
        return embed.attend(x)


class ScannedRemat(Scanned):
    block = nn.remat(Block, static_argnums=(2,))


@pytest.mark.parametrize("cls", [Unrolled, Remat, Scanned, ScannedRemat])
def test_language_model(check_adapter, cls):
    model, tokens = cls(), np.array([[3, 1, 4, 1], [5, 9, 2, 6], [5, 3, 5, 28]])
    params = jax.jit(model.init, static_argnums=2)(KEY, tokens, False)

    def apply(params, key, tokens, train):
        return model.apply(params, tokens, train, rngs={"dropout": key})

    key = jax.random.PRNGKey(1)
    spec = lorax.infer_spec(apply, params, key, tokens, rank=2, train=True)
    roles = {
        jax.tree_util.keystr(path, simple=True, separator="/").split("/", 2)[-1]: leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(spec)
        if leaf
    }
    stacked = (0,) if "Scanned" in cls.__name__ else ()
    shifted = lambda *axes: tuple(d + len(stacked) for d in axes)  # noqa: E731
    query = roles["MultiHeadDotProductAttention_0/query/kernel"]
    assert query == lorax.LoraSpec(2, None, "standard", shifted(0), shifted(1, 2), stacked)
    output = roles["DenseGeneral_1/kernel"]
    assert output == lorax.LoraSpec(2, None, "standard", shifted(0, 1), shifted(2), stacked)
    check_adapter(
        apply, params, spec, key, tokens, train=True, tolerance=1e-4, transforms=cls is ScannedRemat
    )
