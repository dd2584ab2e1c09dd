"""The one file that diffusers reads adapters from."""

import json
import os
from pathlib import Path
from typing import Any

from .._disk.arrays import one_writer
from .._disk.files import make_folder
from .._disk.tensors import parse_json, write_tensors
from .._errors import AdapterFileError, UnsupportedAdapterError, about
from .._layouts import Names, as_layouts
from .export import export
from .format import Content, Format
from .peft.keys import config_of, config_to_json
from .source import Source, plain_keys, stored

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
    with about(folder):
        found = export(tunable, as_layouts(names), fold_scale=fold_scale, plain=True)
        for name in found.tensors:
            if not name.endswith((".lora_A.weight", ".lora_B.weight")):
                raise UnsupportedAdapterError(
                    f"diffusers reads factors of linear and convolution layers, not `{name}`."
                )
        begin = f"{prefix}." if prefix else ""
        config = {f"{begin}{key}": v for key, v in config_to_json(found.config).items()}
        header = {"format": "pt", METADATA_KEY: json.dumps(config, sort_keys=True)}
        with one_writer() as writer:
            if writer:
                make_folder(folder)
                tensors = {f"{begin}{name}": tensor for name, tensor in found.tensors.items()}
                write_tensors(folder / WEIGHTS_NAME, tensors, header)
    return folder / WEIGHTS_NAME


def _recognizes(content: Content) -> bool:
    return METADATA_KEY in content.file.metadata


def _read(content: Content) -> Source:
    found = parse_json(content.file.metadata[METADATA_KEY])
    if not isinstance(found, dict):
        raise AdapterFileError(f"its header has no object under {METADATA_KEY!r}.")
    parts = {""} if "r" in found else {key.partition(".")[0] for key in found}
    if len(parts) != 1:
        raise UnsupportedAdapterError("is for several parts of a pipeline.")
    part = parts.pop()
    prefix = f"{part}." if part else ""
    config = config_of({key.removeprefix(prefix): value for key, value in found.items()})
    return Source(plain_keys(stored(content.file), prefix), config, part=part)


FORMAT = Format("diffusers", "a file for diffusers", _recognizes, _read, (WEIGHTS_NAME,))
