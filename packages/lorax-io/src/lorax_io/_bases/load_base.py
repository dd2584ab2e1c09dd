"""`load_base`: a frozen tree from the files that people have, codes as codes, floats as floats."""

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
from .._layouts import Layout, Layouts
from .._places import Place
from .._plain_layouts import Names, as_layouts
from .._tree import absent, is_array, param_leaves
from .parameter import Notes, load_parameter
from .sources import Source, needed, open_source


def load_base(
    path: str | os.PathLike[str],
    names: Names,
    *,
    params: Any = None,
    dtype: Any = None,
    anew: Format | str | None = None,
    sharding: Any = None,
    progress: bool = True,
) -> Any:
    """Reads a base model as the frozen tree of a pair: codes where the file has codes.

    Reads safetensors (a file, or a folder of transformers) and GGUF files (with
    `pip install "lorax-io[gguf]"`), whose weights are floats or codes of bitsandbytes, GPTQ, AWQ,
    compressed-tensors, FP8 with `weight_scale_inv`, MXFP4, or the types of llama.cpp. A weight is
    decoded bit for bit as its library decodes it, and never held as a whole array of floats;
    weights are read one after the other.

    Blocks run along an axis of the parameter. Where those of the file do not divide it, such as
    the features of a head, blocks in memory are shorter and scales are repeated; the warning says
    what that costs. A few codes have no such form, such as groups of GPTQ in another order
    (`desc_act`) or GGUF's types below 4 bits: `anew` says what to do with these.

    Args:
        path: the file or the folder.
        names: the layout of each parameter, by its path in the tree.
        params: the model's parameters, of arrays or `jax.ShapeDtypeStruct`: the tree gets their
            structure, shapes and places. Without them it is a dict of dicts with the paths of
            `names`, and a parameter has an axis for each of its tensor's.
        dtype: of decoded weights; by default what the file says, float32 of GGUF.
        anew: for weights whose codes cannot be kept: the format to code them in again, such as
            `NF4()` or its name, or "float" to hold them decoded. The warning says how far each is
            from the file's. None: they are an error.
        sharding: where to put the weights: one sharding, or a tree of them with the structure of
            the result or a prefix of it. Codes and scales are split as their weight is.
        progress: whether a bar is shown on a terminal where it takes long.

    Returns:
        The frozen tree, with `lorax.QuantizedWeight` where the file has codes.

    Raises:
        AdapterError: where a file is damaged, a weight is missing or has another shape, scales are
            NaN, or codes cannot be kept and `anew` is None; nothing is returned in part.

    Warns:
        AdapterWarning: where tensors are in none of `names`; where blocks are shorter than those of
            the file; where weights are coded anew.

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
    layouts = as_layouts(names)
    with contextlib.ExitStack() as stack:
        stack.enter_context(bars(progress))
        stack.enter_context(about(path))
        with all_read(params, sharding):
            source = open_source(Path(path), stack)
            places = _places(source, layouts, params)
            leaves, structure = _tree(places, params)
            where = _where(sharding, structure, leaves)
        notes = Notes([], [])
        with all_read(params, sharding):
            loaded = {
                leaf: load_parameter(source, place, dtype, anew, where[leaf], notes)
                for leaf, place in track(places.items(), "Loading the base")
            }
            notes.warn(source)
    return jax.tree.unflatten(structure, [loaded.get(leaf) for leaf in leaves])


def _places(source: Source, layouts: Layouts, params: Any) -> dict[str, Place]:
    """Where each parameter is in the files."""
    if params is None:
        return {path: _place(source, path, layout) for path, layout in layouts.items()}
    leaves, _ = param_leaves(params)
    if lacking := sorted(path for path in leaves if path not in layouts and is_array(leaves[path])):
        raise AdapterMismatchError(f"`names` has no layout for `{lacking[0]}`.")
    places: dict[str, Place] = {}
    for path, layout in layouts.items():
        if not is_array(leaves.get(path)):
            raise AdapterMismatchError(f"`names` has `{path}`, {absent(path, leaves)}")
        places[path] = layout.at(path, leaves[path].shape)
    return places


def _place(source: Source, path: str, layout: Layout) -> Place:
    """The same, where shapes are those of the tensors."""
    counted = len(layout.shared_axes) - layout.stacked_in_tensor
    first = needed(source, layout.module.format(*[0] * counted), layout.parameter).shape
    ndim = len(first) + counted
    unknown = AdapterMismatchError(
        f"has `{layout.module}` in other axes than `{path}`, so that its shape is not known. "
        "Give `params`, which may be shapes."
    )
    try:
        blank = layout.at(path, (1,) * ndim)
    except AdapterMismatchError as error:
        raise unknown from error
    if counted > 1 or any(len(group) != 1 for group in blank.whole):
        raise unknown
    shape = [0] * ndim
    for (axis,), size in zip(blank.whole, first, strict=True):
        shape[axis] = size
    for axis in blank.stack:
        while source.find(layout.module.format(shape[axis]), layout.parameter) is not None:
            shape[axis] += 1
    return layout.at(path, shape)


def _tree(places: Mapping[str, Place], params: Any) -> tuple[Mapping[str, Any], Any]:
    """The leaves by path, in order, and the structure of the tree."""
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
