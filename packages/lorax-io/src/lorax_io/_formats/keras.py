"""KerasHub's `.lora.h5`: two kernels for each layer, and one rank. A layer has a number, no name.

It counts the layers with weights, as `backbone.load_lora_weights` does.
"""

import math
import os
import re
from typing import Any

import numpy as np

from lorax import LoraWeight

from .._disk.arrays import one_writer, to_host
from .._disk.hdf5 import Hdf5File, write_hdf5
from .._disk.tensors import check_finite
from .._errors import AdapterFileError, AdapterMismatchError, UnsupportedAdapterError, about
from .._layouts import Linear
from .._plain_layouts import Names, as_layouts
from .._tree import pair_rows
from .export import layout_of
from .format import Content, Format
from .self_described import self_described
from .source import Source, Stored, stored

_RANK = "lora/vars/rank"
_KERNEL = re.compile(r"lora/(?P<layer>\d{1,6})/vars/lora_kernel_(?P<side>[ab])")


def _recognizes(content: Content) -> bool:
    return isinstance(content.file, Hdf5File) and _RANK in content.file.entries


def _read(content: Content) -> Source:
    tensors: dict[str, Stored] = {}
    kernels = stored(content.file)
    rank = _rank(kernels.pop(_RANK))
    for name, tensor in kernels.items():
        match = _KERNEL.fullmatch(name)
        if match is None:
            raise AdapterFileError(f"has `{name}`, which KerasHub does not write.")
        layer, shape = match["layer"], tensor.shape
        axis = -1 if match["side"] == "a" else 0
        if len(shape) < 2 or shape[axis] != rank or (axis == 0 and len(shape) > 2):
            raise AdapterFileError(f"has `{name}` of shape {shape}, for a rank of {rank}.")
        # A kernel has all axes of the layer's but the last, and the rank.
        flat = (math.prod(shape[:-1]), shape[-1])
        tensors[f"{layer}.lora_{match['side'].upper()}.weight"] = tensor.shaped(flat).turned()
    return self_described(tensors)


def _rank(tensor: Stored) -> int:
    if tensor.shape != () or tensor.dtype.kind not in "iu" or not 1 <= tensor.view() <= 2**20:
        raise AdapterFileError(f"has `{tensor.name}` that is not a rank.")
    return int(tensor.view())


def save_keras(path: str | os.PathLike[str], tunable: Any, names: Names) -> None:
    """Writes a file for KerasHub: `backbone.load_lora_weights("….lora.h5")`.

    Needs `pip install "lorax-io[keras]"`. The scale is multiplied into `b`: the format has none.

    Args:
        path: the file.
        tunable: the second tree of `lorax.init_lora`.
        names: the layout of each parameter: `Linear`, with the layer's number for a module. Its
            `out_axes` is the last axis of the kernel, and its `in_axes` are all others.

    Raises:
        AdapterMismatchError: where `names` does not fit the tree.
        UnsupportedAdapterError: where the format has no place for it: it is LoRA of one rank.

    Example:
        >>> import jax, jax.numpy as jnp, lorax, pathlib, tempfile
        >>> from lorax_io import Linear, open_adapter, save_keras
        >>> params = {"query": jnp.ones((16, 4, 8))}  # [in, heads, out]
        >>> axes = {"in_axes": (0, 1), "out_axes": (2,)}
        >>> spec = {"query": lorax.LoraSpec(2, **axes)}
        >>> frozen, tunable = lorax.init_lora(params, spec, jax.random.key(0))
        >>> file = pathlib.Path(tempfile.mkdtemp(), "adapter.lora.h5")
        >>> save_keras(file, tunable, {"query": Linear("11", **axes)})
        >>> open_adapter(file).format
        'keras'
    """
    with about(path):
        layouts = as_layouts(names)
        rows, _ = pair_rows(tunable)
        ranks = {getattr(weight, "rank", None) for _, weight in rows}
        if len(ranks) != 1 or not all(isinstance(weight, LoraWeight) for _, weight in rows):
            raise UnsupportedAdapterError("KerasHub's files have plain LoRA of one rank alone.")
        arrays: dict[str, Any] = {_RANK: np.asarray(ranks.pop(), np.int64)}
        for path_, weight in rows:
            layout = layout_of(layouts, path_)
            outputs, inputs = weight.axes.outputs, weight.axes.inputs
            last = len(inputs)
            if not layout.module.isdecimal() or not isinstance(layout, Linear):
                raise AdapterMismatchError(
                    f"the layout of `{path_}` is not a Linear with the number of a layer for its "
                    f"module, but {type(layout).__name__}({layout.module!r})."
                )
            if (inputs, outputs, weight.axes.shared) != (tuple(range(last)), (last,), ()):
                raise UnsupportedAdapterError(
                    f"`{path_}` has in_axes={inputs} and out_axes={outputs}, and Keras has the "
                    "last axis of a kernel on one side and all others on the other."
                )
            a, b = to_host(weight.a), to_host(weight.b)
            begin = f"lora/{int(layout.module)}/vars/lora_kernel"
            for name, array in ((f"{begin}_a", a), (f"{begin}_b", b * weight.scale)):
                if name in arrays:
                    raise AdapterMismatchError(f"`names` gives two parameters `{layout.module}`.")
                check_finite(name, array)
                arrays[name] = np.asarray(array, np.float32)
        with one_writer() as writer:
            if writer:
                write_hdf5(path, arrays)


FORMAT = Format("keras", "a KerasHub file (`.lora.h5`)", _recognizes, _read, saved="save_keras")
