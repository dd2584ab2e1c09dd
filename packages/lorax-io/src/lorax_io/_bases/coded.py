"""Detects quantized weights by the tensors of their modules, and by the model's config."""

from collections.abc import Container, Mapping
from typing import Any

import jax.numpy as jnp

from .._errors import UnsupportedAdapterError

# Tensors in the module of a quantized weight, with or instead of the weight, and the format
# they indicate. The first one present decides.
MARKS: dict[str, str] = {
    "weight_scale_inv": "FP8 with a scale for each block",
    "weight_packed": "compressed-tensors",
    "qweight": "GPTQ or AWQ",
    "weight.absmax": "bitsandbytes, 4 bits",
    "weight.quant_map": "bitsandbytes, 4 bits",
    "SCB": "bitsandbytes, 8 bits",
    "weight_format": "bitsandbytes, 8 bits",
    "W_q": "HQQ",
    "weight._data": "quanto",
    "weight._scale": "quanto",
    "weight_scale": "FP8, or compressed-tensors with a scale",
    "weight_scales": "EETQ",
    "scale_weight": "FP8 of ComfyUI, with a scale",
    "codebooks": "AQLM",
    "_weight_qdata": "torchao",
    "q_weight": "EXL2",
    "trellis": "EXL3",
    "Qidxs": "QuIP#",
    "dense_weights": "SpQR",
    "weight.compressed": "compressed-tensors, sparse",
    "weight.bitmask": "compressed-tensors, sparse",
    "scales": "MLX, or another with `scales`",
}
# The same for a parameter that is not called `weight`, such as those of experts: what is appended
# to its name.
ENDINGS: dict[str, str] = {
    "_blocks": "MXFP4",
    "_scale_inv": "FP8 with a scale for each block",
    "_scale": "FP8, with a scale",
    "_packed": "compressed-tensors",
    "_qweight": "GPTQ or AWQ",
}


def coding_of(name: str, names: Container[str], config: Mapping[str, Any] | None) -> str | None:
    """The quantization format of a tensor, for messages; None if it is not quantized.

    Args:
        name: the tensor's name; the tensor itself may be absent, with others in its place.
        names: the names of all tensors.
        config: the model's config, if there is one.
    """
    module, _, parameter = name.rpartition(".")
    begin, known = (f"{module}.", MARKS) if parameter == "weight" else (name, ENDINGS)
    marks = {f"{begin}{mark}": coding for mark, coding in known.items()}
    label = next((f"{coding} (`{mark}`)" for mark, coding in marks.items() if mark in names), None)
    method = _method(config)
    return f"{method}: {label}" if label and method else label


def _method(config: Mapping[str, Any] | None) -> str | None:
    settings = (config or {}).get("quantization_config")
    method = settings.get("quant_method") if isinstance(settings, dict) else None
    return method if isinstance(method, str) else None


def coding_of_any(
    name: str, dtype: Any, names: Container[str], config: Mapping[str, Any] | None
) -> str | None:
    """The quantization format of a tensor that no reader has decoded, for messages; None if it has
    plain numbers.

    Args:
        name: the tensor's name.
        dtype: its dtype; None if the tensor is absent, with others in its place.
        names: as in `coding_of`.
        config: as in `coding_of`.
    """
    coding = coding_of(name, names, config)
    if coding is not None:
        return coding
    if dtype is None:
        return _method(config)
    if not jnp.issubdtype(dtype, jnp.inexact):
        return _method(config) or f"an unknown format, in {dtype}"
    if jnp.dtype(dtype).itemsize == 1:
        # 8-bit floats without a scale are numbers, unless the config says that they are codes.
        scale = f"{name.rpartition('.')[0]}.scale"
        return _method(config) or (f"FP8, with a scale (`{scale}`)" if scale in names else None)
    return None


def check_plain(
    name: str,
    dtype: Any,
    names: Container[str],
    config: Mapping[str, Any] | None,
) -> None:
    """Raises instead of merging into quantized codes.

    Raises:
        UnsupportedAdapterError: if the tensor holds codes.
    """
    coding = coding_of_any(name, dtype, names, config)
    if coding is not None:
        raise UnsupportedAdapterError(
            f"has quantized weights: `{name}` is stored as {coding}, which is not supported, and "
            "an adapter cannot be added to codes. Merge into the model's unquantized weights, "
            "and quantize the result.",
        )
