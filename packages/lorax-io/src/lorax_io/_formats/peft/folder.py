"""PEFT's adapter folders: `adapter_config.json` and `adapter_model.safetensors`."""

import contextlib
import hashlib
import json
import os
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

from lorax import Pair

from ..._disk.arrays import all_read, one_writer
from ..._disk.files import file_in, make_folder, write_text
from ..._disk.progress import bars
from ..._disk.tensors import TensorFile, is_number, parse_json, write_tensors
from ..._errors import AdapterError, AdapterFileError, AdapterNotFoundError, about
from ..._plain_names import Names, as_torch_names
from ..export import Export, export
from ..format import Content, Format
from ..restore import restore
from ..signature import signature
from ..source import Source, plain_keys, stored, without_copies
from .config import CONFIG_NAME, TASK_TYPES, WEIGHTS, PeftConfig, check_free
from .keys import config_to_json, read_config
from .tuners import TUNERS

WEIGHTS_NAME = WEIGHTS["peft"][0]
_MODEL = "base_model."  # the prefix of tensors that are in no module
PREFIX = f"{_MODEL}model."
# PEFT does not read a file's metadata, so a key of our own is safe.
_OURS = "lorax"
_ORIGINAL = "unsaid"  # the key of `original_scaling` there; existing files use this name


def save_peft(
    folder: str | os.PathLike[str],
    tunable: Any,
    names: Names,
    *,
    base_model: str | None = None,
    task_type: str | None = None,
    revision: str | None = None,
    params: Any = None,
    target_modules: Sequence[str] | None = None,
    fold_scale: bool = False,
    progress: bool = True,
) -> None:
    """Writes a tunable tree as a folder that PEFT, transformers and vLLM load.

    Factors become `lora_A` and `lora_B` of their modules, and parameters that are trained in full
    become `modules_to_save`. The weights and then the config are replaced, each atomically. If the
    process ends between the two, `load_peft` rejects the folder.

    Args:
        folder: the folder, which is created if it does not exist; other files in it are kept.
        tunable: the tunable tree, or the whole `lorax.Pair` for kinds with frozen factors.
        names: the PyTorch name of each parameter, by its path: `Linear`, `Embedding`, `Conv`, ….
        base_model: the base's name on the Hub, or its folder.
        task_type: "CAUSAL_LM", "SEQ_CLS" or another of PEFT's types, which selects PEFT's wrapper.
        revision: the base's revision.
        params: the base's parameters; needed if a module that PEFT saves whole has frozen
            parameters, such as the head that belongs to some task types.
        target_modules: ends of module names, such as `["q_proj", "v_proj"]`, for readers that do
            not accept full names.
        fold_scale: whether to multiply `b` by the scale, for readers that support only one alpha.
        progress: whether to show a progress bar, on a terminal, if saving takes long.

    Raises:
        AdapterMismatchError: if `names` does not fit the tree.
        UnsupportedAdapterError: if PEFT's format cannot hold it.

    Example:
        >>> import jax, jax.numpy as jnp, lorax, pathlib, tempfile
        >>> from lorax_io import Linear, load_peft, save_peft
        >>> params = {"q": jnp.ones((5, 3))}
        >>> names = {"q": Linear("model.layers.0.self_attn.q_proj")}
        >>> frozen, tunable = lorax.init_lora(params, {"q": 2}, jax.random.key(0))
        >>> folder = pathlib.Path(tempfile.mkdtemp(), "adapter")
        >>> save_peft(folder, tunable, names, base_model="me/my-model", task_type="CAUSAL_LM")
        >>> sorted(file.name for file in folder.iterdir())
        ['adapter_config.json', 'adapter_model.safetensors']
        >>> frozen, tunable = load_peft(folder, params, names)
    """
    folder = Path(folder)
    with about(folder), bars(progress):
        if task_type is not None and task_type not in TASK_TYPES:
            raise AdapterError(f"task_type={task_type!r} is not one of {', '.join(TASK_TYPES)}.")
        exported = export(
            tunable,
            as_torch_names(names),
            params=params,
            task_type=task_type,
            target_modules=target_modules,
            fold_scale=fold_scale,
        )
        config = exported.config.replace(
            base_model_name_or_path=base_model, task_type=task_type, revision=revision
        )
        with one_writer() as writer:
            if writer:
                _write(folder, exported._replace(config=config))


def _write(folder: Path, exported: Export) -> None:
    check_free(folder, "peft")
    make_folder(folder)
    common = TUNERS[exported.config.peft_type].common
    tensors = {
        f"{_MODEL if name in common else PREFIX}{name}": tensor
        for name, tensor in exported.tensors.items()
    }
    write_tensors(folder / WEIGHTS_NAME, tensors, _header(exported))
    text = json.dumps(config_to_json(exported.config), indent=2, sort_keys=True)
    write_text(folder / CONFIG_NAME, text + "\n")


def load_peft(
    folder: str | os.PathLike[str],
    params: Any,
    names: Names,
    *,
    sharding: Any = None,
    progress: bool = True,
) -> Pair:
    """Reads a PEFT folder as the pair `(frozen, tunable)` for `lora(model)`.

    Args:
        folder: a folder with `adapter_config.json` and `adapter_model.safetensors`. For an adapter
            on the Hub, see `pull_from_hub`.
        params: the base's parameters, as arrays or `jax.ShapeDtypeStruct`.
        names: the PyTorch name of each parameter that the adapter may adapt, by its path.
        sharding: where to put the arrays: one sharding, or a tree of shardings with the structure
            of `tunable` or a prefix of it. By default, factors are sharded like their base.
        progress: whether to show a progress bar, on a terminal, if loading takes long.

    Returns:
        The `lorax.Pair`. `frozen` has the arrays of `params` themselves, not copies, and the frozen
        factors that some kinds of adapters need, such as DoRA's norms.

    Raises:
        AdapterFileError: if a file is damaged, or is not what PEFT would write.
        AdapterMismatchError: if the adapter does not fit `params` and `names`.
        UnsupportedAdapterError: if this kind of adapter is not supported, such as PiSSA's.

    Example:
        >>> import jax, jax.numpy as jnp, pathlib, tempfile
        >>> from lorax import init_lora
        >>> from lorax_io import Linear, load_peft, save_peft
        >>> params, names = {"q": jnp.ones((3, 2))}, {"q": Linear("layers.0.q_proj")}
        >>> frozen, tunable = init_lora(params, {"q": 1}, jax.random.key(0))
        >>> folder = pathlib.Path(tempfile.mkdtemp(), "adapter")
        >>> save_peft(folder, tunable, names)
        >>> load_peft(folder, params, names).tunable["q"].rank
        1
    """
    with bars(progress), all_read(params, sharding), open_peft(folder) as source:
        return restore(source, params, as_torch_names(names), sharding).pair()


@contextlib.contextmanager
def open_peft(folder: str | os.PathLike[str]) -> Generator[Source]:
    """Opens a PEFT folder, and checks its config and the header of its weights."""
    folder = Path(folder)
    if not folder.is_dir():
        hub = " `pull_from_hub` fetches one from the Hub." if not folder.exists() else ""
        raise AdapterNotFoundError(f"is not a folder.{hub}", folder)
    config = _config(folder)
    with TensorFile(_weights(folder)) as file:
        yield _source(file, config)


def _config(folder: Path) -> PeftConfig:
    path = file_in(folder, CONFIG_NAME)
    with about(path):
        return read_config(path).reading()


def _source(file: TensorFile, config: PeftConfig) -> Source:
    ours = _ours(file, config)
    common = {f"{_MODEL}{key}": key for key in TUNERS[config.peft_type].common}
    tensors = without_copies(plain_keys(stored(file), PREFIX, common), config)
    return Source(tensors, config, ours or {}, ours is not None)


def _recognizes(content: Content) -> bool:
    return content.folder is not None


def _read(content: Content) -> Source:
    assert content.folder is not None and isinstance(content.file, TensorFile)
    return _source(content.file, _config(content.folder))


FORMAT = Format(
    "peft",
    "a PEFT folder",
    _recognizes,
    _read,
    "lorax_io.load_peft(path, params, names)",
    (WEIGHTS_NAME,),
    "save_peft",
)


def _weights(folder: Path) -> Path:
    try:
        return file_in(folder, WEIGHTS_NAME)
    except AdapterNotFoundError as error:
        if (folder / "adapter_model.bin").exists():
            raise AdapterFileError(
                "its weights are a pickle, which may run code and is never read. If you trust "
                "them, load them with PEFT, and save them again.",
                folder,
            ) from error
        raise


def _header(exported: Export) -> dict[str, str]:
    ours = {"scales": _scales(exported.config), _ORIGINAL: dict(exported.original_scaling)}
    return {"format": "pt", _OURS: json.dumps(ours, sort_keys=True), **signature()}


def _scales(config: PeftConfig) -> str:
    return hashlib.sha256(config.scaling_text().encode()).hexdigest()


def _ours(file: TensorFile, config: PeftConfig) -> dict[str, Any] | None:
    """What `save_peft` left in the header; None where another program wrote the file."""
    if _OURS not in file.metadata:
        return None
    header = parse_json(file.metadata[_OURS])
    original_scaling = header.get(_ORIGINAL) if isinstance(header, dict) else None
    if not isinstance(original_scaling, dict) or not all(
        map(_is_scaling, original_scaling.values())
    ):
        raise AdapterFileError(f"its header has no settings under {_OURS!r}.")
    if header.get("scales") != _scales(config):
        raise AdapterFileError(
            "does not belong to these weights: its ranks or alphas differ. A save was "
            "interrupted, or the file was edited; save the adapter again.",
            file.path.parent / CONFIG_NAME,
        )
    return original_scaling


def _is_scaling(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and value.keys() == {"alpha", "scaling"}
        and value["scaling"] in ("standard", "rslora")
        and (value["alpha"] is None or is_number(value["alpha"]))
    )
