# %% [markdown]
# # From a PEFT adapter to JAX, and back
#
# This tutorial loads an adapter that was trained with PEFT on PyTorch onto a model in plain JAX,
# continues its training, and saves it as a folder that PEFT loads. It needs neither PyTorch nor
# PEFT.

# %% [markdown]
# ## A model in JAX
#
# The model is one attention layer with shapes that are common in JAX: heads are separate axes, and
# kernels have their input axes first.

# %%
import jax
import jax.numpy as jnp

WIDTH, HEADS, SIZE = 32, 4, 8
keys = jax.random.split(jax.random.key(0), 4)
shape = {"q": (WIDTH, HEADS, SIZE), "k": (WIDTH, HEADS, SIZE), "v": (WIDTH, HEADS, SIZE)}
shape["o"] = (HEADS, SIZE, WIDTH)
params = {k: jax.random.normal(key, shape[k]) / 6 for k, key in zip(shape, keys, strict=True)}


def model(params, x):
    q, k, v = (jnp.einsum("btw,whs->bths", x, params[name]) for name in "qkv")
    mixed = jax.nn.dot_product_attention(q, k, v)
    return jnp.einsum("bths,hsw->btw", mixed, params["o"])


x = jax.random.normal(jax.random.key(1), (2, 10, WIDTH))

# %% [markdown]
# ## A folder, as PEFT writes it
#
# A PEFT folder has two files: the settings, and the factors under PyTorch's names. PyTorch stores a
# weight as `(out, in)`, so `lora_A` is `(rank, in)` and `lora_B` is `(out, rank)`.

# %%
import json
import tempfile
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

folder = Path(tempfile.mkdtemp(), "from-peft")
folder.mkdir()
config = {
    "peft_type": "LORA",
    "base_model_name_or_path": "someone/model",
    "r": 4,
    "lora_alpha": 8,
    "target_modules": ["q_proj", "v_proj"],
    "task_type": "CAUSAL_LM",
}
random = np.random.default_rng(0)
tensors = {
    f"base_model.model.layers.0.self_attn.{module}.lora_{factor}.weight": random.normal(
        size=size
    ).astype(np.float32)
    / 8
    for module in ("q_proj", "v_proj")
    for factor, size in (("A", (4, WIDTH)), ("B", (WIDTH, 4)))
}
(folder / "adapter_config.json").write_text(json.dumps(config))
save_file(tensors, folder / "adapter_model.safetensors")

# %% [markdown]
# ## Names
#
# `names` gives each parameter's name in PyTorch: its module, and which of its axes are inputs. The
# rest follows from the shapes. (`lorax_hf.peft_names` returns the names for transformers' models,
# and `lorax_io.flax_names` those for models that follow Flax's conventions.)

# %%
from lorax_io import Linear, load_peft, save_peft

names = {name: Linear(f"layers.0.self_attn.{name}_proj", in_axes=[0]) for name in "qkv"}
names["o"] = Linear("layers.0.self_attn.o_proj", in_axes=[0, 1])

frozen, tunable = load_peft(folder, params, names)
print("a of q:", tunable["q"].a.shape, "  b of q:", tunable["q"].b.shape)

# %% [markdown]
# The loaded adapter changes the weight by `alpha / rank · B A` of the file, transposed and with the
# outputs split into heads:

# %%
from lorax import materialize

prefix = "base_model.model.layers.0.self_attn.q_proj"
b, a = tensors[f"{prefix}.lora_B.weight"], tensors[f"{prefix}.lora_A.weight"]
expected = (8 / 4 * b @ a).T.reshape(WIDTH, HEADS, SIZE)
change = materialize(frozen["q"], tunable["q"]) - params["q"]
print("the same:", bool(jnp.allclose(change, expected, atol=1e-5)))

# %% [markdown]
# If a folder does not fit, an error gives the reason, and nothing is loaded:

# %%
from lorax_io import AdapterError

try:
    load_peft(folder, params, names | {"q": Linear("layers.1.self_attn.q_proj", in_axes=[0])})
except AdapterError as error:
    print(type(error).__name__, "\n", str(error).replace(str(folder), "from-peft"))

# %% [markdown]
# ## Continue training

# %%
import optax

from lorax import lora

adapted = lora(model)
optimizer = optax.adam(1e-2)
target = jnp.flip(x, axis=-1)


@jax.jit
def step(tunable, state, frozen):
    loss_fn = lambda tunable: jnp.mean((adapted((frozen, tunable), x) - target) ** 2)
    loss, grads = jax.value_and_grad(loss_fn)(tunable)
    updates, state = optimizer.update(grads, state, tunable)
    return optax.apply_updates(tunable, updates), state, loss


state = optimizer.init(tunable)
for k in range(101):
    tunable, state, loss = step(tunable, state, frozen)
    if k % 50 == 0:
        print(f"step {k:3}: {loss:.3f}")

# %% [markdown]
# ## Save it for PEFT

# %%
back = folder.parent / "to-peft"
save_peft(back, tunable, names, base_model="someone/model", task_type="CAUSAL_LM")
print(sorted(path.name for path in back.iterdir()))
written = json.loads((back / "adapter_config.json").read_text())
print({key: written[key] for key in ("r", "lora_alpha", "target_modules")})

# %% [markdown]
# In PyTorch, `peft.PeftModel.from_pretrained(model, "to-peft")` loads it. `nox -s peft` compares
# the outputs of both for the models of transformers. The `lorax` command does much of this
# without Python code:
#
# ```bash
# lorax inspect to-peft                      # format, ranks, scales, targets, norms
# lorax verify to-peft --base model/         # every check of loading
# lorax merge to-peft --base model/ --out merged/
# ```
#
# See also [adapters on disk](../adapters.md): other formats, merged models, the Hub.
