"""Lorax adapters on disk: native files and PEFT folders, both ways."""

import importlib.metadata

from ._errors import (
    AdapterError as AdapterError,
    AdapterFileError as AdapterFileError,
    AdapterMismatchError as AdapterMismatchError,
    AdapterNotFoundError as AdapterNotFoundError,
    AdapterWarning as AdapterWarning,
    UnsupportedAdapterError as UnsupportedAdapterError,
)
from ._layouts import (
    Conv as Conv,
    Conv1D as Conv1D,
    Embedding as Embedding,
    Experts as Experts,
    Layout as Layout,
    Linear as Linear,
    Tensor as Tensor,
)
from ._native import (
    load_adapter as load_adapter,
    read_metadata as read_metadata,
    save_adapter as save_adapter,
)
from ._peft import load_peft as load_peft, save_peft as save_peft

__version__ = importlib.metadata.version("lorax-io")
