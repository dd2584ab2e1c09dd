"""Kinds of adapters, one module each: the spec, the adapter, and its initial factors.

This package exports everything that a custom kind needs.
"""

from .._adapter import (
    KINDS as KINDS,
    Labeled as Labeled,
    Layout as Layout,
    Neutral as Neutral,
    adapter_from_settings as adapter_from_settings,
    defkind as defkind,
    make_term as make_term,
    static as static,
)
from .._adapter_spec import Start as Start, Started as Started
from .._frozen_weight import factors_from_base as factors_from_base
from . import (
    adalora as adalora,
    bdlora as bdlora,
    delora as delora,
    dora as dora,
    gralora as gralora,
    ia3 as ia3,
    locon as locon,
    loha as loha,
    lokr as lokr,
    lora as lora,
    lora_fa as lora_fa,
    miss as miss,
    oft as oft,
    tokens as tokens,
    vera as vera,
)

__all__ = [
    "Labeled",
    "Layout",
    "Start",
    "Started",
    "defkind",
    "factors_from_base",
    "make_term",
    "static",
]
