"""Writes adapters as GGUF files, which llama.cpp loads together with a model: `llama-cli --lora`.

Such files are not read: they are only meant to be run.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lorax import MissingPackageError

from .._disk.arrays import one_writer
from .._disk.files import regular_file, replacing
from .._disk.tensors import check_finite, read_json
from .._errors import (
    UNEQUAL,
    AdapterMismatchError,
    AdapterWriteError,
    UnsupportedAdapterError,
    about,
)
from .._places import Array
from .._plain_names import Names, as_torch_names
from .export import export
from .peft.tuners import FACTOR

# By `model_type`: llama.cpp's architecture, and whether it permutes the rows of q and k.
KINDS: dict[str, tuple[str, bool]] = {
    "llama": ("llama", True),
    "mistral": ("llama", True),
    "granite": ("granite", True),
    "qwen2": ("qwen2", False),
    "qwen3": ("qwen3", False),
    "gemma": ("gemma", False),
    "gemma2": ("gemma2", False),
    "gemma3_text": ("gemma3", False),
    "phi3": ("phi3", False),
}
_ENDS = {"lora_A.weight": "lora_a", "lora_B.weight": "lora_b"}


def save_gguf(
    path: str | os.PathLike[str],
    tunable: Any,
    names: Names,
    *,
    config: Mapping[str, Any] | str | os.PathLike[str],
) -> None:
    """Writes an adapter for llama.cpp: plain LoRA of linear layers.

    llama.cpp has one alpha for all modules. If ranks or scales differ, `b` is multiplied by the
    scale. For some models, the rows of q and k are permuted to llama.cpp's order. Needs
    `pip install "lorax-io[gguf]"`.

    Args:
        path: the file.
        tunable: the tunable tree, or the whole `lorax.Pair` for kinds with frozen factors.
        names: the PyTorch name of each parameter, by its path.
        config: the base model's `config.json`, as a path or as a dict.

    Raises:
        AdapterMismatchError: if `names` does not fit the tree, or llama.cpp has no tensor for a
            module.
        UnsupportedAdapterError: if the model's type is not known, or the adapter is not plain LoRA
            of linear layers.

    Example:
        >>> import jax, jax.numpy as jnp, lorax, pathlib, tempfile
        >>> from lorax_io import Linear, save_gguf
        >>> params = {"up": jnp.ones((8, 12))}
        >>> names = {"up": Linear("model.layers.0.mlp.up_proj")}
        >>> frozen, tunable = lorax.init_lora(params, {"up": 2}, jax.random.key(0))
        >>> file = pathlib.Path(tempfile.mkdtemp(), "adapter.gguf")
        >>> config = {"model_type": "llama", "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> save_gguf(file, tunable, names, config=config)
        >>> file.exists()
        True
    """
    with about(path):
        values = config if isinstance(config, Mapping) else read_json(regular_file(config))
        kind, is_permuted = _kind(values)
        torch_names = as_torch_names(names)
        exported = export(tunable, torch_names, plain=True)
        one = exported.config
        # llama.cpp reads an alpha of 0 as a scale of 1.
        if one.rank_pattern or one.alpha_pattern or one.use_rslora or one.lora_alpha == 0:
            exported = export(tunable, torch_names, plain=True, fold_scale=True)
        tensors = _in_llama_cpp(exported.tensors, kind, values, is_permuted)
        with one_writer() as writer:
            if writer:
                _write(Path(path), kind, float(exported.config.lora_alpha), tensors)


def _kind(config: Any) -> tuple[str, bool]:
    model = config.get("model_type") if isinstance(config, Mapping) else None
    if model not in KINDS:
        raise UnsupportedAdapterError(
            f"is for a model of the type {model!r}; the supported types are {', '.join(KINDS)}."
        )
    return KINDS[model]


def _in_llama_cpp(
    tensors: Mapping[str, Array], kind: str, config: Mapping[str, Any], is_permuted: bool
) -> dict[str, Array]:
    gguf = import_gguf()
    arch = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == kind)
    known = gguf.get_tensor_name_map(arch, _count(config, "num_hidden_layers"))
    renamed: dict[str, Array] = {}
    for key, tensor in tensors.items():
        match = FACTOR.search(key)
        if match is None or match[1] not in _ENDS or tensor.ndim != 2:
            raise UnsupportedAdapterError(f"llama.cpp reads factors of linear layers, not `{key}`.")
        module = key[: match.start()]
        name = known.get_name(f"{module}.weight", try_suffixes=(".weight",))
        if name is None:
            raise AdapterMismatchError(f"llama.cpp has no tensor for `{module}` in {kind} models.")
        if tensor.dtype == np.float64:
            raise UnsupportedAdapterError(f"`{key}` is float64; llama.cpp reads float32. Cast it.")
        check_finite(key, tensor)
        wide = tensor if tensor.dtype == np.float16 else tensor.astype(np.float32)
        if is_permuted and match[1] == "lora_B.weight":
            wide = _in_pairs(wide, name, config)
        renamed[f"{name}.{_ENDS[match[1]]}"] = np.ascontiguousarray(wide)
    return renamed


def _in_pairs(tensor: Array, name: str, config: Mapping[str, Any]) -> Array:
    """The rows of q or k in llama.cpp's order: the two of a rotated pair next to each other."""
    if not name.endswith(("attn_q.weight", "attn_k.weight")):
        return tensor
    heads = _count(config, "num_attention_heads")
    if name.endswith("attn_k.weight"):
        heads = _count(config, "num_key_value_heads", heads)
    out, rank = tensor.shape
    if out % (2 * heads):
        raise AdapterMismatchError(f"has {out} rows for `{name}`, which are not {heads} heads.")
    return tensor.reshape(heads, 2, out // heads // 2, rank).swapaxes(1, 2).reshape(out, rank)


def _count(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    count = config.get(key, default)
    if type(count) is not int or not 1 <= count <= 2**16:
        raise AdapterMismatchError(f"the model's config has {key} = {count!r}, not a count.")
    return count


def _write(path: Path, kind: str, alpha: float, tensors: Mapping[str, Array]) -> None:
    gguf = import_gguf()
    with replacing(path) as unfinished:
        writer = gguf.GGUFWriter(unfinished, kind)
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
        for name, tensor in tensors.items():
            writer.add_tensor(name, tensor)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        written = {tensor.name: tensor.data for tensor in gguf.GGUFReader(unfinished).tensors}
        if written.keys() != tensors.keys() or not all(
            np.array_equal(written[name], tensor) for name, tensor in tensors.items()
        ):
            raise AdapterWriteError(UNEQUAL, path)


def half_order(rows: Array, heads: int) -> Array:
    """Reorders rows from llama.cpp's order to transformers', where a pair is half a head apart."""
    return rows.reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)


def import_gguf() -> Any:
    """Imports the package `gguf`; a `MissingPackageError` names the extra to install."""
    try:
        import gguf
    except ImportError as error:
        raise MissingPackageError(
            'llama.cpp\'s files need gguf: pip install "lorax-io[gguf]"'
        ) from error
    return gguf
