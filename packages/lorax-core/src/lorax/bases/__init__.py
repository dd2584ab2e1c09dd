"""The formats of quantized bases, one module each. Importing them fills `FORMATS`."""

from .._base import (
    FORMATS as FORMATS,
    Blocks as Blocks,
    Format as Format,
    QuantizedWeight as QuantizedWeight,
    defformat as defformat,
    quantized_from_settings as quantized_from_settings,
)
from . import (
    fp8 as fp8,
    int4 as int4,
    int8 as int8,
    mxfp4 as mxfp4,
    nf4 as nf4,
)
