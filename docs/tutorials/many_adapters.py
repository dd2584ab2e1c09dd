# %% [markdown]
# # Several adapters over one base
#
# This tutorial trains four adapters of different ranks on four tasks, over one base, in one
# compiled step. It then serves a batch in which each row uses a different adapter, and takes one
# adapter out to resize and merge it.

# %% [markdown]
# ## A base and four tasks
#
# The base is a network that has learned the sine function. Each task is a different but similar
# function.

# %%
import jax
import jax.numpy as jnp
import optax


def model(params, x):  # [batch, 1] -> [batch, 1]
    for layer in params["layers"]:
        x = jnp.tanh(x @ layer["kernel"] + layer["bias"])
    return x @ params["head"]


def init(key, width=64, depth=3):
    keys = jax.random.split(key, depth + 1)
    sizes = [1] + [width] * depth
    layers = [
        {
            "kernel": jax.random.normal(k, (n, m)) * (3.0 if n == 1 else n**-0.5),
            "bias": jax.random.normal(k, (m,)) / 2,
        }
        for k, n, m in zip(keys[1:], sizes[:-1], sizes[1:], strict=True)
    ]
    return {"layers": layers, "head": jax.random.normal(keys[0], (width, 1)) / 8}


TASKS = {
    "sharp": lambda x: jnp.sign(jnp.sin(3 * x)) * 0.8,
    "slow": lambda x: jnp.sin(1.5 * x),
    "squared": lambda x: jnp.sin(3 * x) ** 2,
    "shifted": lambda x: jnp.cos(3 * x) + 0.3,
}
grid = jnp.linspace(-2, 2, 256)[:, None]

optimizer = optax.adam(3e-3)


@jax.jit
def pretrain(params, state, _):
    def loss_fn(params):
        return jnp.mean((model(params, grid) - jnp.sin(3 * grid)) ** 2)

    loss, grads = jax.value_and_grad(loss_fn)(params)
    updates, state = optimizer.update(grads, state, params)
    return optax.apply_updates(params, updates), state, loss


params = init(jax.random.key(0))
state = optimizer.init(params)
for k in range(800):
    params, state, loss = pretrain(params, state, k)
print(f"the base: mean squared error {loss:.5f}")

# %% [markdown]
# ## A bank
#
# The adapters may have different ranks and alphas. `stack_adapters` pads the factors with zeros,
# which stay zero in training, and keeps the scales next to the tree.

# %%
from lorax import LoraSpec, infer_spec, init_lora, stack_adapters

RANKS = {"sharp": 16, "slow": 4, "squared": 8, "shifted": 8}
keys = jax.random.split(jax.random.key(1), len(TASKS))


def fresh(rank, key):
    kind = LoraSpec(rank, alpha=2 * rank)
    spec = infer_spec(model, params, grid, spec=kind, where="layers/[12]/kernel")
    return init_lora(params, spec, key)


pairs = [fresh(RANKS[name], key) for name, key in zip(TASKS, keys, strict=True)]
frozen = pairs[0].frozen
bank = stack_adapters([pair.tunable for pair in pairs])
print("slots, in, rank:", bank.tunable["layers"][1]["kernel"].a.shape)

# %% [markdown]
# ## Train all of them in one step
#
# Write the step for one adapter, and map it over the slots with `jax.vmap`. The base is not mapped:
# it is in memory once, and each weight is read once for all four adapters.

# %%
from lorax import lora, with_scales

adapted = lora(model)


def step(tunable, state, scales, y, frozen):
    def loss_fn(tunable):
        return jnp.mean((adapted((frozen, with_scales(tunable, scales)), grid) - y) ** 2)

    loss, grads = jax.value_and_grad(loss_fn)(tunable)
    updates, state = optimizer.update(grads, state, tunable)
    return optax.apply_updates(tunable, updates), state, loss


train = jax.jit(jax.vmap(step, in_axes=(0, 0, 0, 0, None)))
targets = jnp.stack([task(grid) for task in TASKS.values()])

tunable = bank.tunable
state = jax.vmap(optimizer.init)(tunable)
for k in range(1001):
    tunable, state, losses = train(tunable, state, bank.scales, targets, frozen)
    if k % 250 == 0:
        shown = [f"{name} {x:.4f}" for name, x in zip(TASKS, losses, strict=True)]
        print(f"step {k:4}:", ", ".join(shown))

# %% [markdown]
# ## Serve rows of mixed adapters
#
# `select_adapters` returns the adapter of one row. Mapped over a batch, each row uses its own
# adapter. The index −1 selects the base alone.

# %%
import dataclasses

from lorax import select_adapters

bank = dataclasses.replace(bank, tunable=tunable)


@jax.jit
def serve(frozen, bank_tunable, scales, x, index):
    served = dataclasses.replace(bank, tunable=bank_tunable, scales=scales)
    row = lambda x, k: adapted((frozen, select_adapters(served, k)), x[None])[0]
    return jax.vmap(row)(x, index)


x = jnp.full((5, 1), 0.4)
outputs = serve(frozen, bank.tunable, bank.scales, x, jnp.array([0, 1, 2, 3, -1]))
wanted = [task(0.4) for task in TASKS.values()] + [jnp.sin(1.2)]
for name, got, want in zip([*TASKS, "the base"], outputs[:, 0], wanted, strict=True):
    print(f"{name:8}  {got:6.3f}, wanted {want:6.3f}")

# %% [markdown]
# ## Take an adapter out of the bank
#
# `unstack_adapters` removes the padding, bit for bit, and returns ordinary adapters that can be
# merged, saved or resized. How much of its rank does the "sharp" adapter need?

# %%
from lorax import merge_params, resize_adapter, unstack_adapters

adapters = dict(zip(TASKS, unstack_adapters(bank), strict=True))
sharp = adapters["sharp"]
smaller, errors = resize_adapter(sharp, energy=0.99)
for k in (1, 2):
    kept, error = smaller["layers"][k]["kernel"].rank, errors[f"layers/{k}/kernel"]
    print(
        f"layer {k}: rank {kept} of {RANKS['sharp']} keeps 99 % of the change (error {error:.2f})"
    )

merged = merge_params(frozen, sharp)
print(f"merged: {jnp.mean((model(merged, grid) - TASKS['sharp'](grid)) ** 2):.4f}")

# %% [markdown]
# See also [many adapters over one base](../banks.md): replacing an adapter while the others train,
# mixtures with learned weights, and the cost of each way of serving.
