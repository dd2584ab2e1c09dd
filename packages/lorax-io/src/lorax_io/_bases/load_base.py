"""`load_base`: the frozen tree of a base model on disk, quantized or not."""

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Sharding

from lorax.bases import Format

from .._disk.arrays import all_read, sharding_of
from .._disk.progress import bars, track
from .._errors import AdapterMismatchError, about
from .._frozen.load import spread
from .._places import Place
from .._plain_names import Names, as_torch_names
from .._torch_names import TorchName, TorchNames
from .._tree import absent, is_array, param_leaves
from .parameter import Notes, load_parameter
from .sources import Source, needed, open_source


def load_base(
    path: str | os.PathLike[str],
    names: Names,
    *,
    params: Any = None,
    dtype: Any = None,
    requantize: Format | str | None = None,
    sharding: Any = None,
    progress: bool = True,
) -> Any:
    """Reads a base model as a frozen tree; quantized weights stay quantized.

    Reads safetensors (a file, or a transformers folder) and GGUF files (with
    `pip install "lorax-io[gguf]"`). Weights may be floats, or quantized by bitsandbytes, GPTQ, AWQ,
    compressed-tensors, FP8 with `weight_scale_inv`, MXFP4, or in a type of llama.cpp. A quantized
    weight decodes to the same bits as in its own library, and is never held as a whole array of
    floats. Weights are read one after the other.

    Blocks run along one axis of the parameter. If the blocks of the file do not divide that axis,
    such as the features of a head, blocks in memory are shorter and scales are repeated; a warning
    reports the resulting bits per weight. Some codes cannot be kept, such as GPTQ groups in another
    order (`desc_act`) and GGUF's types below 4 bits; `requantize` decides what happens to these.

    Args:
        path: the file or the folder.
        names: the PyTorch name of each parameter, by its path in the tree.
        params: the model's parameters, as arrays or `jax.ShapeDtypeStruct`; the result has their
            structure, shapes and shardings. Without them, the result is a nested dict with the
            paths of `names`, and each parameter has the axes of its tensor.
        dtype: the dtype of decoded weights; by default that of the file, and float32 for GGUF.
        requantize: what to do with weights whose codes cannot be kept. A format, such as `NF4()` or
            its name, quantizes them again, and "float" keeps them decoded; a warning reports the
            error of each. By default they are an error.
        sharding: where to put the weights: one sharding, or a tree of shardings with the structure
            of the result or a prefix of it. Codes and scales are sharded like their weight.
        progress: whether to show a progress bar, on a terminal, if loading takes long.

    Returns:
        The frozen tree, with `lorax.QuantizedWeight` for quantized weights.

    Raises:
        AdapterError: if a file is damaged, a weight is missing or has another shape, scales are
            NaN, or codes cannot be kept and `requantize` is None. Nothing is returned in part.

    Warns:
        AdapterWarning: if the file has tensors that are not in `names`, if blocks are shorter than
            those of the file, or if weights are quantized again.

    Example:
        >>> import jax.numpy as jnp, numpy as np, pathlib, safetensors.numpy, tempfile
        >>> from lorax_io import Linear, load_base
        >>> file = pathlib.Path(tempfile.mkdtemp(), "model.safetensors")
        >>> weight = np.ones((256, 128), jnp.float8_e4m3fn)
        >>> scales = np.full((2, 1), 0.5, np.float32)
        >>> tensors = {"up.weight": weight, "up.weight_scale_inv": scales}
        >>> safetensors.numpy.save_file(tensors, file)
        >>> frozen = load_base(file, {"up/kernel": Linear("up")})
        >>> frozen["up"]["kernel"].format, frozen["up"]["kernel"].shape
        ('fp8', (128, 256))
    """
    torch_names = as_torch_names(names)
    with contextlib.ExitStack() as stack:
        stack.enter_context(bars(progress))
        stack.enter_context(about(path))
        with all_read(params, sharding):
            source = open_source(Path(path), stack)
            stack.enter_context(about(path))  # errors are about the whole, not the last file opened
            places = _places(source, torch_names, params)
            leaves, structure = _tree(places, params)
            where = _where(sharding, structure, leaves)
        notes = Notes.none()
        with all_read(params, sharding):
            loaded = {
                leaf: load_parameter(source, place, dtype, requantize, where[leaf], notes)
                for leaf, place in track(places.items(), "Loading the base")
            }
            notes.warn(source)
    return jax.tree.unflatten(structure, [loaded.get(leaf) for leaf in leaves])


def _places(source: Source, torch_names: TorchNames, params: Any) -> dict[str, Place]:
    """The resolved name of each parameter, by path."""
    if params is None:
        return {path: _place(source, path, torch_name) for path, torch_name in torch_names.items()}
    leaves, _ = param_leaves(params)
    if lacking := sorted(
        path for path in leaves if path not in torch_names and is_array(leaves[path])
    ):
        raise AdapterMismatchError(f"`names` has no entry for `{lacking[0]}`.")
    places: dict[str, Place] = {}
    for path, torch_name in torch_names.items():
        if not is_array(leaves.get(path)):
            raise AdapterMismatchError(f"`names` has `{path}`, {absent(path, leaves)}")
        places[path] = torch_name.at(path, leaves[path].shape)
    return places


def _place(source: Source, path: str, torch_name: TorchName) -> Place:
    """The resolved name of one parameter, with the shape of its tensors in the file."""
    counted = len(torch_name.shared_axes) - torch_name.stacked_in_tensor
    first = needed(source, torch_name.first_module, torch_name.parameter).shape
    ndim = len(first) + counted
    unknown = AdapterMismatchError(
        f"stores `{torch_name.module}` with other axes than `{path}`, so its shape is not known. "
        "Pass `params`, which may be shapes."
    )
    try:
        blank = torch_name.at(path, (1,) * ndim)
    except AdapterMismatchError as error:
        raise unknown from error
    if counted > 1 or any(len(group) != 1 for group in blank.whole):
        raise unknown
    shape = [0] * ndim
    for (axis,), size in zip(blank.whole, first, strict=True):
        shape[axis] = size
    for axis in blank.stack:
        if torch_name.numbers is not None:
            shape[axis] = len(torch_name.numbers)
            continue
        while source.find(torch_name.module.format(shape[axis]), torch_name.parameter) is not None:
            shape[axis] += 1
    return torch_name.at(path, shape)


def _tree(places: Mapping[str, Place], params: Any) -> tuple[Mapping[str, Any], Any]:
    """The leaves by path, in the tree's order, and the tree's structure."""
    if params is not None:
        return param_leaves(params)
    tree: dict[str, Any] = {}
    for path in places:
        *keys, last = path.split("/")
        node = tree
        for key in keys:
            node = node.setdefault(key, {})
            if not isinstance(node, dict):
                raise AdapterMismatchError(f"`names` has `{path}`, and a parameter above it.")
        if last in node:
            raise AdapterMismatchError(f"`names` has `{path}`, and parameters below it.")
        node[last] = jax.ShapeDtypeStruct(places[path].shape, jnp.float32)
    return param_leaves(tree)


def _where(sharding: Any, structure: Any, leaves: Mapping[str, Any]) -> dict[str, Sharding | None]:
    if sharding is None:
        return {path: sharding_of(leaf) for path, leaf in leaves.items()}
    return spread(sharding, structure, leaves)
