"""Lets torchax be imported beside a torch that has fewer operators than it expects."""

import contextlib
from collections.abc import Generator
from typing import Any

from torch._ops import OpOverloadPacket


@contextlib.contextmanager
def missing_overloads_allowed() -> Generator[None]:
    """Within the block, an operator overload that this torch does not have is a placeholder.

    torchax 0.0.13 has tables whose keys are overloads that torch 2.13 removed (those of named
    tensors, such as `aten.prod.dim_Dimname`), so that importing it raises `AttributeError`. The
    next release of torchax does not name them.
    """
    original = OpOverloadPacket.__getattr__

    def overload(self: Any, key: str) -> Any:
        try:
            return original(self, key)
        except AttributeError:
            if key.startswith("__"):
                raise
            return (self._qualified_op_name, key)

    OpOverloadPacket.__getattr__ = overload
    try:
        yield
    finally:
        OpOverloadPacket.__getattr__ = original
