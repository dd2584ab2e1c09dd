"""The types that describe known defects of the installed libraries."""

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

from lorax import LoraxWarning


class Finding(NamedTuple):
    """A known defect of the installed libraries.

    Attributes:
        models: the model types that it affects.
        problem: what is wrong, as a clause.
        remedy: what to do about it, as an imperative.
    """

    models: tuple[str, ...]
    problem: str
    remedy: str

    @property
    def what(self) -> str:
        """The old name of `problem`."""
        warnings.warn(
            "Finding.what is now called `problem`. The old name will be removed in the next "
            "minor version.",
            DeprecationWarning,
            stacklevel=2,
        )
        return self.problem


class DefectWarning(LoraxWarning):
    """The installed libraries have a known defect that affects this model."""


class Defect(NamedTuple):
    """A finding, and the conditions under which it applies."""

    finding: Finding
    is_there: Callable[[], bool]  # whether the installed libraries have it
    concerns: Callable[[Any], bool]  # whether it affects a model with this config
