"""The interface `_library.Part` for PyTorch modules."""

from typing import Any

from ._adapted import adapted as lora
from ._defects import DEFECTS
from ._function import ModuleFunction
from ._rows import described

__all__ = ["DEFECTS", "config_of", "described", "lora"]


def config_of(model: Any) -> Any:
    """The config of a module, of transformers or another library; or `model`, if it has none."""
    model = model.module if isinstance(model, ModuleFunction) else model
    return getattr(model, "config", model)
