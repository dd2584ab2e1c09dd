"""Quantization formats, one module each. Importing this package fills `FORMATS`."""

from .._base import (
    QuantizedWeight as QuantizedWeight,
    quantized_from_settings as quantized_from_settings,
)
from .._base_format import (
    FORMATS as FORMATS,
    Blocks as Blocks,
    Format as Format,
    defformat as defformat,
    format_of as format_of,
)
from . import (
    affine as affine,
    fp8 as fp8,
    int4 as int4,
    int8 as int8,
    llm_int8 as llm_int8,
    mxfp4 as mxfp4,
    nf4 as nf4,
    nvfp4 as nvfp4,
)
from .affine import Affine as Affine
from .llm_int8 import LLMInt8 as LLMInt8
from .nvfp4 import NVFP4 as NVFP4

__all__ = ["Affine", "Blocks", "Format", "LLMInt8", "NVFP4", "defformat", "format_of"]
