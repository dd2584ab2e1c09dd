"""Lorax adapters on disk: native files and PEFT folders, both ways."""

import importlib.metadata

from ._diffusers import save_diffusers as save_diffusers
from ._errors import (
    AdapterError as AdapterError,
    AdapterFileError as AdapterFileError,
    AdapterMismatchError as AdapterMismatchError,
    AdapterNotFoundError as AdapterNotFoundError,
    AdapterWarning as AdapterWarning,
    UnsupportedAdapterError as UnsupportedAdapterError,
)
from ._hub import pull_from_hub as pull_from_hub, push_to_hub as push_to_hub
from ._layouts import (
    Conv as Conv,
    Conv1D as Conv1D,
    Embedding as Embedding,
    Experts as Experts,
    Layout as Layout,
    Linear as Linear,
    Names as Names,
    Tensor as Tensor,
)
from ._merged import save_merged as save_merged
from ._names import (
    flax_names as flax_names,
    read_names as read_names,
    write_names as write_names,
)
from ._native import (
    load_adapter as load_adapter,
    load_pair as load_pair,
    read_metadata as read_metadata,
    save_adapter as save_adapter,
)
from ._peft import load_peft as load_peft, save_peft as save_peft

__version__ = importlib.metadata.version("lorax-io")

__all__ = [
    "AdapterError",
    "AdapterFileError",
    "AdapterMismatchError",
    "AdapterNotFoundError",
    "AdapterWarning",
    "Conv",
    "Conv1D",
    "Embedding",
    "Experts",
    "Layout",
    "Linear",
    "Names",
    "Tensor",
    "UnsupportedAdapterError",
    "flax_names",
    "load_adapter",
    "load_pair",
    "load_peft",
    "pull_from_hub",
    "push_to_hub",
    "read_metadata",
    "read_names",
    "save_adapter",
    "save_diffusers",
    "save_merged",
    "save_peft",
    "write_names",
]
