"""Files of every format, and helpers of their tests."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors.numpy

import lorax

ATTN = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"


FLAT = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1"


CLIP = "text_model.encoder.layers.0.self_attn"


Q = "model.layers.0.self_attn.q_proj"


RANK, OUT, IN = 2, 6, 5


def save(tensors, name: Any = "a.safetensors", metadata=None):
    safetensors.numpy.save_file(dict(tensors), name, metadata or {"format": "pt"})
    return name


ALPHA = np.asarray(1, np.float32)


PEFT = (".lora_A.weight", ".lora_B.weight")


KOHYA = (".lora_down.weight", ".lora_up.weight")


UNET, TEXT, TO_Q = f"unet.{ATTN}.to_q", f"text_encoder.{CLIP}", f"{ATTN}.to_q"


QKV = "double_blocks.0.img_attn.qkv"


def delta_of(row, shape=(IN, OUT)):
    """The delta in PyTorch's layout."""
    return np.asarray(lorax.materialize(jnp.zeros(shape), row)).T


def make_tunable(files, scaling="standard"):
    weight = lambda a, b, alpha, **axes: lorax.LoraWeight(  # noqa: E731
        jnp.asarray(a), jnp.asarray(b), a.shape[-1], alpha, scaling, **axes
    )
    return {
        "q": weight(files.draw(IN, 2), files.draw(2, OUT), 3.0),
        "conv": weight(
            files.draw(3, 2, 4, 4), files.draw(4, 7), None, in_axes=(0, 1, 2), out_axes=(3,)
        ),
        "stack": weight(
            files.draw(3, IN, 2), files.draw(3, 2, OUT), 5.0,
            in_axes=(1,), out_axes=(2,), shared_axes=(0,),
        ),
    }  # fmt: skip
