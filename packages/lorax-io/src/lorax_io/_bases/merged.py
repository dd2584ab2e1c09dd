"""The merged model as a folder that transformers loads: safetensors shards and their index."""

import contextlib
import hashlib
import json
import math
import os
import shutil
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

from lorax import Pair, merge_params

from .._disk.arrays import one_writer
from .._disk.files import regular_file, write_text
from .._disk.progress import bars, track
from .._disk.tensors import parse_json, write_tensors
from .._errors import AdapterError, AdapterMismatchError, about, warn
from .._formats.export import layout_of
from .._formats.whole import whole_tensors
from .._layouts import Layouts, tensor_name
from .._places import Array
from .._plain_layouts import Names, as_layouts
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
    """Writes the merged model, such as `base + scale · a @ b` of plain LoRA, for transformers.

    Weights are merged one after the other, as `lorax.merge_params` does it; those of one file are
    in memory at a time.

    Args:
        folder: a new or an empty one; it appears when all of it is written.
        frozen: the first tree of the pair; or the whole `lorax.Pair`, and then `names`.
        tunable: the second tree of the pair.
        names: the layout of every parameter, by its path.
        config: the model's `config.json`: the file, or what is to be in it. Without one,
            transformers does not know what model the weights are of.
        shard_bytes: the largest size of one file, unless one parameter is larger.
        progress: whether a bar is shown on a terminal where it takes long.

    Raises:
        AdapterMismatchError: where a parameter has no layout.
        AdapterError: where there are files in the folder.

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
        raise TypeError("save_merged needs `names`, the layout of every parameter.")
    with about(folder), bars(progress):
        _save_merged(Path(folder), frozen, tunable, as_layouts(names), config, shard_bytes)


def _save_merged(
    folder: Path, frozen: Any, tunable: Any, names: Layouts, config: Any, shard_bytes: int
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
    layouts = {path: layout_of(names, path) for path in sizes}
    config_text = _config_text(config)
    tables: dict[str, bytes] = {}  # embedding and head, each by what it holds
    parts = shards(sizes, shard_bytes)

    def tensors_of(path: str) -> list[tuple[str, Array]]:
        merged = merge_params(Pair({path: leaves[path]}, {path: rows.get(path)}))[path]
        tensors = whole_tensors(layouts[path].at(path, merged.shape), merged)
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
    """The config; where it ties a head that is not the embedding, without that."""
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
    """The parameters of each file, in their order."""
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
    """The name that transformers has for one of several files."""
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
    """A folder to fill, which becomes `folder` when the block ends without an error."""
    folder = Path(folder).resolve()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise AdapterError(
            "already exists and is not empty; give a new folder.",
            folder,
        )
    # Every process must find the same name.
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
