"""Files in the names of the original diffusion models: ai-toolkit's and ComfyUI's.

A name is `diffusion_model.` and a module of the model's own code, as
`diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight`. A product of q, k and v stays one.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np

from .._disk.arrays import one_writer
from .._disk.tensors import write_tensors
from .._errors import UnsupportedAdapterError, about
from .._plain_layouts import Names, as_layouts
from . import flux
from .diffusers import peft_key
from .export import export
from .format import Content, Format
from .fused import A, B, in_original
from .self_described import ALPHA, self_described
from .source import Source, plain_keys, stored

PREFIX = "diffusion_model."


def _recognizes(content: Content) -> bool:
    return any(name.startswith(PREFIX) for name in content.file.entries)


def _read(content: Content) -> Source:
    tensors = plain_keys(stored(content.file), PREFIX)
    return self_described({peft_key(key): tensor for key, tensor in tensors.items()})


def save_original(path: str | os.PathLike[str], tunable: Any, names: Names) -> None:
    """Writes a file for ComfyUI and ai-toolkit, in the names of a model's own code.

    Flux in the names of diffusers gets those of its own code: the adapters of q, k and v become one
    of the product of them. That is exact: of the same rank where they share their first factor, and
    else of all ranks together, in blocks.

    Args:
        path: the file.
        tunable: the second tree of `lorax.init_lora`.
        names: the layout of each parameter, by its path.

    Raises:
        AdapterMismatchError: where `names` does not fit the tree.
        UnsupportedAdapterError: where it is not plain LoRA, or a module of Flux has no name there.

    Example:
        >>> import jax, jax.numpy as jnp, lorax, pathlib, tempfile
        >>> from lorax_io import Linear, open_adapter, save_original
        >>> params = {"q": jnp.ones((6, 6))}
        >>> frozen, tunable = lorax.init_lora(params, {"q": 2}, jax.random.key(0))
        >>> file = pathlib.Path(tempfile.mkdtemp(), "style.safetensors")
        >>> save_original(file, tunable, {"q": Linear("single_transformer_blocks.0.attn.to_q")})
        >>> list(open_adapter(file).rows)
        ['single_blocks/0/linear1/kernel']
    """
    with about(path):
        tensors, config, _ = export(tunable, as_layouts(names), plain=True)
        if flux.is_of_diffusers(tensors):
            tensors, config = in_original(tensors, config)
        found: dict[str, Any] = {}
        for key, tensor in tensors.items():
            module, _, end = key.rpartition(".lora_")
            if f"lora_{end}" not in (A, B):
                raise UnsupportedAdapterError(
                    f"these files have factors of linear and convolution layers, not `{key}`."
                )
            rank, alpha = config.rank(module), config.alpha(module)
            found[f"{PREFIX}{key}"] = tensor
            found[f"{PREFIX}{module}.{ALPHA}"] = np.asarray(
                alpha * (rank**0.5 if config.use_rslora else 1), np.float32
            )
        with one_writer() as writer:
            if writer:
                write_tensors(Path(path), found, {"format": "pt"})


FORMAT = Format(
    "original",
    "an ai-toolkit or ComfyUI file",
    _recognizes,
    _read,
    saved="save_original",
)
