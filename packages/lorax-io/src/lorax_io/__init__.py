"""Lorax adapters on disk."""

import importlib.metadata

from ._native import (
    AdapterFileError as AdapterFileError,
    load_adapter as load_adapter,
    read_metadata as read_metadata,
    save_adapter as save_adapter,
)

__all__ = ["AdapterFileError", "load_adapter", "read_metadata", "save_adapter"]
__version__ = importlib.metadata.version("lorax-io")
