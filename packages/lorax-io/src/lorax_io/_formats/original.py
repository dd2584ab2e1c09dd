"""Files with the module names of a diffusion model's own code, as of ai-toolkit and ComfyUI.

A name is `diffusion_model.` and a module of the model's code, such as
`diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight`. q, k and v are one fused module.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np

from .._disk.arrays import one_writer
from .._disk.tensors import write_tensors
from .._errors import UnsupportedAdapterError, about
from .._plain_names import Names, as_torch_names
from .diffusers import peft_key
from .export import export
from .format import Content, Format
from .fused import A, B, in_original, is_flux
from .self_described import ALPHA, self_described
from .signature import signature
from .source import Source, plain_keys, stored

PREFIX = "diffusion_model."


def _recognizes(content: Content) -> bool:
    return any(name.startswith(PREFIX) for name in content.file.entries)


def _read(content: Content) -> Source:
    tensors = plain_keys(stored(content.file), PREFIX)
    return self_described({peft_key(key): tensor for key, tensor in tensors.items()})


def save_original(path: str | os.PathLike[str], tunable: Any, names: Names) -> None:
    """Writes a file for ComfyUI and ai-toolkit, with the module names of the model's own code.

    Flux adapters in the names of diffusers are converted to those of Flux's own code: the adapters
    of q, k and v become one adapter of the fused module. The conversion is exact. The rank stays
    the same if q, k and v share `a`, and is the sum of their ranks otherwise.

    Args:
        path: the file.
        tunable: the tunable tree.
        names: the PyTorch name of each parameter, by its path.

    Raises:
        AdapterMismatchError: if `names` does not fit the tree.
        UnsupportedAdapterError: if it is not plain LoRA, or Flux's code has no such module.

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
        torch_names = as_torch_names(names)
        tensors, config, _ = export(tunable, torch_names, plain=True)
        if is_flux(tensors, torch_names):
            tensors, config = in_original(tensors, config)
        found: dict[str, Any] = {}
        for key, tensor in tensors.items():
            module, _, end = key.rpartition(".lora_")
            if f"lora_{end}" not in (A, B):
                raise UnsupportedAdapterError(
                    f"these files have factors of linear and convolution layers, not `{key}`."
                )
            alpha = np.asarray(config.standard_alpha(module), np.float32)
            found |= {f"{PREFIX}{key}": tensor, f"{PREFIX}{module}.{ALPHA}": alpha}
        with one_writer() as writer:
            if writer:
                write_tensors(Path(path), found, {"format": "pt", **signature()})


FORMAT = Format(
    "original",
    "an ai-toolkit or ComfyUI file",
    _recognizes,
    _read,
    saved="save_original",
)
