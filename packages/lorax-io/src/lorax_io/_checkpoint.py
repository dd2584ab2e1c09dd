"""A base model's safetensors files, and the same files with an adapter merged into them."""

import dataclasses
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lorax import Adapter, Pair, merge_params

from ._alone import Opened, open_adapter
from ._errors import AdapterError, AdapterFileError, AdapterMismatchError, AdapterNotFoundError
from ._files import file_in, regular_file
from ._layouts import Conv, Conv1D, Embedding, Experts, Layout, Linear, Tensor, tensor_name
from ._merged import INDEX_NAME, WEIGHTS_NAME, new_folder
from ._names import read_json
from ._native import read
from ._progress import track
from ._shapes import base_shape, complete
from ._tensors import TensorFile, write_tensors
from ._tree import Held, beside, near

# What stands beside the weights and stays true of the merged model.
_COMPANIONS = (".json", ".txt", ".model", ".md", ".jinja")


class Checkpoint(NamedTuple):
    """The tensors of a base model by name, and the files that they are in."""

    path: Path
    files: list[Path]
    shapes: dict[str, jax.ShapeDtypeStruct]


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
    return Checkpoint(path, files, shapes)


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


def fit_adapter(adapter: Opened, checkpoint: Checkpoint) -> tuple[dict[str, Any], Held]:
    """The adapter's rows by the names of the base's tensors, and with the axes of those.

    Beside them are the frozen factors that are in the adapter's file.
    """
    if adapter.kind == "native":
        if unknown := sorted(adapter.rows.keys() - checkpoint.shapes.keys()):
            raise AdapterMismatchError(
                adapter.path,
                f"adapts `{unknown[0]}`, and {checkpoint.path} has no tensor of that name."
                f"{near(unknown[0], checkpoint.shapes)} For a base of PyTorch, convert it first: "
                "`lorax convert --to peft`.",
            )
        found = read(adapter.path, checkpoint.shapes, with_held=True)
        return found.rows, adapter.held
    names = {_tensor_of(adapter, layout, checkpoint): layout for layout in adapter.names.values()}
    names = {
        name: _in_pytorch(adapter, layout, checkpoint.shapes[name].shape)
        for name, layout in names.items()
    }
    return open_adapter(adapter.path, names, checkpoint.shapes).rows, {}


def _tensor_of(adapter: Opened, layout: Layout, checkpoint: Checkpoint) -> str:
    """The base's tensor for a module, which may be called with or without the model's prefix."""
    name = tensor_name(layout.module, layout.parameter)
    if name in checkpoint.shapes:
        return name
    found = [
        known
        for known in checkpoint.shapes
        if name.endswith(f".{known}") or known.endswith(f".{name}")
    ]
    if len(found) != 1:
        raise AdapterMismatchError(
            adapter.path,
            f"adapts `{name}`, and {checkpoint.path} has no tensor of that name."
            f"{near(name, checkpoint.shapes)}",
        )
    return found[0]


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


def merge_files(
    checkpoint: Checkpoint, rows: Mapping[str, Any], held: Held, out: str | os.PathLike[str]
) -> None:
    """Writes the base's files with the adapter merged, and what stands beside them, to a folder."""
    left = set(rows)
    with new_folder(out) as folder:
        for path in track(checkpoint.files, "Merging"):
            with TensorFile(path) as file:
                tensors = {name: file.view(name) for name in file.entries}
                for name in tensors.keys() & rows.keys():
                    tensors[name] = _merged(file, name, rows[name], held.get(name, {}))
                    left.remove(name)
                of_base = tensors.keys() - rows.keys()
                write_tensors(folder / path.name, tensors, file.metadata, of_base=of_base)
        if checkpoint.path.is_dir():
            for path in sorted(checkpoint.path.iterdir()):
                if path.is_file() and path.suffix in _COMPANIONS:
                    shutil.copyfile(path, folder / path.name)
    assert not left, left


def _merged(file: TensorFile, name: str, row: Any, held: Mapping[str, Any]) -> np.ndarray[Any, Any]:
    view = file.view(name)
    if not isinstance(row, Adapter):
        return np.asarray(row, order="C").astype(view.dtype)
    base = jnp.asarray(view)
    leaf = beside(base, complete(file.path, name, row, base, held))
    try:
        return np.asarray(merge_params(Pair({name: leaf}, {name: row}))[name])
    except TypeError as error:
        raise AdapterError(file.path, str(error)) from error
