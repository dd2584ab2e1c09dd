"""mlx-lm's folders: `adapters.safetensors`, and one scale in `adapter_config.json`."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .._bases.ties import is_embedding
from .._disk.arrays import one_writer
from .._disk.files import file_in, make_folder, write_text
from .._disk.tensors import is_number, read_json, write_tensors
from .._errors import AdapterFileError, UnsupportedAdapterError, about
from .._plain_names import Names, as_torch_names
from .._torch_names import MAGNITUDE
from .export import export
from .format import Content, Format
from .peft.config import CONFIG_NAME, WEIGHTS, PeftConfig, check_free
from .peft.tuners import FACTOR
from .self_described import self_described
from .signature import signature
from .source import Source, Stored, stored

WEIGHTS_NAME = WEIGHTS["mlx"][0]
_ENDS = {"lora_a": "A", "lora_b": "B", "m": None}


def _recognizes(content: Content) -> bool:
    if content.folder is None:
        return False
    config = read_json(file_in(content.folder, CONFIG_NAME))
    return isinstance(config, dict) and "peft_type" not in config and "fine_tune_type" in config


def _read(content: Content) -> Source:
    assert content.folder is not None
    own = stored(content.file)
    with about(content.folder / CONFIG_NAME):
        config = read_json(file_in(content.folder, CONFIG_NAME))
        kind, scale = config["fine_tune_type"], _scale(config)
    tensors = dict(_in_peft(name, tensor) for name, tensor in own.items())
    if kind == "full":
        modules = sorted({name.rpartition(".")[0] for name in own})
        whole = PeftConfig(target_modules=[], modules_to_save=modules, is_given=False)
        return Source(own, whole)
    if kind not in ("lora", "dora"):
        raise UnsupportedAdapterError(
            f"has fine_tune_type = {kind!r}; lora, dora and full are read."
        )
    modules = {key[: match.start()] for key in tensors if (match := FACTOR.search(key))}
    _check(tensors, sorted(modules), kind, config)
    return self_described(tensors, scales=dict.fromkeys(modules, scale))


def _check(
    tensors: Mapping[str, Stored], modules: Sequence[str], kind: str, config: Mapping[str, Any]
) -> None:
    """Rejects tensors of another kind or rank than the config says; mlx-lm could not load them."""
    rank = config["lora_parameters"].get("rank")
    for module in modules:
        if (f"{module}.{MAGNITUDE}" in tensors) != (kind == "dora"):
            has = "lacks" if kind == "dora" else "has"
            raise AdapterFileError(f"{has} `{module}.m`, and its config says {kind}.")
        first = tensors.get(f"{module}.lora_A.weight")
        if first is not None and rank not in (None, first.shape[0]):
            raise AdapterFileError(
                f"has factors of rank {first.shape[0]} for `{module}`; its config says {rank!r}."
            )


def _scale(config: Mapping[str, Any]) -> float:
    settings = config.get("lora_parameters", {})
    scale = settings.get("scale") if isinstance(settings, dict) else None
    if not is_number(scale) and config["fine_tune_type"] != "full":
        raise AdapterFileError("has no number `scale` in its `lora_parameters`.")
    return 1.0 if scale is None else float(scale)


def _in_peft(name: str, tensor: Stored) -> tuple[str, Stored]:
    """A tensor under PEFT's key, transposed.

    mlx-lm: lora_a [in, rank], lora_b [rank, out]. PEFT: lora_A [rank, in], lora_B [out, rank].
    """
    module, _, end = name.rpartition(".")
    if end not in _ENDS or not module:
        return name, tensor
    if end == "m":
        return f"{module}.{MAGNITUDE}", tensor
    if len(tensor.shape) != 2:
        raise UnsupportedAdapterError(
            f"has `{name}` of shape {tensor.shape}; mlx-lm's factors of experts are not read."
        )
    table = is_embedding(module)
    key = f"lora_embedding_{_ENDS[end]}" if table else f"lora_{_ENDS[end]}.weight"
    return f"{module}.{key}", tensor.turned()


def save_mlx(
    folder: str | os.PathLike[str], tunable: Any, names: Names, *, model: str | None = None
) -> None:
    """Writes a folder for mlx-lm: `mlx_lm.generate --adapter-path`.

    Args:
        folder: the folder, which is created if it does not exist.
        tunable: the tunable tree, or the whole `lorax.Pair` for kinds with frozen factors.
        names: the PyTorch name of each parameter, by its path.
        model: the base's name.

    Raises:
        AdapterMismatchError: if `names` does not fit the tree.
        UnsupportedAdapterError: if the adapter is not LoRA or DoRA of one rank and one scale.

    Example:
        >>> import jax, jax.numpy as jnp, lorax, pathlib, tempfile
        >>> from lorax_io import Linear, open_adapter, save_mlx
        >>> params = {"q": jnp.ones((5, 3))}
        >>> frozen, tunable = lorax.init_lora(params, {"q": 2}, jax.random.key(0))
        >>> folder = pathlib.Path(tempfile.mkdtemp(), "adapter")
        >>> save_mlx(folder, tunable, {"q": Linear("model.layers.0.self_attn.q_proj")})
        >>> open_adapter(folder).format
        'mlx'
    """
    folder = Path(folder)
    with about(folder):
        exported = export(tunable, as_torch_names(names))
        config = exported.config
        if config.peft_type != "LORA" or config.rank_pattern or config.alpha_pattern:
            raise UnsupportedAdapterError(
                "mlx-lm supports only LoRA and DoRA with one rank and scale."
            )
        tensors = dict(_in_mlx(key, tensor) for key, tensor in exported.tensors.items())
        keys = sorted({_within_layer(name.rpartition(".")[0]) for name in tensors})
        divisor = config.r**0.5 if config.use_rslora else config.r
        settings = {
            "fine_tune_type": "dora" if config.use_dora else "lora",
            "model": model,
            "num_layers": -1,
            "lora_parameters": {
                "rank": config.r,
                "scale": config.lora_alpha / divisor,
                "dropout": 0.0,
                "keys": keys,
            },
        }
        with one_writer() as writer:
            if writer:
                check_free(folder, "mlx")
                make_folder(folder)
                write_tensors(folder / WEIGHTS_NAME, tensors, {"format": "mlx", **signature()})
                write_text(folder / CONFIG_NAME, json.dumps(settings, indent=4) + "\n")


def _in_mlx(key: str, tensor: np.ndarray[Any, Any]) -> tuple[str, np.ndarray[Any, Any]]:
    match = FACTOR.search(key)
    if match is None or tensor.ndim > 2:
        raise UnsupportedAdapterError(f"mlx-lm's format cannot store `{key}`.")
    if tensor.dtype == np.float64:
        raise UnsupportedAdapterError(f"`{key}` is float64; MLX reads float32. Cast it.")
    module = key[: match.start()]
    if match[1] == MAGNITUDE:
        return f"{module}.m", tensor
    return f"{module}.lora_{'a' if '_A' in match[1] else 'b'}", np.asarray(tensor.T, order="C")


def _within_layer(module: str) -> str:
    """A module's name within its layer, as in `keys` of mlx-lm's config."""
    _, separator, rest = module.partition(".layers.")
    return rest.partition(".")[2] if separator else module


FORMAT = Format(
    "mlx", "an mlx-lm folder", _recognizes, _read, files=(WEIGHTS_NAME,), saved="save_mlx"
)
