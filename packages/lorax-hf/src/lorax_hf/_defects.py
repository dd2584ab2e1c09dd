"""Known defects of the installed libraries, and what to do about each."""

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

from lorax import LoraxWarning


class Finding(NamedTuple):
    """One defect."""

    models: tuple[str, ...]  # model types
    problem: str
    remedy: str

    @property
    def what(self) -> str:
        """The old name of `problem`."""
        warnings.warn(
            "Finding.what is called `problem` now. The old name will go with the next minor "
            "version.",
            DeprecationWarning,
            stacklevel=2,
        )
        return self.problem


class DefectWarning(LoraxWarning):
    """The installed transformers is known to be wrong for this model."""


class Defect(NamedTuple):
    """A finding, and when it is one."""

    finding: Finding
    is_there: Callable[[], bool]  # in the installed libraries
    concerns: Callable[[Any], bool]  # a config
