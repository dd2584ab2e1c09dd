"""Kinds of adapters, one module each: the spec, the adapter, and its first factors."""

from . import (
    adalora as adalora,
    delora as delora,
    dora as dora,
    ia3 as ia3,
    lora as lora,
    lora_fa as lora_fa,
    tokens as tokens,
    vera as vera,
)
