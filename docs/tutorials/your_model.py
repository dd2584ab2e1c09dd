# %% [markdown]
# # Adapt your own model, and verify it
#
# This tutorial adapts a model that no library provides: a small state-space model with a scan over
# time, a convolution, a gain on a weight, and a head tied to the embedding. We adapt it, inspect
# what is adapted, check that the adapter is correct, and train it.

# %% [markdown]
# ## The model
#
# This is plain research code, without any LoRA.

# %%
import jax
import jax.numpy as jnp

TOKENS, WIDTH, STATE = 48, 32, 64


def init(key):
    keys = jax.random.split(key, 6)
    normal = lambda k, *shape: jax.random.normal(k, shape) / shape[0] ** 0.5
    return {
        "table": jax.random.normal(keys[0], (TOKENS, WIDTH)) / WIDTH**0.5,
        "conv": jax.random.normal(keys[1], (4, WIDTH, WIDTH)) / (4 * WIDTH) ** 0.5,
        "into": normal(keys[2], WIDTH, STATE),
        "over": normal(keys[3], STATE, STATE) / 2,
        "gain": jnp.ones(STATE),
        "out": normal(keys[4], STATE, WIDTH),
    }


def model(params, ids):
    x = params["table"][ids]  # [batch, time, width]
    x = jax.lax.conv_general_dilated(
        x, params["conv"], (1,), [(3, 0)], dimension_numbers=("NTC", "TIO", "NTC")
    )
    step_weight = params["over"] * params["gain"]  # [state, state]

    def step(state, now):
        state = jnp.tanh(now @ params["into"] + state @ step_weight)
        return state, state

    start = jnp.zeros((x.shape[0], STATE))
    _, states = jax.lax.scan(step, start, jnp.swapaxes(x, 0, 1))
    x = jnp.swapaxes(states, 0, 1) @ params["out"]
    return x @ params["table"].T


params = init(jax.random.key(0))
ids = jax.random.randint(jax.random.key(1), (8, 24), 0, TOKENS)
model(params, ids).shape

# %% [markdown]
# ## What can be adapted
#
# `infer_spec` traces the model and finds each weight that is applied to data, and which of its axes
# are inputs and outputs. The kernel of the convolution has two input axes. The table is used for
# lookups and, transposed, as the head.

# %%
from lorax import infer_spec

spec = infer_spec(model, params, ids, rank=4)
for name, leaf in spec.items():
    print(f"{name:6} {leaf}")

# %% [markdown]
# The gain is a vector, so it cannot have a rank. We train it in full.

# %%
from lorax import LORA_FULL, explain, init_lora

spec["gain"] = LORA_FULL
frozen, tunable = init_lora(params, spec, jax.random.key(2))
print(explain(model, (frozen, tunable), ids))

# %% [markdown]
# The status of every weight is "covered": none is materialized. If one were, this table would name
# the weight and the line of the model.
#
# ## Verify it
#
# `lorax.testing.check` fills the factors with random numbers and compares outputs and gradients
# with those of the merged model, also under `jit`, `vmap` and `checkpoint`. It then follows the
# axes of every adapted weight through the program, and fails if any array holds a whole weight. Put
# this one line into the tests of your project.

# %%
from lorax.testing import check

check(model, params, spec, ids)

# %% [markdown]
# The check can fail. `tanh` of a weight is not a sum of a base and a low-rank term, so this model
# has to materialize the weight, and `check` reports it:

# %%
import warnings


def squashed(params, ids):
    return model({**params, "into": jnp.tanh(params["into"])}, ids)


with warnings.catch_warnings(record=True):
    try:
        check(squashed, params, spec, ids)
    except AssertionError as error:
        print(str(error)[:300])

# %% [markdown]
# ## Train
#
# The task is to repeat the token from two steps before. The base has random weights, so it cannot
# do this. Only the adapter is trained.

# %%
import optax

from lorax import lora

adapted = lora(model)
optimizer = optax.adam(2e-2)


@jax.jit
def step(tunable, state, frozen, key):
    ids = jax.random.randint(key, (32, 24), 0, TOKENS)

    def loss_fn(tunable):
        logits = adapted((frozen, tunable), ids[:, :-1])[:, 3:]
        wanted = ids[:, 1:-3]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, wanted)
        return losses.mean(), (logits.argmax(-1) == wanted).mean()

    (loss, hits), grads = jax.value_and_grad(loss_fn, has_aux=True)(tunable)
    updates, state = optimizer.update(grads, state, tunable)
    return optax.apply_updates(tunable, updates), state, loss, hits


state = optimizer.init(tunable)
for k in range(101):
    tunable, state, loss, hits = step(tunable, state, frozen, jax.random.key(k))
    if k % 25 == 0:
        print(f"step {k:3}: loss {loss:.3f}, {hits:.0%} of the tokens")

# %% [markdown]
# ## Merge
#
# The merged parameters work with the plain model, which does not need Lorax.

# %%
from lorax import count_params, merge_params

merged = merge_params(frozen, tunable)
difference = abs(model(merged, ids) - adapted((frozen, tunable), ids)).max()
print(f"{count_params(tunable):,} of {count_params(params):,} parameters are trained.")
print("largest difference to the merged model below 1e-3:", bool(difference < 1e-3))

# %% [markdown]
# Next: [save it](../adapters.md), [train several at once](many_adapters.md), or
# [quantize the base](qlora.md).
