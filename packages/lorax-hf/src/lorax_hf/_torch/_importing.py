"""Makes torchax importable with a torch that lacks some operators that it refers to."""

import contextlib
from collections.abc import Generator
from typing import Any

from torch._ops import OpOverloadPacket


@contextlib.contextmanager
def missing_overloads_allowed() -> Generator[None]:
    """Inside this block, operator overloads that this torch lacks are placeholders.

    The tables of torchax 0.0.13 refer to overloads that torch 2.13 removed (those of named tensors,
    such as `aten.prod.dim_Dimname`), so importing it raises `AttributeError`. The next release of
    torchax does not refer to them.
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
