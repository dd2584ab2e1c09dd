"""Lorax for Hugging Face and PyTorch models, with PEFT's names for their modules."""

import importlib.metadata
import inspect

from ._defects import DefectWarning as DefectWarning, Finding as Finding
from ._doctor import doctor as doctor
from ._errors import (
    CheckpointError as CheckpointError,
    CheckpointNotFoundError as CheckpointNotFoundError,
    ModuleWarning as ModuleWarning,
    OperatorError as OperatorError,
    QuantizedModuleError as QuantizedModuleError,
    ScanError as ScanError,
    StaticCacheError as StaticCacheError,
)
from ._flax._clip import clip_mended as clip_mended
from ._flax._presets import (
    COMPOSITES as COMPOSITES,
    PRESETS as PRESETS,
    Preset as Preset,
)
from ._lora import lora as lora
from ._names import peft_names as peft_names
from ._pytorch import (
    from_torch as from_torch,
    generate as generate,
    load_torch as load_torch,
    register_op as register_op,
)
from ._spec import spec as spec

__version__ = importlib.metadata.version("lorax-hf")

__all__ = [
    "COMPOSITES",
    "CheckpointError",
    "CheckpointNotFoundError",
    "DefectWarning",
    "Finding",
    "ModuleWarning",
    "OperatorError",
    "PRESETS",
    "Preset",
    "QuantizedModuleError",
    "ScanError",
    "StaticCacheError",
    "clip_mended",
    "doctor",
    "from_torch",
    "generate",
    "load_torch",
    "lora",
    "peft_names",
    "register_op",
    "spec",
]

# Tracebacks and reprs show the names that users import.
for _value in [globals()[_name] for _name in __all__]:
    if inspect.isclass(_value) or inspect.isfunction(_value):
        _value.__module__ = __name__
