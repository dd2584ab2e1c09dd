# %% [markdown]
# # Adapt a vision model
#
# A small vision transformer in Flax NNX learns the handwritten digits of scikit-learn. Then its
# images change: they are inverted and rotated by 90 degrees. LoRA on every kernel learns the new
# images from 600 examples, with an eighth of the parameters. The base does not change.

# %% [markdown]
# ## The images
#
# scikit-learn includes 1,797 images of digits, of 8 × 8 pixels each. A third is held out.

# %%
import jax
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx
from matplotlib_inline.backend_inline import set_matplotlib_formats
from sklearn.datasets import load_digits

set_matplotlib_formats("svg")

digits = load_digits()
order = np.random.default_rng(0).permutation(len(digits.images))
images = (digits.images[order, :, :, None] / 16).astype(np.float32)  # [1797, 8, 8, 1], in 0 … 1
labels = digits.target[order]
train, held_out = slice(0, 1200), slice(1200, None)

changed = 1 - np.rot90(images, axes=(1, 2))  # inverted, and rotated by 90 degrees

figure, panels = plt.subplots(2, 8, figsize=(8, 2))
for row, pictures in zip(panels, (images, changed), strict=True):
    for panel, picture in zip(row, pictures, strict=False):
        panel.imshow(picture[..., 0], cmap="gray", vmin=0, vmax=1)
        panel.axis("off")

# %% [markdown]
# ## The model
#
# A convolution splits an image into 16 patches. Blocks of attention and an MLP follow. The model
# has no LoRA code.

# %%
WIDTH, HEADS, DEPTH = 48, 4, 3


class Block(nnx.Module):
    def __init__(self, rngs):
        self.norm_1, self.norm_2 = nnx.LayerNorm(WIDTH, rngs=rngs), nnx.LayerNorm(WIDTH, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, rngs=rngs)
        self.up = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs)
        self.down = nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.norm_1(x))
        return x + self.down(nnx.gelu(self.up(self.norm_2(x))))


class VisionTransformer(nnx.Module):
    def __init__(self, rngs):
        self.patches = nnx.Conv(1, WIDTH, (2, 2), strides=2, rngs=rngs)
        self.position = nnx.Param(0.1 * jax.random.normal(rngs.params(), (16, WIDTH)))
        self.blocks = nnx.List([Block(rngs) for _ in range(DEPTH)])
        self.head = nnx.Linear(WIDTH, 10, rngs=rngs)

    def __call__(self, images):
        x = self.patches(images)  # [batch, 4, 4, width]
        x = x.reshape(len(x), 16, WIDTH) + self.position[...]
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


graph, params = nnx.split(VisionTransformer(nnx.Rngs(0)))


def model(params, images):
    return nnx.merge(graph, params)(images)


# %% [markdown]
# ## The base
#
# The function `fit` trains the parameters of the base here, and the adapter below. It takes a
# function `logits(trained, images)`, whose first argument is the tree to train.


# %%
def fit(logits, trained, images, labels, steps, rate, held_out):
    optimizer = optax.adam(optax.cosine_decay_schedule(rate, steps))

    @jax.jit
    def step(trained, state, images, labels):
        def loss_fn(trained):
            found = logits(trained, images)
            return optax.softmax_cross_entropy_with_integer_labels(found, labels).mean()

        loss, grads = jax.value_and_grad(loss_fn)(trained)
        updates, state = optimizer.update(grads, state, trained)
        return optax.apply_updates(trained, updates), state, loss

    state, curve = optimizer.init(trained), []
    draw = np.random.default_rng(1)
    for k in range(steps):
        rows = draw.integers(0, len(images), 64)
        trained, state, _ = step(trained, state, images[rows], labels[rows])
        if k % 10 == 9:
            curve.append((k + 1, accuracy(logits, trained, *held_out)))
    return trained, np.array(curve)


def accuracy(logits, trained, images, labels):
    return float((jax.jit(logits)(trained, images).argmax(-1) == labels).mean())


old = images[held_out], labels[held_out]
new = changed[held_out], labels[held_out]
params, _ = fit(model, params, images[train], labels[train], 300, 3e-3, old)
print(f"old images {accuracy(model, params, *old):.3f}")
print(f"new images {accuracy(model, params, *new):.3f}")

# %% [markdown]
# ## Adapt
#
# `infer_spec` finds the kernel of the convolution, and the kernels of attention with their head
# axes. NNX paths may continue after the name of the variable, so patterns end in a star. The
# convolution's kernel is so small that `infer_spec` would leave it out with a warning;
# `skip_small=False` includes it.

# %%
from lorax import count_params, explain, infer_spec, init_lora, lora, merge_params

spec = infer_spec(model, params, images[:2], rank=4, where="*kernel*", skip_small=False)
frozen, tunable = init_lora(params, spec, jax.random.key(0))
print(explain(model, (frozen, tunable), images[:2]))

# %% [markdown]
# ## Train on 600 images
#
# For comparison, full fine-tuning starts from the same parameters and uses the same images.

# %%
adapted = lora(model)
few = changed[:600], labels[:600]
with_lora = lambda tunable, images: adapted((frozen, tunable), images)
tunable, lora_curve = fit(with_lora, tunable, *few, 200, 1e-2, new)
tuned, full_curve = fit(model, params, *few, 200, 3e-3, new)

for name, trained in (("LoRA", tunable), ("full fine-tuning", params)):
    print(f"{name:17} {count_params(trained):7,} parameters are trained")

# %%
figure, panel = plt.subplots(figsize=(6.4, 3.2), layout="constrained")
panel.axhline(accuracy(model, params, *new), color="0.6", linestyle="--", label="base")
panel.plot(*full_curve.T, label="full fine-tuning")
panel.plot(*lora_curve.T, label="LoRA, rank 4")
panel.set(xlabel="step", ylabel="accuracy on new images, held out", ylim=(0, 1.02))
panel.spines[["top", "right"]].set_visible(False)
_ = panel.legend(frameon=False)
# %% [markdown]
# ## Merge
#
# `nnx.update(model, merged)` puts the merged parameters into a module. For the old images, you can
# still use the base without the adapter. Full fine-tuning leaves only one model, for the new
# images.

# %%
merged = merge_params(frozen, tunable)
assert np.allclose(model(merged, new[0]), with_lora(tunable, new[0]), atol=1e-3)

print("                  old images  new images")
for name, parameters in (("base", params), ("LoRA, merged", merged), ("fully tuned", tuned)):
    row = (accuracy(model, parameters, *pictures) for pictures in (old, new))
    print(f"{name:17} {next(row):10.3f} {next(row):11.3f}")

# %% [markdown]
# Next: [several adapters over one base](many_adapters.md), or [choosing a kind, rank and learning
# rate](../choosing.md).
