"""Equinox: modules are the parameters, which contain functions and other leaves besides arrays."""

import equinox as eqx
import jax
import numpy as np
import optax

import lorax

KEYS = jax.random.split(jax.random.PRNGKey(0), 6)


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_mlp_under_filter_jit():
    """Uses `eqx.filter_jit`, which accepts functions as leaves, unlike `jax.jit`."""
    model = eqx.nn.MLP(5, 3, 11, depth=2, activation=jax.nn.gelu, key=KEYS[0])
    x = normal(1, 13, 5)
    apply = eqx.filter_jit(lambda model, x: jax.vmap(model)(x))
    spec = lorax.infer_spec(apply, model, x, rank=2)
    frozen, tunable = lorax.init_lora(model, spec, jax.random.key(1))
    assert frozen.activation is model.activation and tunable.activation is None
    adapted = eqx.filter_jit(lorax.lora(apply, on_materialize="error", on_unused="error"))
    np.testing.assert_allclose(adapted((frozen, tunable), x), apply(model, x), rtol=1e-5)

    optimizer = optax.adam(1e-2)

    @eqx.filter_jit
    def step(tunable, frozen, state):
        loss = lambda tunable: ((adapted((frozen, tunable), x) - 1) ** 2).mean()  # noqa: E731
        value, grads = eqx.filter_value_and_grad(loss)(tunable)
        updates, state = optimizer.update(grads, state)
        return eqx.apply_updates(tunable, updates), state, value

    state, losses = optimizer.init(tunable), []
    for _ in range(8):
        tunable, state, value = step(tunable, frozen, state)
        losses.append(float(value))
    assert losses[-1] < 0.98 * losses[0]
    merged = lorax.merge_params(frozen, tunable)
    assert isinstance(merged, eqx.nn.MLP) and merged.activation is model.activation
    split = adapted((frozen, tunable), x)
    np.testing.assert_allclose(split, apply(merged, x), rtol=1e-5, atol=1e-5)


def test_module_that_contains_functions(check_adapter):
    model = eqx.nn.Sequential(
        [
            eqx.nn.Linear(5, 11, key=KEYS[0]),
            eqx.nn.Lambda(jax.nn.relu),
            eqx.nn.Dropout(0.3),
            eqx.nn.Linear(11, 3, key=KEYS[1]),
        ]
    )
    # Leaves that are not arrays stay in the closure, outside `jax.jit`.
    params, static = eqx.partition(model, eqx.is_array)

    def apply(params, x, key, inference):
        model = eqx.nn.inference_mode(eqx.combine(params, static), inference)
        return jax.vmap(model)(x, key=jax.random.split(key, x.shape[0]))

    x = normal(1, 13, 5)
    spec = lorax.infer_spec(apply, params, x, KEYS[2], rank=2, inference=False)
    # Kernels are (out, in) in Equinox.
    assert spec.layers[0].weight == lorax.LoraSpec(2, in_axes=(1,), out_axes=(0,))
    for inference in (False, True):
        check_adapter(apply, params, spec, x, KEYS[2], inference=inference)


def test_conv_net_with_state(check_adapter):
    class Model(eqx.Module):
        conv: eqx.nn.Conv2d
        norm: eqx.nn.BatchNorm
        depthwise: eqx.nn.Conv2d
        up: eqx.nn.ConvTranspose2d

        def __init__(self):
            self.conv = eqx.nn.Conv2d(5, 11, 3, stride=2, key=KEYS[0])
            self.norm = eqx.nn.BatchNorm(11, "batch", mode="batch")
            self.depthwise = eqx.nn.Conv2d(11, 11, 3, padding=1, groups=11, key=KEYS[1])
            self.up = eqx.nn.ConvTranspose2d(11, 7, 2, stride=2, key=KEYS[2])

        def __call__(self, x, state):
            x, state = self.norm(self.conv(x), state)
            return self.up(jax.nn.relu(self.depthwise(jax.nn.relu(x)))), state

    model, state = eqx.nn.make_with_state(Model)()
    params, static = eqx.partition(model, eqx.is_array)

    def apply(params, state, x):
        run = jax.vmap(eqx.combine(params, static), (0, None), (0, None), axis_name="batch")
        return run(x, state)

    x = normal(1, 3, 5, 9, 15)
    spec = lorax.infer_spec(apply, params, state, x, rank=2)
    frozen, tunable = check_adapter(apply, params, spec, state, x, tolerance=1e-4)
    adapted = jax.jit(lorax.lora(apply))((frozen, tunable), state, x)[1]
    merged = jax.jit(apply)(lorax.merge_params(frozen, tunable), state, x)[1]
    for x, y in zip(jax.tree.leaves(adapted), jax.tree.leaves(merged), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5)


def test_transformer(check_adapter):
    class Block(eqx.Module):
        norm: eqx.nn.LayerNorm
        attention: eqx.nn.MultiheadAttention
        mlp: eqx.nn.MLP

        def __init__(self, key):
            keys = jax.random.split(key)
            self.norm = eqx.nn.LayerNorm(10)
            self.attention = eqx.nn.MultiheadAttention(2, 10, key=keys[0])
            self.mlp = eqx.nn.MLP(10, 10, 21, depth=1, activation=jax.nn.gelu, key=keys[1])

        def __call__(self, x):
            h = jax.vmap(self.norm)(x)
            x = x + self.attention(h, h, h)
            return x + jax.vmap(self.mlp)(x)

    class Model(eqx.Module):
        embed: eqx.nn.Embedding
        blocks: Block

        def __init__(self):
            self.embed = eqx.nn.Embedding(29, 10, key=KEYS[0])
            self.blocks = eqx.filter_vmap(Block)(KEYS[1:3])

        def __call__(self, tokens):
            params, static = eqx.partition(self.blocks, eqx.is_array)

            @jax.checkpoint
            def run(x, params):
                return eqx.combine(params, static)(x), None

            x, _ = jax.lax.scan(run, jax.vmap(self.embed)(tokens), params)
            return x @ self.embed.weight.T

    params, static = eqx.partition(Model(), eqx.is_array)

    def apply(params, tokens):
        return jax.vmap(eqx.combine(params, static))(tokens)

    tokens = np.array([[3, 1, 4, 1], [5, 9, 2, 6]])
    spec = lorax.infer_spec(apply, params, tokens, rank=2)
    assert spec.blocks.attention.query_proj.weight == lorax.LoraSpec(
        2, in_axes=(2,), out_axes=(1,), shared_axes=(0,)
    )
    check_adapter(apply, params, spec, tokens, tolerance=1e-4, transforms=True)
