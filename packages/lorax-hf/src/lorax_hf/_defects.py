"""Known defects of the installed libraries, and what to do about each."""

from collections.abc import Callable
from typing import Any, NamedTuple

from lorax import LoraxWarning


class Finding(NamedTuple):
    """One defect."""

    models: tuple[str, ...]  # model types
    what: str
    remedy: str


class DefectWarning(LoraxWarning):
    """The installed transformers is known to be wrong for this model."""


class Defect(NamedTuple):
    """A finding, and when it is one."""

    finding: Finding
    is_there: Callable[[], bool]  # in the installed libraries
    concerns: Callable[[Any], bool]  # a config
