"""What `_library` asks of a part, for PyTorch modules."""

from typing import Any

from ._adapted import adapted as lora
from ._defects import DEFECTS
from ._function import ModuleFunction
from ._rows import described

__all__ = ["DEFECTS", "config_of", "described", "lora"]


def config_of(model: Any) -> Any:
    """The config of a module of transformers or of another library that has one; or the config."""
    model = model.module if isinstance(model, ModuleFunction) else model
    return getattr(model, "config", model)
