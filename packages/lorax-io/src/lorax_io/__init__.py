"""Reads and writes LoRA adapters, base models and merged models for `lorax`.

Adapters: the native format, PEFT, diffusers, kohya, mlx-lm, llama.cpp, Keras, tunix and others.
Base models: safetensors and GGUF files, quantized or not. The command `lorax` does the same from a
shell.
"""

import importlib.metadata
import inspect
from typing import Any

from ._bases.load_base import load_base as load_base
from ._bases.merged import save_merged as save_merged
from ._errors import (
    UNTIL as _UNTIL,
    AdapterError as AdapterError,
    AdapterFileError as AdapterFileError,
    AdapterMismatchError as AdapterMismatchError,
    AdapterNotFoundError as AdapterNotFoundError,
    AdapterWarning as AdapterWarning,
    AdapterWriteError as AdapterWriteError,
    UnsupportedAdapterError as UnsupportedAdapterError,
    warn as _warn,
)
from ._formats.diffusers import save_diffusers as save_diffusers
from ._formats.keras import save_keras as save_keras
from ._formats.kohya import save_kohya as save_kohya
from ._formats.llama_cpp import save_gguf as save_gguf
from ._formats.mlx import save_mlx as save_mlx
from ._formats.native import (
    load_adapter as load_adapter,
    load_pair as load_pair,
    read_metadata as read_metadata,
    save_adapter as save_adapter,
)
from ._formats.opening import (
    OpenedAdapter as OpenedAdapter,
    load_any as load_any,
    open_adapter as open_adapter,
)
from ._formats.original import save_original as save_original
from ._formats.peft.folder import load_peft as load_peft, save_peft as save_peft
from ._formats.tunix import save_tunix as save_tunix
from ._frozen import load_frozen as load_frozen, save_frozen as save_frozen
from ._hub import pull_from_hub as pull_from_hub, push_to_hub as push_to_hub
from ._names import (
    flax_names as flax_names,
    read_names as read_names,
    write_names as write_names,
)
from ._plain_names import Names as Names
from ._torch_names import (
    Conv as Conv,
    Conv1D as Conv1D,
    Embedding as Embedding,
    Experts as Experts,
    Linear as Linear,
    Parameter as Parameter,
    Tensor as Tensor,
    TorchName as TorchName,
)

__version__ = importlib.metadata.version("lorax-io")

__all__ = [
    "AdapterError",
    "AdapterFileError",
    "AdapterMismatchError",
    "AdapterNotFoundError",
    "AdapterWarning",
    "AdapterWriteError",
    "Conv",
    "Conv1D",
    "Embedding",
    "Experts",
    "Linear",
    "Names",
    "OpenedAdapter",
    "Parameter",
    "Tensor",
    "TorchName",
    "UnsupportedAdapterError",
    "flax_names",
    "load_adapter",
    "load_any",
    "load_base",
    "load_frozen",
    "load_pair",
    "load_peft",
    "open_adapter",
    "pull_from_hub",
    "push_to_hub",
    "read_metadata",
    "read_names",
    "save_adapter",
    "save_diffusers",
    "save_frozen",
    "save_gguf",
    "save_keras",
    "save_kohya",
    "save_merged",
    "save_mlx",
    "save_original",
    "save_peft",
    "save_tunix",
    "write_names",
]

# Tracebacks and reprs show the names that users import.
for _value in [globals()[_name] for _name in __all__]:
    if inspect.isclass(_value) or inspect.isfunction(_value):
        _value.__module__ = __name__


def __getattr__(name: str) -> Any:
    if name == "Layout":
        _warn(f"lorax_io.Layout is now called `TorchName`. {_UNTIL}", DeprecationWarning)
        return TorchName
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
