"""Kinds of adapters, one module each: the spec, the adapter, and its first factors."""

from . import dora as dora, ia3 as ia3, lora as lora
