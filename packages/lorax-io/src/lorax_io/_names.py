"""PyTorch names inferred from Flax's naming convention, or stored in a JSON file."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from ._disk.files import regular_file, write_text
from ._disk.tensors import read_json
from ._errors import UNTIL, AdapterError, AdapterFileError, AdapterMismatchError, warn
from ._plain_names import Names, as_torch_names
from ._torch_names import Embedding, Linear, Tensor, TorchName, TorchNames
from ._tree import is_array, param_leaves


def flax_names(
    params: Any, names: Names | None = None, *, layouts: Names | None = None
) -> dict[str, TorchName]:
    """Infers the PyTorch names of the parameters of a Flax model, if its modules have the same.

    `model/layers/0/q_proj/kernel` is the weight of `model.layers.0.q_proj`. A `kernel` with two
    axes is a `Linear`, and an `embedding` is an `Embedding`. A `bias`, `scale` or `weight` with one
    axis is a `Tensor`. Give all other parameters in `names`.

    Args:
        params: the parameters: a tree of arrays or shapes.
        names: names by path, for parameters that do not follow the convention.
        layouts: deprecated name of `names`, accepted until the next minor version.

    Returns:
        The PyTorch name of each parameter, by path.

    Raises:
        AdapterMismatchError: if a parameter does not follow the convention and is not in `names`,
            or a path in `names` is not in `params`.

    Example:
        >>> import jax.numpy as jnp
        >>> from lorax_io import flax_names
        >>> params = {"layers": [{"q_proj": {"kernel": jnp.ones((5, 3)), "bias": jnp.ones(3)}}]}
        >>> for path, name in flax_names(params).items():
        ...     print(path, type(name).__name__, name.module, name.parameter)
        layers/0/q_proj/bias Tensor layers.0.q_proj bias
        layers/0/q_proj/kernel Linear layers.0.q_proj weight
    """
    leaves, _ = param_leaves(params)
    if layouts is not None:
        warn(f"flax_names(layouts=…) is now called `names`. {UNTIL}", DeprecationWarning)
        names = {**layouts, **(names or {})}
    given = as_torch_names(names or {})
    if unknown := sorted(given.keys() - leaves.keys()):
        raise AdapterMismatchError("is in `names` and not in the parameters.", unknown[0])
    return {
        path: given[path] if path in given else _by_convention(path, leaf)
        for path, leaf in leaves.items()
        if is_array(leaf)
    }


def _by_convention(path: str, leaf: Any) -> TorchName:
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
                "inputs and outputs. Give it in `names`.",
                path,
            )


def write_names(path: str | os.PathLike[str], names: Names) -> None:
    """Writes `names` to a JSON file, for the command line: `{path: {"type": "Linear", …}}`.

    Args:
        path: the file; an existing one is replaced.
        names: the PyTorch name of each parameter, by path.

    Raises:
        AdapterMismatchError: if a name is invalid.

    Example:
        >>> import pathlib, tempfile
        >>> from lorax_io import Linear, read_names, write_names
        >>> file = pathlib.Path(tempfile.mkdtemp(), "names.json")
        >>> write_names(file, {"q/kernel": Linear("layers.0.q_proj")})
        >>> read_names(file)["q/kernel"].module
        'layers.0.q_proj'
    """
    rows = {
        name: {"type": type(torch_name).__name__, **_changed_fields(torch_name)}
        for name, torch_name in as_torch_names(names).items()
    }
    write_text(Path(path), json.dumps(rows, indent=1) + "\n")


def _changed_fields(torch_name: TorchName) -> dict[str, Any]:
    """The fields that differ from their default."""
    return {
        field.name: getattr(torch_name, field.name)
        for field in dataclasses.fields(torch_name)
        if getattr(torch_name, field.name) != field.default
    }


def read_names(path: str | os.PathLike[str]) -> TorchNames:
    """Reads the names that `write_names` has written.

    Args:
        path: the file.

    Returns:
        The PyTorch name of each parameter, by path.

    Raises:
        AdapterNotFoundError: if the file does not exist.
        AdapterFileError: if it is not a JSON object of valid names.

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
        raise AdapterFileError("is not a JSON object of names by path.", path)
    try:
        return as_torch_names(rows)
    except AdapterError as error:
        raise AdapterFileError(f"`{error.path}` {error.reason}", path) from error
