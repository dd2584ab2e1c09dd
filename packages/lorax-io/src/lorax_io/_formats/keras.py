"""KerasHub's `.lora.h5`: two kernels for each layer, and one rank for all.

A layer has a number in place of a name: its index among the layers with weights, as
`backbone.load_lora_weights` counts them.
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
from .._plain_names import Names, as_torch_names
from .._torch_names import Linear
from .._tree import pair_rows
from .export import torch_name_of
from .format import Content, Format
from .self_described import self_described
from .signature import signature
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
        # Keras: lora_kernel_a [*kernel.shape[:-1], rank], lora_kernel_b [rank, kernel.shape[-1]]
        flat = (math.prod(shape[:-1]), shape[-1])
        tensors[f"{layer}.lora_{match['side'].upper()}.weight"] = tensor.shaped(flat).turned()
    return self_described(tensors)


def _rank(tensor: Stored) -> int:
    if tensor.shape != () or tensor.dtype.kind not in "iu" or not 1 <= tensor.view() <= 2**20:
        raise AdapterFileError(f"has `{tensor.name}` that is not a rank.")
    return int(tensor.view())


def save_keras(path: str | os.PathLike[str], tunable: Any, names: Names) -> None:
    """Writes a file for KerasHub: `backbone.load_lora_weights("….lora.h5")`.

    Needs `pip install "lorax-io[keras]"`. The format has no scale, so `b` is multiplied by it.
    Factors are written as float32, or float64 if they are.

    Args:
        path: the file.
        tunable: the tunable tree.
        names: the PyTorch name of each parameter: `Linear`, whose module is the layer's number. Its
            `out_axes` is the last axis of the kernel, and its `in_axes` are all others.

    Raises:
        AdapterMismatchError: if `names` does not fit the tree.
        UnsupportedAdapterError: if the adapter is not plain LoRA of one rank.

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
        torch_names = as_torch_names(names)
        rows, _ = pair_rows(tunable)
        ranks = {getattr(weight, "rank", None) for _, weight in rows}
        if len(ranks) != 1 or not all(isinstance(weight, LoraWeight) for _, weight in rows):
            raise UnsupportedAdapterError("KerasHub's files support only plain LoRA with one rank.")
        arrays: dict[str, Any] = {_RANK: np.asarray(ranks.pop(), np.int64)}
        for path_, weight in rows:
            torch_name = torch_name_of(torch_names, path_)
            outputs, inputs = weight.axes.outputs, weight.axes.inputs
            last = len(inputs)
            if not torch_name.module.isdecimal() or not isinstance(torch_name, Linear):
                raise AdapterMismatchError(
                    f"the entry of `{path_}` in `names` is not a Linear whose "
                    "module is the number of a layer, but "
                    f"{type(torch_name).__name__}({torch_name.module!r})."
                )
            if (inputs, outputs, weight.axes.shared) != (tuple(range(last)), (last,), ()):
                raise UnsupportedAdapterError(
                    f"`{path_}` has in_axes={inputs} and out_axes={outputs}, and Keras has the "
                    "last axis of a kernel on one side and all others on the other."
                )
            a, b = to_host(weight.a), to_host(weight.b)
            scaled = b.astype(np.float64) * weight.scale  # rounded once, below
            begin = f"lora/{int(torch_name.module)}/vars/lora_kernel"
            for name, array in ((f"{begin}_a", a), (f"{begin}_b", scaled)):
                if name in arrays:
                    raise AdapterMismatchError(
                        f"`names` gives two parameters `{torch_name.module}`."
                    )
                check_finite(name, array)
                arrays[name] = np.asarray(array, np.promote_types(b.dtype, np.float32))
        with one_writer() as writer:
            if writer:
                write_hdf5(path, arrays, signature())


FORMAT = Format("keras", "a KerasHub file (`.lora.h5`)", _recognizes, _read, saved="save_keras")
