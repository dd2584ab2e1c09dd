"""A base's files with adapters merged into them, and all that stays true of the merged model."""

import json
import math
import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from lorax import Adapter, Pair, merge_params

from .._disk.files import write_text
from .._disk.progress import track
from .._disk.tensors import TensorFile, check_finite, read_json, write_tensors
from .._errors import about, warn
from .._places import Array
from .._shapes import complete
from .._tree import Held, beside
from .checkpoint import CONFIG_NAME, PIPELINE_NAME, STEMS, Checkpoint
from .fit import Fitted
from .merged import new_folder
from .ties import is_embedding, is_head, ties, untied

# What is beside the weights and stays true of the merged model.
_COMPANIONS = (".json", ".txt", ".model", ".md", ".jinja")


def merge_files(
    adapters: Sequence[Fitted],
    out: str | os.PathLike[str],
    *,
    scales: Sequence[float] | None = None,
    summed: bool = False,
) -> None:
    """Writes the base's files with adapters merged, and what is beside them, to a folder.

    Args:
        adapters: the last of them is on the base as it is written.
        out: a new folder.
        scales: by which the change that each makes is multiplied.
        summed: whether each is merged into the base, and the changes are summed; by default each
            is merged into what the last has left.
    """
    checkpoint = adapters[-1].checkpoint
    scales = [1.0] * len(adapters) if scales is None else scales
    adapted = {name for fitted in adapters for name in fitted.rows}
    _check_replaced(adapters)
    left = set(adapted)
    with about(checkpoint.path):
        config = _merged_config(checkpoint, adapted)

    def merged(path: Path, name: str, view: Array) -> Array:
        changes = [
            (fitted.rows[name], fitted.held, scale)
            for fitted, scale in zip(adapters, scales, strict=True)
            if name in fitted.rows
        ]
        if len(changes) == 1 and changes[0][2] == 1:
            return _merged(name, view, *changes[0][:2])
        wide = view.astype(np.promote_types(view.dtype, np.float32))
        whole = wide
        for row, held, scale in changes:
            before = wide if summed else whole
            whole = whole + scale * (_merged(name, before, row, held) - before)
        check_finite(name, whole)
        return whole.astype(view.dtype)

    with new_folder(out) as folder:
        for path, prefix in track(checkpoint.files, "Merging"):
            with TensorFile(path) as file:
                tensors = {name: file.view(name) for name in file.entries}
                copies = {n: of for n, of in checkpoint.copies.items() if of in tensors}
                tensors |= {name: tensors[of] for name, of in copies.items()}
                changed = {name for name in tensors if prefix + name in adapted}
                for name in changed:
                    tensors[name] = merged(path, prefix + name, tensors[name])
                    left.remove(prefix + name)
                target = folder / _within(path, checkpoint)
                target.parent.mkdir(parents=True, exist_ok=True)
                write_tensors(target, tensors, file.metadata, of_base=tensors.keys() - changed)
        _copy_companions(checkpoint, folder)
        if config is not None:
            write_text(folder / CONFIG_NAME, json.dumps(config, indent=2) + "\n")
        index = folder / f"{STEMS[0]}.safetensors.index.json"
        if checkpoint.copies and index.exists():
            _add_to_index(index, checkpoint)
    assert not left, left


def _within(path: Path, checkpoint: Checkpoint) -> Path:
    """Where a file of the base is in its folder."""
    return path.relative_to(checkpoint.path) if checkpoint.path.is_dir() else Path(path.name)


def _copy_companions(checkpoint: Checkpoint, folder: Path) -> None:
    if not checkpoint.path.is_dir():
        return
    is_pipeline = (checkpoint.path / PIPELINE_NAME).exists()
    files = checkpoint.path.rglob("*") if is_pipeline else checkpoint.path.iterdir()
    for path in sorted(files):
        if path.is_file() and path.suffix in _COMPANIONS:
            target = folder / path.relative_to(checkpoint.path)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)


def _check_replaced(adapters: Sequence[Fitted]) -> None:
    """Says where one adapter replaces what another has replaced or adapted."""
    seen: set[str] = set()
    for fitted in adapters:
        whole = {name for name, row in fitted.rows.items() if not isinstance(row, Adapter)}
        if again := sorted(whole & seen):
            warn(f"`{again[0]}` is replaced as a whole, after another adapter has changed it.")
        seen |= fitted.rows.keys()


def _merged_config(checkpoint: Checkpoint, names: Iterable[str]) -> dict[str, Any] | None:
    """The model's config where it has to be another one: where the head is not the embedding."""
    modules = {name.rpartition(".")[0] for name in names}
    config = checkpoint.config
    if config is None or ties(config) is False:
        return None
    if any(map(is_head, modules)):
        config = untied(config)
        warn(
            "the merged head differs from the embedding, so that the merged model's config has "
            "tie_word_embeddings = false."
        )
        return config
    has_head = any(is_head(name.removesuffix(".weight")) for name in checkpoint.shapes)
    if any(map(is_embedding, modules)) and (ties(config) or not has_head):
        warn(
            "its head is its embedding, and the adapter has the embedding. Merged, both change, as "
            "PEFT merges them; unmerged, PEFT adapts the look-up alone."
        )
    return None


def _add_to_index(path: Path, checkpoint: Checkpoint) -> None:
    index = read_json(path)
    for name, of in checkpoint.copies.items():
        index["weight_map"][name] = index["weight_map"][of]
        shape = checkpoint.shapes[of]
        metadata = index.get("metadata")
        if isinstance(metadata, dict) and isinstance(metadata.get("total_size"), int):
            metadata["total_size"] += math.prod(shape.shape) * shape.dtype.itemsize
    write_text(path, json.dumps(index, indent=2, sort_keys=True) + "\n")


def _merged(name: str, view: Array, row: Any, held: Held) -> Array:
    if not isinstance(row, Adapter):
        return np.asarray(row, order="C").astype(view.dtype)
    base = jnp.asarray(view)
    leaf = beside(base, complete(name, row, base, held.get(name, {})))
    return np.asarray(merge_params(Pair({name: leaf}, {name: row}))[name])
