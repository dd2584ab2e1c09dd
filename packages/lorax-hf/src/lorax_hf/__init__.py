"""Lorax for the Flax models of Hugging Face transformers, in the words of PEFT."""

import importlib.metadata

from ._check import check_transformers as check_transformers

# Before anything of transformers is imported: version 5 has no Flax model to import.
check_transformers()

from ._doctor import (  # noqa: E402
    DefectWarning as DefectWarning,
    Finding as Finding,
    clip_mended as clip_mended,
    doctor as doctor,
)
from ._lora import AdaptedModel as AdaptedModel, lora as lora  # noqa: E402
from ._names import peft_names as peft_names  # noqa: E402
from ._presets import (  # noqa: E402
    COMPOSITES as COMPOSITES,
    PRESETS as PRESETS,
    Preset as Preset,
)
from ._spec import spec as spec  # noqa: E402

__version__ = importlib.metadata.version("lorax-hf")

__all__ = [
    "AdaptedModel",
    "COMPOSITES",
    "DefectWarning",
    "Finding",
    "PRESETS",
    "Preset",
    "check_transformers",
    "clip_mended",
    "doctor",
    "lora",
    "peft_names",
    "spec",
]
