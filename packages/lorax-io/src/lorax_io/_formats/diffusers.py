"""diffusers' format: `pytorch_lora_weights.safetensors`, and its older names of tensors."""

import dataclasses
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .._disk.arrays import one_writer
from .._disk.files import make_folder
from .._disk.tensors import parse_json, write_tensors
from .._errors import AdapterFileError, AdapterMismatchError, UnsupportedAdapterError, about
from .._plain_names import Names, as_torch_names
from .._torch_names import TorchName, TorchNames
from .._tree import pair_rows
from .export import export, torch_name_of
from .format import Content, Format
from .peft.config import PeftConfig
from .peft.keys import config_of, config_to_json
from .peft.patterns import distrusted
from .peft.tuners import FACTOR
from .self_described import self_described
from .signature import signature
from .source import Source, Stored, plain_keys, stored

WEIGHTS_NAME = "pytorch_lora_weights.safetensors"
METADATA_KEY = "lora_adapter_metadata"
PARTS = (
    *("unet", "transformer", "transformer_2", "prior", "controlnet", "connectors", "vae"),
    *("text_encoder", "text_encoder_2", "text_encoder_3"),
)


def save_diffusers(
    folder: str | os.PathLike[str],
    tunable: Any,
    names: Names,
    *,
    prefix: str | None = "transformer",
    fold_scale: bool = False,
) -> Path:
    """Writes `pytorch_lora_weights.safetensors` for `pipeline.load_lora_weights(folder)`.

    diffusers assumes that alpha equals the rank, unless the file's header has the adapter's config,
    which is written there. Use `fold_scale` for readers that ignore the header.

    Args:
        folder: the folder, which is created if it does not exist.
        tunable: the tunable tree, or the whole `lorax.Pair` for kinds with frozen factors.
        names: the PyTorch name of each parameter, by its path: `Linear` and `Conv` only.
        prefix: the part of the pipeline: "transformer", "unet" or "text_encoder"; "" for the
            model's own `load_lora_adapter(folder, prefix=None)`; None if the names of modules
            already begin with their part, so that there may be several.
        fold_scale: whether to multiply `b` by the scale, so that alpha equals the rank.

    Returns:
        The path of the file.

    Raises:
        AdapterMismatchError: if `names` does not fit the tree.
        UnsupportedAdapterError: if a parameter is trained in full, is an embedding, or has an
            adapter other than plain LoRA.

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
        found_rows, frozen = pair_rows(tunable)
        rows = {row.path: row.leaf for row in found_rows}
        torch_names = as_torch_names(names)
        tensors: dict[str, Any] = {}
        config: dict[str, Any] = {}
        for part, paths in _by_part(rows, torch_names, prefix).items():
            begin = f"{part}." if part else ""
            within = {path: torch_names[path] for path in paths if path in torch_names}
            if prefix is None:
                within = {p: _without(x, begin) for p, x in within.items()}
            part_rows = {path: rows[path] for path in paths if path in rows}
            exported = export(part_rows, within, fold_scale=fold_scale, plain=True, frozen=frozen)
            _check_factors(exported.tensors)
            tensors |= {f"{begin}{name}": tensor for name, tensor in exported.tensors.items()}
            config |= {f"{begin}{key}": v for key, v in config_to_json(exported.config).items()}
        header = {"format": "pt", METADATA_KEY: json.dumps(config, sort_keys=True), **signature()}
        with one_writer() as writer:
            if writer:
                make_folder(folder)
                write_tensors(folder / WEIGHTS_NAME, tensors, header)
    return folder / WEIGHTS_NAME


def _check_factors(names: Iterable[str]) -> None:
    for name in names:
        if not name.endswith((".lora_A.weight", ".lora_B.weight")):
            raise UnsupportedAdapterError(
                f"diffusers reads factors of linear and convolution layers, not `{name}`."
            )


def _by_part(
    rows: Mapping[str, Any], names: TorchNames, prefix: str | None
) -> dict[str, list[str]]:
    """The paths of each part: all in `prefix`, or by the beginnings of their modules' names."""
    if prefix is not None:
        return {prefix: [*names, *(path for path in rows if path not in names)]}
    parts: dict[str, list[str]] = {}
    for path in rows:
        module = torch_name_of(names, path).module
        part = _part(module)
        if not part:
            raise AdapterMismatchError(
                f"`{module}` begins with no part of a pipeline ({', '.join(PARTS)}). Give `prefix`."
            )
        parts.setdefault(part, []).append(path)
    return parts


def _without(torch_name: TorchName, begin: str) -> TorchName:
    return dataclasses.replace(torch_name, module=torch_name.module.removeprefix(begin))


# The names of factors in files of older releases of diffusers, as PEFT's names.
_KEYS: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), put)
    for pattern, put in (
        (r"\.processor\.to_out_lora\.(down|up)\.weight$", r".to_out.0.lora.\1.weight"),
        (r"\.processor\.(\w+)_lora\.(down|up)\.weight$", r".\1.lora.\2.weight"),
        (r"\.self_attn\.to_([qkv])_lora\.(down|up)\.weight$", r".self_attn.\1_proj.lora.\2.weight"),
        (r"\.self_attn\.to_out_lora\.(down|up)\.weight$", r".self_attn.out_proj.lora.\1.weight"),
        (r"\.lora_linear_layer\.(down|up)\.weight$", r".lora.\1.weight"),
        (r"\.(?:lora\.|lora_)down\.weight$", ".lora_A.weight"),
        (r"\.(?:lora\.|lora_)up\.weight$", ".lora_B.weight"),
    )
)
_FACTOR = re.compile(r"\.lora_[AB]\.weight$")


def peft_key(key: str) -> str:
    """PEFT's key for a tensor with any of the older names."""
    for pattern, put in _KEYS:
        key = pattern.sub(put, key)
    return key


def _recognizes(content: Content) -> bool:
    names = content.file.entries
    if METADATA_KEY in content.file.metadata:
        return True
    if any(name.startswith(("base_model.", "lora_", "lycoris_")) for name in names):
        return False
    return any(_FACTOR.search(peft_key(name)) for name in names)


def _read(content: Content) -> Source:
    tensors = stored(content.file)
    configs = _configs(content)
    parts = {_part(name) for name in tensors}
    if configs:  # a part without a config has a scale of 1; a name without a part is an error
        parts = {*configs} if "" in configs else {*configs, *parts} - {""}
    # If all tensors are of one part, it is removed from their names; otherwise names keep it.
    part = next(iter(parts)) if len(parts) == 1 else None
    prefix = f"{part}." if part else ""
    tensors = _renamed(plain_keys(tensors, prefix))
    if part is not None and configs:
        return Source(tensors, configs[part], part=part)
    scales: dict[str, float] = {}
    for key in tensors:
        name, _, module = key.partition(".")
        if name in configs and (match := FACTOR.search(key)):
            module = key[: match.start()]
            scales[module] = _scale(configs[name], module.removeprefix(f"{name}."))
    return self_described(tensors, scales=scales, part=part)


def _scale(config: PeftConfig, module: str) -> float:
    with distrusted():
        return config.scale(module)


def _renamed(tensors: Mapping[str, Stored]) -> dict[str, Stored]:
    renamed: dict[str, Stored] = {}
    for key, tensor in tensors.items():
        name = peft_key(key)
        if name in renamed:
            raise AdapterFileError(
                f"has `{tensor.name}` and `{renamed[name].name}`, which are the same tensor."
            )
        renamed[name] = tensor
    return renamed


def _part(name: str) -> str:
    """The part of a pipeline that a name begins with; "" if it does not begin with one."""
    first = name.partition(".")[0]
    return first if first in PARTS else ""


def _configs(content: Content) -> dict[str, PeftConfig]:
    """The configs in a header, by part of the pipeline; by "" if it is of a single model."""
    if METADATA_KEY not in content.file.metadata:
        return {}
    header = parse_json(content.file.metadata[METADATA_KEY])
    if not isinstance(header, dict):
        raise AdapterFileError(f"its header has no object under {METADATA_KEY!r}.")
    if "peft_type" in header or "r" in header:
        return {"": config_of(header)}
    parts: dict[str, dict[str, Any]] = {}
    for key, value in header.items():
        part, _, rest = key.partition(".")
        parts.setdefault(part, {})[rest] = value
    return {part: config_of(values) for part, values in parts.items()}


FORMAT = Format(
    "diffusers",
    "a diffusers file",
    _recognizes,
    _read,
    files=(WEIGHTS_NAME,),
    saved="save_diffusers",
)
