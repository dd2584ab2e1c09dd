"""Writes a merged model as a transformers folder: safetensors shards and their index."""

import contextlib
import hashlib
import json
import math
import os
import shutil
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

from lorax import ArgumentError, Pair, merge_params

from .._disk.arrays import one_writer
from .._disk.files import regular_file, write_text
from .._disk.progress import bars, track
from .._disk.tensors import parse_json, write_tensors
from .._errors import AdapterError, AdapterMismatchError, about, warn
from .._formats.export import torch_name_of
from .._formats.whole import whole_tensors
from .._places import Array
from .._plain_names import Names, as_torch_names
from .._torch_names import TorchNames, tensor_name
from .._tree import absent, base_of, frozen_leaves, is_array, tunable_rows
from .ties import is_embedding, is_head, ties, untied

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
CONFIG_NAME = "config.json"


def save_merged(
    folder: str | os.PathLike[str],
    frozen: Any,
    tunable: Any = None,
    names: Names | None = None,
    *,
    config: Mapping[str, Any] | str | os.PathLike[str] | None = None,
    shard_bytes: int = 5 * 10**9,
    progress: bool = True,
) -> None:
    """Writes the merged model, `base + scale · a @ b` for LoRA, as a folder for transformers.

    Weights are merged one at a time, as by `lorax.merge_params`. Only those of one file are in
    memory at once.

    Args:
        folder: a new or empty folder; it appears only when it is complete.
        frozen: the frozen tree; or the whole `lorax.Pair`, followed by `names`.
        tunable: the tunable tree.
        names: the PyTorch name of every parameter, by its path.
        config: the model's `config.json`, as a path or as a dict. Without it, transformers cannot
            tell which model the weights belong to.
        shard_bytes: the largest size of one file, in bytes; a larger parameter gets its own file.
        progress: whether to show a progress bar, on a terminal, if writing takes long.

    Raises:
        AdapterMismatchError: if a parameter is not in `names`.
        AdapterError: if the folder is not empty.

    Warns:
        AdapterWarning: if the head differs from the embedding and `config` ties them; the written
            config does not.

    Example:
        >>> import jax, jax.numpy as jnp, lorax, pathlib, tempfile
        >>> from lorax_io import Linear, save_merged
        >>> params = {"head": jnp.ones((5, 3))}
        >>> frozen, tunable = lorax.init_lora(params, {"head": 2}, jax.random.key(0))
        >>> folder = pathlib.Path(tempfile.mkdtemp(), "merged")
        >>> save_merged(folder, frozen, tunable, {"head": Linear("lm_head")})
        >>> [file.name for file in folder.iterdir()]
        ['model.safetensors']
    """
    if isinstance(frozen, tuple | list) and len(frozen) == 2 and (tunable is None or names is None):
        names = tunable if names is None else names
        frozen, tunable = frozen
    if names is None:
        raise ArgumentError("save_merged needs `names`, the PyTorch name of every parameter.")
    with about(folder), bars(progress):
        _save_merged(Path(folder), frozen, tunable, as_torch_names(names), config, shard_bytes)


def _save_merged(
    folder: Path, frozen: Any, tunable: Any, names: TorchNames, config: Any, shard_bytes: int
) -> None:
    leaves, _ = frozen_leaves(frozen)
    rows = dict(tunable_rows(tunable))
    # A base, adapted or not, is in `leaves`; what is trained in full is in `rows`.
    wholes = [rows.get(path) if leaf is None else base_of(leaf) for path, leaf in leaves.items()]
    sizes = {
        path: math.prod(whole.shape) * whole.dtype.itemsize
        for path, whole in zip(leaves, wholes, strict=True)
        if whole is not None and is_array(whole)
    }
    if unknown := sorted(rows.keys() - sizes.keys()):
        raise AdapterMismatchError(f"adapts `{unknown[0]}`, {absent(unknown[0], leaves)}")
    torch_names = {path: torch_name_of(names, path) for path in sizes}
    config_text = _config_text(config)
    tables: dict[str, bytes] = {}  # the hashes of embedding and head, to compare them
    parts = shards(sizes, shard_bytes)

    def tensors_of(path: str) -> list[tuple[str, Array]]:
        merged = merge_params(Pair({path: leaves[path]}, {path: rows.get(path)}))[path]
        tensors = whole_tensors(torch_names[path].at(path, merged.shape), merged)
        return [(tensor_name(module, parameter), tensor) for module, parameter, tensor in tensors]

    files: dict[str, str] = {}
    with new_folder(folder) as unfinished:
        for k, paths in enumerate(track(parts, "Writing the merged model")):
            file = WEIGHTS_NAME if len(parts) == 1 else shard_name(k, len(parts))
            tensors: dict[str, Array] = {}
            of_base: set[str] = set()
            for path in paths:
                for name, tensor in tensors_of(path):
                    if name in files:
                        raise AdapterMismatchError(
                            f"`names` gives two parameters the tensor `{name}`."
                        )
                    files[name], tensors[name] = file, tensor
                    if is_embedding(module := name.removesuffix(".weight")) or is_head(module):
                        tables[name] = hashlib.sha256(tensor.tobytes()).digest()
                    if path not in rows:
                        of_base.add(name)
            with one_writer() as writer:
                if writer:
                    write_tensors(unfinished / file, tensors, {"format": "pt"}, of_base=of_base)
        with one_writer() as writer:
            if writer and len(parts) > 1:
                index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": files}
                write_text(unfinished / INDEX_NAME, _json(index))
            if writer and config_text is not None:
                write_text(unfinished / CONFIG_NAME, _with_own_head(config_text, tables))


def _with_own_head(text: str, tables: Mapping[str, bytes]) -> str:
    """The config, untied if it ties a head that differs from the embedding."""
    heads = [name for name in tables if is_head(name.removesuffix(".weight"))]
    if not heads or len(set(tables.values())) == 1:
        return text
    config = parse_json(text)
    if not isinstance(config, dict) or ties(config) is False:
        return text
    config = untied(config)
    warn(
        f"`{heads[0]}` is not the embedding, so its config gets tie_word_embeddings = false; "
        "transformers would drop the head otherwise."
    )
    return _json(config)


def shards(sizes: Mapping[str, int], most: int) -> list[list[str]]:
    """The paths of the parameters in each file, in order."""
    parts: list[list[str]] = [[]]
    filled = 0
    for path, size in sizes.items():
        if parts[-1] and filled + size > most:
            parts.append([])
            filled = 0
        parts[-1].append(path)
        filled += size
    return parts


def shard_name(k: int, count: int) -> str:
    """The name of shard `k`, counted from 0, as in transformers."""
    return f"model-{k + 1:05}-of-{count:05}.safetensors"


def _config_text(config: Mapping[str, Any] | str | os.PathLike[str] | None) -> str | None:
    if config is None:
        return None
    if isinstance(config, Mapping):
        return _json(config)
    return regular_file(config).read_text(encoding="utf-8")


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, sort_keys=True) + "\n"


@contextlib.contextmanager
def new_folder(folder: str | os.PathLike[str]) -> Generator[Path]:
    """Yields a temporary folder, renamed to `folder` when the block ends without an error."""
    folder = Path(folder).resolve()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise AdapterError(
            "already exists and is not empty; give a new folder.",
            folder,
        )
    # The name is fixed, not random: all processes must use the same one.
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    with one_writer() as writer:
        if writer:
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
    try:
        yield unfinished
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    with one_writer() as writer:
        if writer:
            if folder.exists():
                folder.rmdir()
            os.rename(unfinished, folder)
