"""Names for parameter trees that follow a convention, and names in a file."""

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
    """Names for parameters with the modules of PyTorch and the names of Flax.

    `model/layers/0/q_proj/kernel` is the weight of `model.layers.0.q_proj`. A `kernel` of two axes
    is a `Linear`, an `embedding` an `Embedding`, a `scale` or `weight` of one axis and a `bias` are
    tensors of their module. Whatever else there is, you say.

    Args:
        params: the parameters, of arrays or shapes.
        names: the layouts of parameters that have another one, by path.
        layouts: what `names` was called before; it works until the next minor version.

    Returns:
        The layout of each parameter, by path.

    Raises:
        AdapterMismatchError: where neither the convention nor `names` has a layout for a
            parameter.

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
        names = layouts
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
    """Writes names as JSON, for the command line: `{path: {"layout": "Linear", "module": …}}`.

    Args:
        path: the file, which is replaced if there is one.
        names: the layout of each parameter, by path.

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
    """The fields that are not at their default."""
    return {
        field.name: getattr(layout, field.name)
        for field in dataclasses.fields(layout)
        if getattr(layout, field.name) != field.default
    }


def read_names(path: str | os.PathLike[str]) -> Layouts:
    """Names from a file of `write_names`.

    Args:
        path: the file.

    Returns:
        The layout of each parameter, by path.

    Raises:
        AdapterFileError: where it holds something else.

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
