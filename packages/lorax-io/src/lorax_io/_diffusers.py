"""The one file that diffusers reads adapters from."""

import json
import os
from pathlib import Path
from typing import Any

from ._errors import UnsupportedAdapterError
from ._export import export
from ._files import make_folder
from ._host import one_writer
from ._layouts import Names, as_layouts
from ._tensors import write_tensors

WEIGHTS_NAME = "pytorch_lora_weights.safetensors"
METADATA_KEY = "lora_adapter_metadata"


def save_diffusers(
    folder: str | os.PathLike[str],
    tunable: Any,
    names: Names,
    *,
    prefix: str = "transformer",
    fold_scale: bool = False,
) -> Path:
    """Writes `pytorch_lora_weights.safetensors` for `pipeline.load_lora_weights(folder)`.

    diffusers takes alpha for the rank unless the file's header has the adapter's config; it is
    written there. Readers that know nothing of it want `fold_scale`.

    Args:
        folder: it is made if need be.
        tunable: the second tree of `lorax.init_lora`.
        names: the layout of each parameter, by its path: `Linear` and `Conv` only.
        prefix: the part of the pipeline: "transformer", "unet" or "text_encoder"; "" for the
            model's own `load_lora_adapter(folder, prefix=None)`.
        fold_scale: whether `b` is multiplied by the scale, so that alpha is the rank.

    Returns:
        The file.

    Raises:
        AdapterMismatchError: where `names` does not fit the tree.
        UnsupportedAdapterError: where a parameter is trained in full, or is an embedding.

    Example:
        >>> import jax, jax.numpy as jnp, lorax, tempfile
        >>> from lorax_io import Linear, save_diffusers
        >>> params = {"to_q": jnp.ones((5, 3))}
        >>> frozen, tunable = lorax.init_lora(params, {"to_q": 2}, jax.random.key(0))
        >>> names = {"to_q": Linear("transformer_blocks.0.attn.to_q")}
        >>> save_diffusers(tempfile.mkdtemp(), tunable, names).name
        'pytorch_lora_weights.safetensors'
    """
    folder = Path(folder)
    found = export(folder, tunable, as_layouts(names), fold_scale=fold_scale)
    for name in found.tensors:
        if not name.endswith((".lora_A.weight", ".lora_B.weight")):
            raise UnsupportedAdapterError(
                folder, f"diffusers reads factors of linear and convolution layers, not `{name}`."
            )
    begin = f"{prefix}." if prefix else ""
    config = {f"{begin}{key}": value for key, value in found.config.to_json().items()}
    header = {"format": "pt", METADATA_KEY: json.dumps(config, sort_keys=True)}
    with one_writer() as writer:
        if writer:
            make_folder(folder)
            tensors = {f"{begin}{name}": tensor for name, tensor in found.tensors.items()}
            write_tensors(folder / WEIGHTS_NAME, tensors, header)
    return folder / WEIGHTS_NAME
