"""`Stored`: one tensor of a file, read when it is needed."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from .._places import Array


class Stored(NamedTuple):
    """A tensor of a file, possibly transposed, reshaped or sliced; `view` reads it."""

    name: str  # in the file, for messages
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    view: Callable[[], Array]

    def turned(self) -> "Stored":
        """The tensor with its axes in reverse order."""
        return self._replace(shape=self.shape[::-1], view=lambda: self.view().T)

    def shaped(self, shape: tuple[int, ...]) -> "Stored":
        """The tensor reshaped; one size may be −1, for what is left."""
        known = math.prod(size for size in shape if size != -1)
        left = math.prod(self.shape) // known
        whole = tuple(left if size == -1 else size for size in shape)
        return self._replace(shape=whole, view=lambda: self.view().reshape(whole))

    def part(self, *sizes: int) -> "Stored":
        """The first entries along each axis, so many as `sizes`."""
        index = tuple(map(slice, sizes))
        return self._replace(shape=sizes, view=lambda: self.view()[index])

    @classmethod
    def of(cls, name: str, array: Array) -> "Stored":
        """A tensor that is already in memory."""
        return cls(name, array.dtype, array.shape, lambda: array)
