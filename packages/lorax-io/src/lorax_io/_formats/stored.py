"""One tensor of a file, which is read when it is needed."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from .._places import Array


class Stored(NamedTuple):
    """A tensor as the file has it, or in another order of its axes, or a part of it."""

    name: str  # in the file
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    view: Callable[[], Array]

    def turned(self) -> "Stored":
        """The same with its axes in reverse order."""
        return self._replace(shape=self.shape[::-1], view=lambda: self.view().T)

    def part(self, *sizes: int) -> "Stored":
        """The first entries along each axis."""
        index = tuple(map(slice, sizes))
        return self._replace(shape=sizes, view=lambda: self.view()[index])

    @classmethod
    def of(cls, name: str, array: Array) -> "Stored":
        """An array that is in memory."""
        return cls(name, array.dtype, array.shape, lambda: array)
