"""Merges adapters into a base's files, and copies the other files that still apply."""

import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from lorax import Adapter, Pair, merge_params

from .._disk.files import write_text
from .._disk.streams import in_order, write_stream
from .._disk.tensors import TensorFile, check_finite, read_json
from .._errors import AdapterError, UnsupportedAdapterError, about, warn
from .._places import Array
from .._shapes import complete
from .._tree import FrozenFactors, frozen_leaf
from .checkpoint import CONFIG_NAME, INDEX_END, PIPELINE_NAME, SETTINGS, SETTINGS_KEY, Checkpoint
from .decoding import home_of
from .fit import Fitted
from .merged import INDEX_NAME, new_folder
from .outputs import Lazy, bytes_of, files_of_gguf, outputs
from .ties import is_embedding, is_head, ties, untied

# Other files that still apply to the merged model: configs, tokenizers, templates.
# Config, tokenizer, card, and the code of models that are not part of transformers.
_COMPANIONS = (".json", ".txt", ".model", ".md", ".jinja", ".py", ".tiktoken")


def merge_files(
    adapters: Sequence[Fitted],
    out: str | os.PathLike[str],
    *,
    scales: Sequence[float] | None = None,
    summed: bool = False,
    requantize: bool = False,
) -> None:
    """Writes the base's files, with adapters merged into them, to a new folder.

    Args:
        adapters: the adapters, in order; the checkpoint of the last one is the base to write.
        out: a new or empty folder.
        scales: a factor for the change that each adapter makes; by default 1.
        summed: whether to merge each adapter into the base and sum the changes; by default, each is
            merged into the result of the previous one.
        requantize: whether to quantize adapted weights again and leave all others as they are. By
            default all quantized weights become floats if one of them is adapted.

    Raises:
        AdapterError: if the folder is not empty, or a merged weight is not finite.

    Warns:
        AdapterWarning: if adapters replace each other's changes, if the config changes, or with the
            largest error of weights that were quantized again.
    """
    checkpoint = adapters[-1].checkpoint
    scales = [1.0] * len(adapters) if scales is None else scales
    adapted = {name for fitted in adapters for name in fitted.rows}
    if requantize and checkpoint.is_gguf:
        raise UnsupportedAdapterError(
            "is a GGUF file, whose codes can be read but not written. Omit `--requantize` to "
            "write the merged model as floats.",
            checkpoint.path,
        )
    _check_replaced(adapters)
    left = set(adapted)
    touched = adapted & checkpoint.coded.keys()
    # `floats` are written decoded, `again` are quantized again, `gone` are the tensors of `floats`.
    floats = {} if requantize or not touched else checkpoint.coded
    again = touched if requantize else set[str]()
    losses: dict[str, float] = {}
    with about(checkpoint.path):
        if floats and checkpoint.broken:
            name, error = min(checkpoint.broken.items())
            raise UnsupportedAdapterError(
                f"has quantized weights that the merged model would have as floats, but `{name}` "
                f"cannot be decoded: {error}"
            ) from error
        config = _merged_config(checkpoint, adapted)

    def merged(name: str, view: Array) -> Array:
        changes = [
            (fitted.rows[name], fitted.frozen, scale)
            for fitted, scale in zip(adapters, scales, strict=True)
            if name in fitted.rows
        ]
        if len(changes) == 1 and changes[0][2] == 1:
            return _merged(name, view, *changes[0][:2])
        wide = view.astype(np.promote_types(view.dtype, np.float32))
        whole = wide
        for row, frozen, scale in changes:
            before = wide if summed else whole
            whole = whole + scale * (_merged(name, before, row, frozen) - before)
        check_finite(name, whole)
        return whole.astype(view.dtype)

    with new_folder(out) as folder:
        for output in outputs(checkpoint, floats):
            prefix, tensors = output.prefix, output.tensors
            target = folder / output.file
            target.parent.mkdir(parents=True, exist_ok=True)
            for name in again:
                if home_of(weight := checkpoint.coded[name], output.entries, prefix):
                    coded, losses[name] = weight.again(merged(name, weight.array()))
                    left.remove(name)
                    tensors |= {n.removeprefix(prefix): Lazy.of(x) for n, x in coded.items()}

            def each(
                tensors: Mapping[str, Lazy] = tensors, prefix: str = prefix
            ) -> Iterator[tuple[str, Array]]:
                for name in in_order(tensors):
                    array, full = tensors[name].read(), prefix + name
                    if full in adapted and full not in again:
                        array = merged(full, array)
                        check_finite(full, array)
                        left.remove(full)
                    yield name, _rounded(full, array, tensors[name].dtype)

            write_stream(target, tensors, output.metadata, each())
        _copy_companions(checkpoint, folder)
        if config is not None:
            write_text(folder / CONFIG_NAME, json.dumps(config, indent=2) + "\n")
        if floats:
            _drop_settings(folder)
        index = folder / INDEX_NAME
        if checkpoint.is_gguf:
            _write_index(index, checkpoint)
        elif checkpoint.copies and index.exists():
            _add_to_index(index, checkpoint)
        if floats and not checkpoint.is_gguf:
            _index_floats(folder)
        assert not left, left  # within `new_folder`, so that a bug here leaves no folder
    if losses:
        worst = max(losses, key=lambda name: losses[name])
        warn(
            f"{len(losses)} merged weights were quantized again. `{worst}` has the largest "
            f"relative error, {losses[worst]:.2g}."
        )


def _rounded(name: str, array: Array, dtype: Any) -> Array:
    """The tensor in the dtype of the file; it may have been merged in a wider one.

    Raises:
        AdapterError: if a value is too large for that dtype.
    """
    if array.dtype == dtype:
        return array
    with np.errstate(over="ignore"):
        rounded = array.astype(dtype)
    if not np.isfinite(rounded).all():
        raise AdapterError(
            f"has numbers in `{name}` that {dtype} cannot represent. Choose another --dtype."
        )
    return rounded


def _copy_companions(checkpoint: Checkpoint, folder: Path) -> None:
    home = checkpoint.home
    if home is None:
        return
    is_pipeline = (home / PIPELINE_NAME).exists() and not checkpoint.is_gguf
    for path in sorted(home.rglob("*") if is_pipeline else home.iterdir()):
        if path.is_file() and path.suffix in _COMPANIONS and not _is_of_others(path, checkpoint):
            target = folder / path.relative_to(home)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)


def _is_of_others(path: Path, checkpoint: Checkpoint) -> bool:
    """Whether a file is an index of files that the model was not read from."""
    if not path.name.endswith(f".safetensors{INDEX_END}"):
        return False
    single = path.with_name(path.name.removesuffix(INDEX_END))
    return checkpoint.is_gguf or single in [file.path for file in checkpoint.files]


def _drop_settings(folder: Path) -> None:
    """Removes what configs say about codes, from those of a model whose weights are now floats."""
    for path in [path for name in SETTINGS for path in folder.rglob(name)]:
        path.unlink()
    for path in folder.rglob(CONFIG_NAME):
        config = read_json(path)
        if isinstance(config, dict) and config.pop(SETTINGS_KEY, None) is not None:
            write_text(path, json.dumps(config, indent=2) + "\n")


def _check_replaced(adapters: Sequence[Fitted]) -> None:
    """Warns if one adapter replaces what an earlier one has replaced or adapted."""
    seen: set[str] = set()
    for fitted in adapters:
        whole = {name for name, row in fitted.rows.items() if not isinstance(row, Adapter)}
        if again := sorted(whole & seen):
            warn(
                f"`{again[0]}` is replaced as a whole, which discards the change of another "
                "adapter."
            )
        seen |= fitted.rows.keys()


def _merged_config(checkpoint: Checkpoint, names: Iterable[str]) -> dict[str, Any] | None:
    """The merged model's config if it must change, since its head is now untied; else None."""
    modules = {name.rpartition(".")[0] for name in names}
    config = checkpoint.config
    if config is None or ties(config) is False:
        return None
    if any(map(is_head, modules)):
        config = untied(config)
        warn(
            "the merged head differs from the embedding, so the merged model's config gets "
            "tie_word_embeddings = false."
        )
        return config
    has_head = any(is_head(name.removesuffix(".weight")) for name in checkpoint.shapes)
    if any(map(is_embedding, modules)) and (ties(config) or not has_head):
        warn(
            "its head is tied to its embedding, which the adapter changes. The merged model "
            "changes both, as PEFT's merge does; without merging, PEFT adapts only the lookup."
        )
    return None


def _write_index(path: Path, checkpoint: Checkpoint) -> None:
    """The index of the files that a GGUF file becomes, if there are several."""
    files = files_of_gguf(checkpoint)
    if len(files) > 1:
        size = sum(map(bytes_of, checkpoint.shapes.values()))
        weight_map = {name: file for file, names in files.items() for name in names}
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        write_text(path, json.dumps(index, indent=2, sort_keys=True) + "\n")


def _add_to_index(path: Path, checkpoint: Checkpoint) -> None:
    index = read_json(path)
    for name, of in checkpoint.copies.items():
        index["weight_map"][name] = index["weight_map"][of]
        shape = checkpoint.shapes[of]
        metadata = index.get("metadata")
        if isinstance(metadata, dict) and isinstance(metadata.get("total_size"), int):
            metadata["total_size"] += math.prod(shape.shape) * shape.dtype.itemsize
    write_text(path, json.dumps(index, indent=2, sort_keys=True) + "\n")


def _index_floats(folder: Path) -> None:
    """Rewrites each index, with decoded weights in place of their codes."""
    for path in folder.rglob("*.safetensors.index.json"):
        index = read_json(path)
        weight_map: dict[str, Any] = {}
        size = 0
        for name in sorted({*index["weight_map"].values()}):
            with TensorFile(path.parent / name) as file:
                weight_map |= dict.fromkeys(file.entries, name)
                size += sum(entry.end - entry.begin for entry in file.entries.values())
        metadata = {**(index.get("metadata") or {}), "total_size": size}
        text = json.dumps(index | {"metadata": metadata, "weight_map": weight_map}, indent=2)
        write_text(path, text + "\n")


def _merged(name: str, view: Array, row: Any, frozen: FrozenFactors) -> Array:
    if not isinstance(row, Adapter):
        return np.asarray(row, order="C").astype(view.dtype)
    base = jnp.asarray(view)
    leaf = frozen_leaf(base, complete(name, row, base, frozen.get(name, {})), row)
    return np.asarray(merge_params(Pair({name: leaf}, {name: row}))[name])
