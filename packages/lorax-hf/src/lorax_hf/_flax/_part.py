"""The interface `_library.Part` for Flax models."""

from ._adapted import adapted as lora
from ._defects import DEFECTS
from ._parameters import config_of
from ._rows import described

__all__ = ["DEFECTS", "config_of", "described", "lora"]
