# %% [markdown]
# # QLoRA on a small budget
#
# QLoRA trains models that would not fit into memory otherwise. It combines a 4-bit base, float32
# adapters, and layers in a scan with rematerialization. This tutorial pretrains a small character
# model, quantizes it, measures how much its loss rises, and trains an adapter on the codes.

# %% [markdown]
# ## A base
#
# The base is a character decoder in plain JAX, three layers deep, trained briefly on the help pages
# that come with Python.

# %%
import functools
import pydoc_data.topics

import jax
import jax.numpy as jnp
import numpy as np
import optax

WIDTH, DEPTH, HEADS, LENGTH = 128, 3, 4, 48


def init(key):
    keys = jax.random.split(key, 6)
    normal = lambda k, *shape: jax.random.normal(k, shape) / shape[-2] ** 0.5
    return {
        "table": jax.random.normal(keys[0], (128, WIDTH)),
        "layers": {
            "qkv": normal(keys[1], DEPTH, WIDTH, 3 * WIDTH),
            "out": normal(keys[2], DEPTH, WIDTH, WIDTH) / 3,
            "up": normal(keys[3], DEPTH, WIDTH, 4 * WIDTH),
            "down": normal(keys[4], DEPTH, 4 * WIDTH, WIDTH) / 3,
        },
        "head": normal(keys[5], WIDTH, 128),
    }


def norm(x):
    return x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6)


def model(params, ids):
    time = jnp.arange(ids.shape[1])
    waves = jnp.exp(-jnp.arange(WIDTH // 2) / 16)
    angles = time[:, None] * waves
    x = params["table"][ids] + jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1) / 4

    @jax.checkpoint
    def layer(x, weights):
        q, k, v = jnp.split(norm(x) @ weights["qkv"], 3, -1)
        q, k, v = (y.reshape(*y.shape[:2], HEADS, -1) for y in (q, k, v))
        x = (
            x
            + jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(x.shape)
            @ weights["out"]
        )
        return x + jax.nn.gelu(norm(x) @ weights["up"]) @ weights["down"], None

    x, _ = jax.lax.scan(layer, x, params["layers"])
    return norm(x) @ params["head"]


def loss_of(logits, ids):
    return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], ids[:, 1:]).mean()


def encode(text):
    return np.frombuffer(text.encode("ascii", "replace"), np.uint8).astype(np.int32)


def batch(text, seed, rows=12):
    starts = np.random.default_rng(seed).integers(0, len(text) - LENGTH, rows)
    return text[starts[:, None] + np.arange(LENGTH)]


help_pages = encode("\n".join(pydoc_data.topics.topics.values()))
print(f"{len(help_pages):,} characters")

# %%
optimizer = optax.adam(4e-3)


@jax.jit
def pretrain(params, state, ids):
    loss, grads = jax.value_and_grad(lambda params: loss_of(model(params, ids), ids))(params)
    updates, state = optimizer.update(grads, state, params)
    return optax.apply_updates(params, updates), state, loss


params = init(jax.random.key(0))
state = optimizer.init(params)
for k in range(150):
    params, state, loss = pretrain(params, state, batch(help_pages, k))
print(f"the base: {loss:.2f} nats for each character")

# %% [markdown]
# ## Quantize it
#
# `quantize` traces the function and quantizes the weights that are used in matrix products. The
# embedding table stays as it is.

# %%
from lorax import explain, infer_spec, init_lora, lora, quantize

ids = batch(help_pages, 1000, rows=32)
coded = quantize(params, "nf4", fn=model, args=(ids,))

for name, tree in (("float32", params), ("NF4", coded)):
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
    empty = jax.tree.map(lambda _: None, params)
    loss = loss_of(lora(model)((tree, empty), ids), ids)
    print(f"{name:8} {size / 2**20:5.2f} MiB, loss {loss:.3f}")

# %% [markdown]
# ## An adapter on the codes
#
# `init_lora` takes the quantized tree in place of the parameters. `explain` prints the bits of each
# weight, and what is trained.

# %%
spec = infer_spec(model, coded, ids, rank=8, where="layers/*")
frozen, tunable = init_lora(coded, spec, jax.random.key(1))
print(explain(model, (frozen, tunable), ids))

# %% [markdown]
# ## Train
#
# The new task is the same pages in capital letters. The step takes the codes and decodes each layer
# where it is used, in the forward pass and again in the backward pass.

# %%
capitals = encode("\n".join(pydoc_data.topics.topics.values()).upper())
adapted = lora(model)
optimizer = optax.adam(5e-3)


@functools.partial(jax.jit, donate_argnames=("tunable", "state"))
def step(tunable, state, frozen, ids):
    loss_fn = lambda tunable: loss_of(adapted((frozen, tunable), ids), ids)
    loss, grads = jax.value_and_grad(loss_fn)(tunable)
    updates, state = optimizer.update(grads, state, tunable)
    return optax.apply_updates(tunable, updates), state, loss


state = optimizer.init(tunable)
for k in range(76):
    tunable, state, loss = step(tunable, state, frozen, batch(capitals, k))
    if k % 25 == 0:
        print(f"step {k:3}: {loss:.2f}")

# %% [markdown]
# ## What the step needs
#
# XLA reports the memory that a compiled step needs. QLoRA reduces the arguments: codes instead of
# floats, and an optimizer state of the size of the adapter.


# %%
def needs(function, *args):
    memory = jax.jit(function).lower(*args).compile().memory_analysis()
    return memory.argument_size_in_bytes / 2**20


full = optax.adam(1e-3).init(params)
print(f"full fine-tuning: {needs(pretrain, params, full, ids):5.1f} MiB of arguments")
print(f"QLoRA:            {needs(step, tunable, state, frozen, ids):5.1f} MiB of arguments")

# %% [markdown]
# ## Merge
#
# `merge_params` adds the delta in floating point. It returns floats, or codes again: see [quantized
# bases](../quantized.md#merging). That page also describes initial factors that correct the
# quantization error.

# %%
from lorax import merge_params

merged = merge_params(frozen, tunable)
ids = batch(capitals, 2000, rows=32)
print(f"adapter on codes {loss_of(adapted((frozen, tunable), ids), ids):.3f}")
print(f"base in floats   {loss_of(model(params, ids), ids):.3f}")
