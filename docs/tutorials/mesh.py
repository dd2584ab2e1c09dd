# %% [markdown]
# # Shard over a mesh
#
# An adapter follows the sharding of its base. Shard the parameters as you would without LoRA, and
# each axis of a factor is sharded like the base's axis. This tutorial trains on eight devices,
# shows how the factors are sharded, and lists what is communicated. On a CPU, JAX can simulate
# eight devices; the code is the same on TPUs or GPUs.

# %%
import jax

jax.config.update("jax_num_cpu_devices", 8)

import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto, AxisType.Auto))
mesh

# %% [markdown]
# ## A model and its sharding
#
# The model is a stack of MLP blocks that run in a scan. The first kernel is sharded by columns and
# the second by rows, so a block needs one sum over the devices of "model". The batch is sharded
# over "data".

# %%
DEPTH, WIDTH, HIDDEN = 4, 64, 256
specs = {"up": P(None, None, "model"), "down": P(None, "model", None)}


def model(params, x):
    def block(x, weights):
        return x + jax.nn.relu(x @ weights["up"]) @ weights["down"], None

    return jax.lax.scan(block, x, params)[0]


keys = jax.random.split(jax.random.key(0), 3)
params = {
    "up": jax.random.normal(keys[0], (DEPTH, WIDTH, HIDDEN)) / WIDTH**0.5,
    "down": jax.random.normal(keys[1], (DEPTH, HIDDEN, WIDTH)) / HIDDEN**0.5,
}
params = {k: jax.device_put(w, NamedSharding(mesh, specs[k])) for k, w in params.items()}
x = jax.device_put(jax.random.normal(keys[2], (32, WIDTH)), NamedSharding(mesh, P("data")))

# %% [markdown]
# ## An adapter that follows the sharding
#
# `init_lora` reads the sharding of the base. The rank axis is small, and is replicated on every
# device.

# %%
from lorax import infer_spec, init_lora, lora

spec = infer_spec(model, params, x, rank=8)
frozen, tunable = init_lora(params, spec, jax.random.key(1))
for name in params:
    weight = tunable[name]
    print(f"{name:5} base {specs[name]}")
    print(f"      a {weight.a.shape} {weight.a.sharding.spec}")
    print(f"      b {weight.b.shape} {weight.b.sharding.spec}")

# %% [markdown]
# ## Train
#
# The optimizer state has the sharding of the tunable tree. The step needs no code for the mesh.

# %%
import functools

import optax

adapted = lora(model)
optimizer = optax.adam(3e-3)
target = jnp.roll(x, 1, axis=1)


@functools.partial(jax.jit, donate_argnames=("tunable", "state"))
def step(tunable, state, frozen, x, target):
    loss_fn = lambda tunable: jnp.mean((adapted((frozen, tunable), x) - target) ** 2)
    loss, grads = jax.value_and_grad(loss_fn)(tunable)
    updates, state = optimizer.update(grads, state, tunable)
    return optax.apply_updates(tunable, updates), state, loss


state = optimizer.init(tunable)
compiled = step.lower(tunable, state, frozen, x, target).compile()
for k in range(101):
    tunable, state, loss = step(tunable, state, frozen, x, target)
    if k % 25 == 0:
        print(f"step {k:3}: {loss:.3f}")
print("b of up is still at", tunable["up"].b.sharding.spec)

# %% [markdown]
# ## What is communicated
#
# The text of the compiled program lists the collectives. Each communicated array is as small as the
# activations or the factors. A weight of one block has 64 × 256 entries: no weight is gathered, and
# no gradient of a weight is reduced.

# %%
import re

kinds = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
found = re.findall(rf"= (.+?) ({kinds})(?:-start)?\(", compiled.as_text())
for shapes, name in sorted({(shapes, name) for shapes, name in found}):
    print(f"{name:12}", ", ".join(re.findall(r"\w+\[[\d,]*\]", shapes)))

# %% [markdown]
# ## Save, and load on another mesh
#
# A file holds whole arrays and no mesh. When loading, each process reads only the bytes that its
# devices hold.

# %%
import tempfile
from pathlib import Path

from lorax_io import load_adapter, save_adapter

file = Path(tempfile.mkdtemp(), "adapter.safetensors")
save_adapter(file, tunable, base=params)

wide = jax.make_mesh((8,), ("model",), axis_types=(AxisType.Auto,))
elsewhere = {k: jax.device_put(w, NamedSharding(wide, specs[k])) for k, w in params.items()}
loaded = load_adapter(file, params=elsewhere)
print(loaded["up"].b.sharding.mesh.shape, loaded["up"].b.sharding.spec)

# %% [markdown]
# See also [many devices](../devices.md): explicit axes, multiple processes, and what is
# communicated for each sharding. [GPU and TPU](../accelerators.md) compares a step of a model with
# 7 billion parameters, compiled for 16 TPU v5e and 8 H100, with hand-written LoRA: the memory and
# collectives are the same.
