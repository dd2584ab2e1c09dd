"""Kinds of adapters, one module each: the spec, the adapter, and its first factors."""

from . import (
    dora as dora,
    gralora as gralora,
    ia3 as ia3,
    locon as locon,
    loha as loha,
    lokr as lokr,
    lora as lora,
    miss as miss,
)
