"""Flax NNX: modules are split with `nnx.split`, and merged inside the function."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import lorax


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_mlp_with_state_and_dropout(check_adapter):
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Linear(5, 11, rngs=rngs)
            self.norm = nnx.BatchNorm(11, rngs=rngs)
            self.dropout = nnx.Dropout(0.3, rngs=rngs)
            self.second = nnx.Linear(11, 3, rngs=rngs)

        def __call__(self, x):
            return self.second(self.dropout(nnx.relu(self.norm(self.first(x)))))

    model = Model(nnx.Rngs(0))
    model.train()
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def apply(params, rest, x):
        """Returns the output, and the new statistics."""
        # NNX does not update a state of an outer trace, so this updates a copy.
        model = nnx.merge(graph, params, rest, copy=True)
        y = model(x)
        return y, nnx.state(model, nnx.BatchStat)

    x = normal(1, 13, 5)
    spec = lorax.spec_from_rules(params, [("*kernel*", 2), ("norm*", lorax.LORA_FULL)])
    frozen, tunable = check_adapter(apply, params, spec, rest, x, tolerance=1e-4)
    adapted = jax.jit(lorax.lora(apply))((frozen, tunable), rest, x)[1]
    merged = jax.jit(apply)(lorax.merge_params(frozen, tunable), rest, x)[1]
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), adapted, merged)
    assert not np.allclose(jax.tree.leaves(adapted)[0], jax.tree.leaves(rest)[0])


def test_conv_net(check_adapter):
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Conv(5, 11, (3, 3), strides=2, rngs=rngs)
            self.depthwise = nnx.Conv(11, 11, (3, 3), feature_group_count=11, rngs=rngs)
            self.up = nnx.ConvTranspose(11, 7, (2, 2), strides=(2, 2), rngs=rngs)

        def __call__(self, x):
            return self.up(nnx.relu(self.depthwise(nnx.relu(self.first(x)))))

    graph, params = nnx.split(Model(nnx.Rngs(0)))

    def apply(params, x):
        return nnx.merge(graph, params)(x)

    x = normal(1, 2, 9, 15, 5)
    check_adapter(apply, params, lorax.infer_spec(apply, params, x, rank=2), x, tolerance=1e-4)


def test_transformer(check_adapter):
    class Block(nnx.Module):
        def __init__(self, rngs):
            self.norm = nnx.LayerNorm(10, rngs=rngs)
            self.attention = nnx.MultiHeadAttention(2, 10, decode=False, rngs=rngs)
            self.up = nnx.LinearGeneral(10, (3, 7), rngs=rngs)
            self.down = nnx.LinearGeneral((3, 7), 10, axis=(-2, -1), rngs=rngs)

        def __call__(self, x):
            x = x + self.attention(self.norm(x))
            return x + self.down(nnx.gelu(self.up(x)))

    class Model(nnx.Module):
        def __init__(self, rngs):
            @nnx.vmap(in_axes=0, out_axes=0)
            def stack(rngs):
                return Block(rngs)

            self.embed = nnx.Embed(29, 10, rngs=rngs)
            self.blocks = stack(rngs.split(2))

        def __call__(self, tokens):
            @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
            @nnx.remat
            def run(x, block):
                return block(x)

            return self.embed.attend(run(self.embed(tokens), self.blocks))

    graph, params, rest = nnx.split(Model(nnx.Rngs(0)), nnx.Param, ...)
    tokens = jnp.array([[3, 1, 4, 1], [5, 9, 2, 6]])

    def apply(params, tokens):
        return nnx.merge(graph, params, rest)(tokens)

    spec = lorax.infer_spec(apply, params, tokens, rank=2)
    shared = [leaf.shared_axes for leaf in jax.tree.leaves(spec) if leaf]
    assert sorted(shared) == [(), *[(0,)] * 6]
    check_adapter(apply, params, spec, tokens, tolerance=1e-4, transforms=True)
