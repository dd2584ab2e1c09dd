"""How other libraries store quantized weights, one module each."""

from ..._errors import UnsupportedAdapterError
from ..coded import ENDINGS, MARKS
from . import bitsandbytes, compressed_tensors, fp8, gptq, mxfp4
from .coding import (
    AnyCoded as AnyCoded,
    Coded as Coded,
    Decoded as Decoded,
    Finder,
    Tensors as Tensors,
    fitting as fitting,
    setting,
)

# Tried in this order; the first that finds a weight is used.
CODINGS: dict[str, Finder] = {
    "bitsandbytes, 4 bits": bitsandbytes.find_4bit,
    "bitsandbytes, 8 bits": bitsandbytes.find_8bit,
    "FP8 with `weight_scale_inv`": fp8.find,
    "GPTQ or AWQ": gptq.find,
    "compressed-tensors, packed integers": compressed_tensors.find_packed,
    "compressed-tensors, NVFP4 or MXFP4": compressed_tensors.find_fp4,
    "8 bits with `weight_scale`": compressed_tensors.find_scaled,
    "MXFP4 of experts": mxfp4.find,
}


def find_coded(tensors: Tensors, module: str, parameter: str) -> AnyCoded | None:
    """The codes of a quantized weight; None if it is not quantized in a form that can be read."""
    with fitting(f"{module}.{parameter}"):
        candidates = (find(tensors, module, parameter) for find in CODINGS.values())
        coded = next((coded for coded in candidates if coded is not None), None)
        if coded is not None:
            _check_unrotated(tensors, coded)
            _check_all_used(tensors, module, parameter, coded)
        return coded


def _check_unrotated(tensors: Tensors, coded: AnyCoded) -> None:
    """Rejects weights that meet rotated inputs, such as those of SpinQuant and QuIP."""
    transforms = setting(tensors, "transform_config")
    if isinstance(transforms, dict) and transforms.get("config_groups"):
        raise UnsupportedAdapterError(
            f"has `{coded.names[0]}`, and `transform_config` of its config rotates the inputs of "
            "weights, or weights, when the model runs. Use the unquantized weights."
        )


_ENDS = frozenset(ENDINGS) | {
    f"_{end}" for end in ("zero_point", "g_idx", "global_scale", "scale_2", "scales", "qzeros")
}


def _check_all_used(tensors: Tensors, module: str, parameter: str, coded: AnyCoded) -> None:
    """Rejects a weight with tensors that its reader does not use: they may change its values."""
    weight = f"{module}.{parameter}"
    own = (name.removeprefix(weight) for name in tensors.beginning(weight))
    is_matrix = parameter == "weight"
    ends = [
        end
        for end in own
        if end[:1] in ("", ".") or (end[:1] == "_" and (is_matrix or end in _ENDS))
    ]
    names = [weight + end for end in ends]
    if is_matrix:
        names += [name for mark in MARKS if (name := f"{module}.{mark}") in tensors]
    if left := sorted({*names} - {*coded.names}):
        raise UnsupportedAdapterError(
            f"has `{left[0]}` next to `{coded.names[0]}`, so that the weight is in a format that "
            "is not read. If the tensor has no effect, delete it."
        )
