"""The base that adapters are merged into or compared with: safetensors files, or a GGUF file."""

from pathlib import Path
from typing import Any

from .._errors import AdapterError
from .checkpoint import Checkpoint, open_checkpoint
from .decoding import with_decoded
from .gguf import is_gguf
from .gguf_checkpoint import open_gguf


def open_base(path: Path, dtype: Any = None) -> Checkpoint:
    """The base at a path, whose quantized weights are decoded when they are read.

    Args:
        path: of a safetensors file, a folder, or a GGUF file.
        dtype: that the tensors of a GGUF file are written in.

    Raises:
        AdapterError: if there is a dtype for safetensors files, which say their own.
    """
    if is_gguf(path):
        return open_gguf(path, dtype)
    if dtype is not None:
        raise AdapterError(
            "is in safetensors files, whose dtype is kept; --dtype is only for a GGUF file.", path
        )
    return with_decoded(open_checkpoint(path))
