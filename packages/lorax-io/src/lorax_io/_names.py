"""Layouts inferred from Flax's naming convention, and layouts stored in a JSON file."""

import dataclasses
import json
import os
import warnings
from pathlib import Path
from typing import Any

from ._disk.files import regular_file, write_text
from ._disk.tensors import read_json
from ._errors import AdapterError, AdapterFileError, AdapterMismatchError
from ._layouts import Embedding, Layout, Layouts, Linear, Tensor
from ._plain_layouts import Names, as_layouts
from ._tree import is_array, param_leaves


def flax_names(
    params: Any, names: Names | None = None, *, layouts: Names | None = None
) -> dict[str, Layout]:
    """Infers a layout for each parameter of a Flax model whose modules are named as in PyTorch.

    `model/layers/0/q_proj/kernel` is the weight of `model.layers.0.q_proj`. A `kernel` with two
    axes is a `Linear`, and an `embedding` is an `Embedding`. A `bias`, `scale` or `weight` with one
    axis is a `Tensor`. Give the layouts of all other parameters in `names`.

    Args:
        params: the parameters: a tree of arrays or shapes.
        names: layouts by path, for parameters that do not follow the convention.
        layouts: deprecated name of `names`, accepted until the next minor version.

    Returns:
        The layout of each parameter, by path.

    Raises:
        AdapterMismatchError: if a parameter does not follow the convention and is not in `names`,
            or a path in `names` is not in `params`.

    Example:
        >>> import jax.numpy as jnp
        >>> from lorax_io import flax_names
        >>> params = {"layers": [{"q_proj": {"kernel": jnp.ones((5, 3)), "bias": jnp.ones(3)}}]}
        >>> for path, layout in flax_names(params).items():
        ...     print(path, type(layout).__name__, layout.module, layout.parameter)
        layers/0/q_proj/bias Tensor layers.0.q_proj bias
        layers/0/q_proj/kernel Linear layers.0.q_proj weight
    """
    leaves, _ = param_leaves(params)
    if layouts is not None:
        warnings.warn(
            "flax_names(layouts=…) is called `names` now. The old name will go with the next minor "
            "version.",
            DeprecationWarning,
            stacklevel=2,
        )
        names = {**layouts, **(names or {})}
    given = as_layouts(names or {})
    if unknown := sorted(given.keys() - leaves.keys()):
        raise AdapterMismatchError("is in `names` and not in the parameters.", unknown[0])
    return {
        path: given[path] if path in given else _by_convention(path, leaf)
        for path, leaf in leaves.items()
        if is_array(leaf)
    }


def _by_convention(path: str, leaf: Any) -> Layout:
    *parts, name = path.split("/")
    module = ".".join(parts)
    match name, len(leaf.shape):
        case "kernel", 2:
            return Linear(module)
        case "embedding", 2:
            return Embedding(module)
        case (("scale" | "weight"), 1):
            return Tensor(module, parameter="weight")
        case "bias", 1:
            return Tensor(module)
        case _, axes:
            raise AdapterMismatchError(
                f"has {axes} axes and the name `{name}`: the convention does not say which are "
                "inputs and outputs. Give its layout in `names`.",
                path,
            )


def write_names(path: str | os.PathLike[str], names: Names) -> None:
    """Writes layouts to a JSON file, for the command line: `{path: {"layout": "Linear", …}}`.

    Args:
        path: the file; an existing one is replaced.
        names: the layout of each parameter, by path.

    Raises:
        AdapterMismatchError: if a layout is invalid.

    Example:
        >>> import pathlib, tempfile
        >>> from lorax_io import Linear, read_names, write_names
        >>> file = pathlib.Path(tempfile.mkdtemp(), "names.json")
        >>> write_names(file, {"q/kernel": Linear("layers.0.q_proj")})
        >>> read_names(file)["q/kernel"].module
        'layers.0.q_proj'
    """
    rows = {
        name: {"layout": type(layout).__name__, **_changed_fields(layout)}
        for name, layout in as_layouts(names).items()
    }
    write_text(Path(path), json.dumps(rows, indent=1) + "\n")


def _changed_fields(layout: Layout) -> dict[str, Any]:
    """The fields that differ from their default."""
    return {
        field.name: getattr(layout, field.name)
        for field in dataclasses.fields(layout)
        if getattr(layout, field.name) != field.default
    }


def read_names(path: str | os.PathLike[str]) -> Layouts:
    """Reads the layouts that `write_names` has written.

    Args:
        path: the file.

    Returns:
        The layout of each parameter, by path.

    Raises:
        AdapterNotFoundError: if the file does not exist.
        AdapterFileError: if it is not a JSON object of valid layouts.

    Example:
        >>> import pathlib, tempfile
        >>> from lorax_io import Linear, read_names, write_names
        >>> file = pathlib.Path(tempfile.mkdtemp(), "names.json")
        >>> write_names(file, {"q/kernel": Linear("layers.0.q_proj")})
        >>> read_names(file)["q/kernel"].module
        'layers.0.q_proj'
    """
    path = regular_file(path)
    rows = read_json(path)
    if not isinstance(rows, dict) or not all(isinstance(row, dict) for row in rows.values()):
        raise AdapterFileError("is not a JSON object of layouts by path.", path)
    try:
        return as_layouts(rows)
    except AdapterError as error:
        raise AdapterFileError(f"`{error.path}` {error.reason}", path) from error
