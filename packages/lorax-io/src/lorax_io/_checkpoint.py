"""A base model's safetensors files, and the same files with an adapter merged into them."""

import collections
import dataclasses
import json
import math
import os
import shutil
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lorax import Adapter, Pair, merge_params

from ._alone import Opened, open_adapter
from ._coded import MARKS, check_plain, coding_of
from ._config import distrusted, suffixes
from ._errors import AdapterFileError, AdapterMismatchError, AdapterNotFoundError, AdapterWarning
from ._files import file_in, regular_file, write_text
from ._layouts import Conv, Conv1D, Embedding, Experts, Layout, Linear, Tensor, tensor_name
from ._merged import CONFIG_NAME, INDEX_NAME, WEIGHTS_NAME, new_folder
from ._missing import check_lacking, lacking
from ._names import read_json
from ._native import read
from ._progress import track
from ._shapes import base_shape, complete
from ._tensors import TensorFile, write_tensors
from ._ties import find_embedding, is_embedding, is_head, ties, untied
from ._tree import Held, beside, near

# What stands beside the weights and stays true of the merged model.
_COMPANIONS = (".json", ".txt", ".model", ".md", ".jinja")


class Checkpoint(NamedTuple):
    """The tensors of a base model by name, and the files that they are in."""

    path: Path
    files: list[Path]
    shapes: dict[str, jax.ShapeDtypeStruct]
    config: dict[str, Any] | None  # the model's, where there is one
    by_end: Mapping[str, list[str]]  # the names that end so, after a dot
    copies: Mapping[str, str] = {}  # a head that is the embedding until it is adapted


def open_checkpoint(path: Path) -> Checkpoint:
    """A base: one safetensors file, or a folder of transformers."""
    files = _files(path)
    shapes: dict[str, jax.ShapeDtypeStruct] = {}
    for file_path in files:
        with TensorFile(file_path) as file:
            for name, entry in file.entries.items():
                if name in shapes:
                    raise AdapterFileError(file_path, f"has `{name}`, as another file has.")
                shapes[name] = jax.ShapeDtypeStruct(entry.shape, entry.dtype)
    by_end: dict[str, list[str]] = collections.defaultdict(list)
    for name in shapes:
        for end in suffixes(name)[1:]:
            by_end[end].append(name)
    return Checkpoint(path, files, shapes, _config(path), dict(by_end))


def _config(path: Path) -> dict[str, Any] | None:
    if not (path.is_dir() and (path / CONFIG_NAME).exists()):
        return None
    found = read_json(file_in(path, CONFIG_NAME))
    if not isinstance(found, dict):
        raise AdapterFileError(path / CONFIG_NAME, "is no JSON object.")
    return found


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [regular_file(path)]
    if (path / INDEX_NAME).exists():
        index = read_json(file_in(path, INDEX_NAME))
        try:
            return [file_in(path, name) for name in sorted({*index["weight_map"].values()})]
        except (KeyError, TypeError, AttributeError) as error:
            raise AdapterFileError(path / INDEX_NAME, "has no `weight_map`.") from error
    if (path / WEIGHTS_NAME).exists():
        return [file_in(path, WEIGHTS_NAME)]
    raise AdapterNotFoundError(path, f"has neither `{WEIGHTS_NAME}` nor `{INDEX_NAME}`.")


class Fitted(NamedTuple):
    """An adapter on a base."""

    checkpoint: Checkpoint  # with a head where the adapter gives the model one of its own
    rows: dict[str, Any]  # by the names of the base's tensors, and with the axes of those
    held: Held  # the frozen factors that are in the adapter's file


def fit_adapter(adapter: Opened, checkpoint: Checkpoint, *, allow_missing: bool = False) -> Fitted:
    """The adapter on the base's tensors; nothing that belongs to it is missing.

    Args:
        adapter: as it was opened.
        checkpoint: the base.
        allow_missing: whether targets without tensors are a warning, not an error.
    """
    if adapter.kind == "native":
        for name in sorted(adapter.rows):
            if name not in checkpoint.shapes:
                raise AdapterMismatchError(
                    adapter.path,
                    f"adapts `{name}`, and {checkpoint.path} has no tensor of that name."
                    f"{near(name, checkpoint.shapes)} For a base of PyTorch, convert it first: "
                    "`lorax convert --to peft`.",
                )
        _check_numbers(checkpoint, adapter.rows)
        found = read(adapter.path, checkpoint.shapes, with_held=True)
        return Fitted(checkpoint, found.rows, adapter.held)
    of_tensor = {tensor_name(x.module, x.parameter): x for x in adapter.names.values()}
    checkpoint = _with_head(adapter, checkpoint, of_tensor)
    matched = {name: _tensor_of(adapter, name, checkpoint) for name in of_tensor}
    _check_numbers(checkpoint, matched.values())
    assert adapter.config is not None
    with distrusted(adapter.path):
        found = lacking(adapter.config, checkpoint.shapes, matched)
    check_lacking(adapter.path, checkpoint.path, found, allow_missing)
    names = {
        matched[name]: _in_pytorch(adapter, layout, checkpoint.shapes[matched[name]].shape)
        for name, layout in of_tensor.items()
    }
    rows = open_adapter(adapter.path, names, checkpoint.shapes).rows
    return Fitted(checkpoint, rows, {})


def _check_numbers(checkpoint: Checkpoint, names: Iterable[str]) -> None:
    for name in names:
        dtype = checkpoint.shapes[name].dtype
        check_plain(checkpoint.path, name, dtype, checkpoint.shapes, checkpoint.config)


def _with_head(adapter: Opened, checkpoint: Checkpoint, names: Iterable[str]) -> Checkpoint:
    """The base with a head of its own, where the adapter has one and the base ties it."""
    heads = [
        name
        for name in names
        if name.endswith(".weight")
        and is_head(name.removesuffix(".weight"))
        and not _candidates(name, checkpoint)
    ]
    embedding = find_embedding(checkpoint.shapes)
    if len(heads) != 1 or embedding is None or coding_of(heads[0], checkpoint.shapes, None):
        return checkpoint
    if checkpoint.config is None or ties(checkpoint.config) is False:
        raise AdapterMismatchError(
            adapter.path,
            f"adapts `{heads[0]}`, and {checkpoint.path} has no tensor of that name. A model may "
            "use its embedding as its head: give the base as a folder whose config.json says so.",
        )
    shapes = {**checkpoint.shapes, heads[0]: checkpoint.shapes[embedding]}
    return checkpoint._replace(shapes=shapes, copies={heads[0]: embedding})


def _candidates(name: str, checkpoint: Checkpoint) -> list[str]:
    """The base's tensors that may be meant: with or without a prefix that the other lacks."""
    if name in checkpoint.shapes:
        return [name]
    shorter = [end for end in suffixes(name) if end in checkpoint.shapes]
    return shorter + checkpoint.by_end.get(name, [])


def _tensor_of(adapter: Opened, name: str, checkpoint: Checkpoint) -> str:
    """The base's tensor of a name, which may have the model's prefix or not."""
    found = _candidates(name, checkpoint)
    if len(found) == 1:
        return found[0]
    if not found:
        _check_coded(checkpoint, name)
    raise AdapterMismatchError(
        adapter.path,
        f"adapts `{name}`, and {checkpoint.path} has no tensor of that name."
        f"{near(name, checkpoint.shapes)}",
    )


def _check_coded(checkpoint: Checkpoint, name: str) -> None:
    """Refuses a base that has codes under other names where the tensor should be."""
    module, _, parameter = name.rpartition(".")
    ends = {parameter, *MARKS, *(known.rpartition(".")[2] for known in checkpoint.shapes)}
    stems = {known.removesuffix(f".{end}") for known in checkpoint.shapes for end in ends}
    for stem in stems:
        if stem == module or stem.endswith(f".{module}") or module.endswith(f".{stem}"):
            full = f"{stem}.{parameter}"
            check_plain(checkpoint.path, full, None, checkpoint.shapes, checkpoint.config)


def _in_pytorch(adapter: Opened, layout: Layout, shape: tuple[int, ...]) -> Layout:
    """The layout of a tensor as PyTorch has it, told by the shapes of the factors."""
    if isinstance(layout, Tensor):
        return layout
    if isinstance(layout, Embedding):
        return dataclasses.replace(layout, in_axes=(0,), out_axes=(1,))
    if isinstance(layout, Conv):
        rest = tuple(range(1, len(shape)))
        return dataclasses.replace(layout, in_axes=rest, out_axes=(0,), channel_axis=1)
    [row] = [row for path, row in adapter.rows.items() if adapter.names[path] == layout]
    found = base_shape(row)
    assert found is not None  # plain LoRA has every axis of its base
    sides = found[-2:]
    first = len(shape) - 2
    if isinstance(layout, Experts):
        if sides[0] == sides[1]:
            raise AdapterMismatchError(
                adapter.path,
                f"`{layout.module}` has as many inputs as outputs, so that nothing tells which of "
                f"its axes are which. Merge it in Python, with `Experts` in the names.",
            )
        inputs, outputs = (first, first + 1) if shape[1:] == sides else (first + 1, first)
        return dataclasses.replace(layout, in_axes=(inputs,), out_axes=(outputs,))
    assert adapter.config is not None
    is_conv1d = shape == sides and (shape != sides[::-1] or adapter.config.fan_in_fan_out)
    if is_conv1d:
        return Conv1D(layout.module, in_axes=(0,), out_axes=(1,))
    return Linear(layout.module, in_axes=(1,), out_axes=(0,))


def merge_files(fitted: Fitted, out: str | os.PathLike[str]) -> None:
    """Writes the base's files with the adapter merged, and what stands beside them, to a folder."""
    checkpoint, rows, held = fitted
    left = set(rows)
    config = _merged_config(checkpoint, rows)
    with new_folder(out) as folder:
        for path in track(checkpoint.files, "Merging"):
            with TensorFile(path) as file:
                tensors = {name: file.view(name) for name in file.entries}
                copies = {n: of for n, of in checkpoint.copies.items() if of in tensors}
                tensors |= {name: tensors[of] for name, of in copies.items()}
                of_base = tensors.keys() - rows.keys()
                for name in tensors.keys() & rows.keys():
                    tensors[name] = _merged(path, name, tensors[name], rows[name], held)
                    left.remove(name)
                write_tensors(folder / path.name, tensors, file.metadata, of_base=of_base)
        if checkpoint.path.is_dir():
            for path in sorted(checkpoint.path.iterdir()):
                if path.is_file() and path.suffix in _COMPANIONS:
                    shutil.copyfile(path, folder / path.name)
        if config is not None:
            write_text(folder / CONFIG_NAME, json.dumps(config, indent=2) + "\n")
        if checkpoint.copies and (folder / INDEX_NAME).exists():
            _add_to_index(folder / INDEX_NAME, checkpoint)
    assert not left, left


def _merged_config(checkpoint: Checkpoint, rows: Iterable[str]) -> dict[str, Any] | None:
    """The model's config where it has to be another one: where the head is not the embedding."""
    modules = {name.rpartition(".")[0] for name in rows}
    config = checkpoint.config
    if config is None or ties(config) is False:
        return None
    if any(map(is_head, modules)):
        warnings.warn(
            f"{checkpoint.path}: the merged head differs from the embedding, so that the merged "
            "model's config has tie_word_embeddings = false.",
            AdapterWarning,
            stacklevel=3,
        )
        return untied(checkpoint.path, config)
    has_head = any(is_head(name.removesuffix(".weight")) for name in checkpoint.shapes)
    if any(map(is_embedding, modules)) and (ties(config) or not has_head):
        warnings.warn(
            f"{checkpoint.path}: its head is its embedding, and the adapter has the embedding. "
            "Merged, both change, as PEFT merges them; unmerged, PEFT adapts the look-up alone.",
            AdapterWarning,
            stacklevel=3,
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


def _merged(
    path: Path, name: str, view: np.ndarray[Any, Any], row: Any, held: Held
) -> np.ndarray[Any, Any]:
    if not isinstance(row, Adapter):
        return np.asarray(row, order="C").astype(view.dtype)
    base = jnp.asarray(view)
    leaf = beside(base, complete(path, name, row, base, held.get(name, {})))
    return np.asarray(merge_params(Pair({name: leaf}, {name: row}))[name])
