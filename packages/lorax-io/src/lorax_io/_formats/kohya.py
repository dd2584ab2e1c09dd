"""The format of kohya's sd-scripts, which A1111 and ComfyUI read, and LyCORIS's keys in it.

A module's name has `_` in place of each `.`: `lora_unet_down_blocks_0_…_to_q.lora_down.weight`,
`.lora_up.weight` and `.alpha`. The file does not tell which `_` were dots; `resolve` finds the
module in a base.
"""

import dataclasses
import math
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .._disk.arrays import one_writer
from .._disk.tensors import write_tensors
from .._errors import AdapterFileError, AdapterMismatchError, UnsupportedAdapterError, about
from .._plain_names import Names, as_torch_names
from .._torch_names import MAGNITUDE, TorchName, TorchNames
from .diffusers import peft_key
from .export import export
from .format import Content, Format
from .fused import in_original, is_flux
from .peft.config import PeftConfig
from .peft.tuners import FACTOR
from .self_described import self_described
from .signature import signature
from .source import Source, Stored, stored

_NAME = re.compile(
    r"(?P<part>lora_(?:unet|te[123]?|transformer|prior)|lycoris)_(?P<module>[^.]+)\."
)
# The folders of a pipeline that each prefix may stand for.
_FOLDERS = {
    "lora_unet": ("unet", "transformer"),
    "lora_transformer": ("transformer",),
    "lora_prior": ("prior",),
    "lora_te": ("text_encoder",),
    "lora_te1": ("text_encoder",),
    "lora_te2": ("text_encoder_2",),
    "lora_te3": ("text_encoder_3",),
    "lycoris": ("unet", "transformer"),
}
_DORA = ".dora_scale"
_BEYOND = {  # keys of adapters that are not read, and what they are
    "bias_indices": "sparse biases",
    "oft_blocks": "rotations in LyCORIS's form (OFT)",
    "a1.weight": "a product with the base (GLoRA)",
    "on_input": "gains in LyCORIS's form (IA³)",
    "diff": "whole differences of weights",
    "diff_b": "differences of biases",
    "w_norm": "differences of norms",
    "b_norm": "differences of norms",
    "scalar": "a trained scale for each module (LyCORIS's `use_scalar`)",
    "lora_down.bias": "biases in its factors",
    "lora_up.bias": "biases in its factors",
}


def _recognizes(content: Content) -> bool:
    return any(_NAME.match(name) for name in content.file.entries)


def _read(content: Content) -> Source:
    tensors = stored(content.file)
    for name in tensors:
        match = _NAME.match(name)
        if match is None:
            raise AdapterFileError(f"has `{name}`, whose name does not begin as kohya's do.")
        if (key := name[match.end() :]) in _BEYOND:
            raise UnsupportedAdapterError(
                f"`{name}` is of an adapter with {_BEYOND[key]}. This is not read. Merge it with "
                "the library that wrote it."
            )
    if scaled := next((name for name in tensors if name.endswith(_DORA)), None):
        others = [name for name in tensors if ".hada_" in name or ".lokr_" in name]
        if others:
            raise UnsupportedAdapterError(
                f"has `{scaled}` and `{others[0]}`: DoRA of LoHa or LoKr, whose norm would need "
                "an array as large as the weight. Merge it with LyCORIS."
            )
    return self_described(dict(_in_peft(name, tensor) for name, tensor in tensors.items()))


def _in_peft(name: str, tensor: Stored) -> tuple[str, Stored]:
    """A tensor under PEFT's key; DoRA's magnitudes are reshaped as in PEFT."""
    if not name.endswith(_DORA):
        return peft_key(name), tensor
    shape = tensor.shape
    if len(shape) < 2 or math.prod(shape) != shape[0]:
        raise UnsupportedAdapterError(
            f"has `{name}` of shape {shape}, magnitudes of the inputs; those of the outputs, as in "
            "DoRA, are read. Merge the adapter with LyCORIS."
        )
    flat = shape[:1] if len(shape) == 2 else (1, *shape[:1], *shape[2:])
    return f"{name.removesuffix(_DORA)}.{MAGNITUDE}", tensor.shaped(flat)


def resolve(name: str, known: Iterable[str], parts: Iterable[str]) -> str:
    """The base's tensor that a kohya name stands for.

    Args:
        name: a module's kohya name, followed by `.weight`.
        known: the names of the base's tensors.
        parts: the folders of the base, if it is a pipeline.

    Raises:
        AdapterMismatchError: if no tensor matches, or several do.
    """
    match = _NAME.match(name)
    assert match is not None, name
    parameter = name[match.end() :]
    folders = [folder for folder in _FOLDERS[match["part"]] if folder in {*parts}]
    flat: dict[str, set[str]] = {}
    for module in _modules(known, parameter):
        flat.setdefault(module.replace(".", "_"), set()).add(module)
    ends = [f"{folder}_{match['module']}" for folder in folders] or [match["module"]]
    candidates = {module for end in ends for module in flat.get(end, ())}
    if not candidates and not folders:
        inner = [text for text in flat if text.endswith(f"_{ends[0]}")]
        candidates = {module for text in inner for module in flat[text]}
    if len(candidates) != 1:
        several = (
            f"several, as `{min(candidates)}` and `{max(candidates)}`" if candidates else "none"
        )
        raise AdapterMismatchError(
            f"adapts `{name}`, and of the base's modules {several} would have that name with `_` "
            "for each `.`. Give the base that the adapter was made for: a pipeline's folder for "
            "the names of diffusers, the model's single file for those of the original code."
        )
    return f"{candidates.pop()}.{parameter}"


def with_flat_names(names: TorchNames, keys: Iterable[str]) -> dict[str, TorchName]:
    """The PyTorch names, with a file's kohya names for the modules that it has."""
    begins = {match["part"] for key in keys if (match := _NAME.match(key))}
    known = {key[: match.end() - 1] for key in keys if (match := _NAME.match(key))}
    torch_names: dict[str, TorchName] = {}
    for path, torch_name in names.items():
        flat = {f"{begin}_{torch_name.module.replace('.', '_')}" for begin in begins}
        here = sorted(flat & known) or [name for name in sorted(flat) if "{}" in name][:1]
        if len(here) > 1:
            raise AdapterMismatchError(f"has `{here[0]}` and `{here[1]}` for `{path}`.")
        torch_names[path] = dataclasses.replace(torch_name, module=here[0]) if here else torch_name
    return torch_names


def _modules(known: Iterable[str], parameter: str) -> list[str]:
    ending = f".{parameter}"
    return [name.removesuffix(ending) for name in known if name.endswith(ending)]


def save_kohya(
    path: str | os.PathLike[str], tunable: Any, names: Names, *, prefix: str = "lora_unet"
) -> None:
    """Writes a file for kohya's scripts, A1111 and ComfyUI.

    Each module has its own `lora_down`, `lora_up` and `alpha`, so ranks and scales may differ. LoHa
    and LoKr are written with LyCORIS's keys. Flux adapters in the names of diffusers are converted
    to those of Flux's own code, with q, k and v fused.

    Args:
        path: the file.
        tunable: the tunable tree, or the whole `lorax.Pair` for kinds with frozen factors.
        names: the PyTorch name of each parameter, by its path.
        prefix: the prefix of names: "lora_unet", or "lora_te1" or "lora_te2" for text encoders.

    Raises:
        AdapterMismatchError: if `names` does not fit the tree, or two modules get the same name.
        UnsupportedAdapterError: if the format cannot hold a parameter or its kind of adapter.

    Example:
        >>> import jax, jax.numpy as jnp, lorax, pathlib, tempfile
        >>> from lorax_io import Linear, open_adapter, save_kohya
        >>> params = {"to_q": jnp.ones((5, 3))}
        >>> frozen, tunable = lorax.init_lora(params, {"to_q": 2}, jax.random.key(0))
        >>> file = pathlib.Path(tempfile.mkdtemp(), "style.safetensors")
        >>> save_kohya(file, tunable, {"to_q": Linear("mid_block.attn.to_q")})
        >>> list(open_adapter(file).rows)
        ['lora_unet_mid_block_attn_to_q/kernel']
    """
    with about(path):
        if _NAME.match(f"{prefix}_x.") is None:
            raise AdapterMismatchError(f"prefix={prefix!r} is not one of {', '.join(_FOLDERS)}.")
        torch_names = as_torch_names(names)
        exported = export(tunable, torch_names, lycoris=True)
        tensors, config = exported.tensors, exported.config
        if prefix == "lora_unet" and is_flux(tensors, torch_names):
            tensors, config = in_original(tensors, config)
        tensors = _flat(tensors, config, prefix)
        with one_writer() as writer:
            if writer:
                write_tensors(Path(path), tensors, {"format": "pt", **signature()})


def _flat(tensors: Mapping[str, Any], config: PeftConfig, prefix: str) -> dict[str, Any]:
    if config.peft_type not in ("LORA", "LOHA", "LOKR"):
        raise UnsupportedAdapterError("kohya's files support only LoRA, DoRA, LoHa and LoKr.")
    if config.use_bdlora or config.trainable_token_indices:
        raise UnsupportedAdapterError("kohya's files support neither BD-LoRA nor trainable tokens.")
    renamed: dict[str, Any] = {}
    modules: dict[str, str] = {}
    for key, tensor in tensors.items():
        match = FACTOR.search(key)
        if match is None or "embedding" in match[1]:
            raise UnsupportedAdapterError(
                f"kohya's files have factors of linear and convolution layers, not `{key}`."
            )
        module = key[: match.start()]
        name = f"{prefix}_{module.replace('.', '_')}"
        if modules.setdefault(name, module) != module:
            raise AdapterMismatchError(
                f"`{module}` and `{modules[name]}` are both called `{name}`."
            )
        end = {"lora_A.weight": "lora_down.weight", "lora_B.weight": "lora_up.weight"}
        if match[1] == MAGNITUDE:
            window = tensor.shape[2:]
            renamed[f"{name}{_DORA}"] = tensor.reshape(tensor.size, 1, *window)
        else:
            renamed[f"{name}.{end.get(match[1], match[1])}"] = tensor
        alpha = config.standard_alpha(module)
        if {f"{module}.lokr_w1", f"{module}.lokr_w2"} <= tensors.keys():
            # LoKr of two whole matrices has no rank, and readers ignore alpha: the scale is
            # multiplied into the first.
            if match[1] == "lokr_w1":
                renamed[f"{name}.lokr_w1"] = (tensor * config.scale(module)).astype(tensor.dtype)
            alpha = 1
        renamed[f"{name}.alpha"] = np.asarray(alpha, np.float32)
    return renamed


FORMAT = Format("kohya", "a kohya or LyCORIS file", _recognizes, _read, saved="save_kohya")
