"""The models: what each file of `models/` registers with `@model`."""

import importlib
import importlib.metadata
import pkgutil
from collections.abc import Callable
from typing import Any, NamedTuple

from . import models


class Subject(NamedTuple):
    """A model as Lorax takes it: a function of the parameters first, and what to call it with."""

    fn: Callable[..., Any]
    params: Any
    args: tuple[Any, ...]


class Model(NamedTuple):
    """One row of the table.

    Attributes:
        module: the file of `models/`, which has the name that its package is imported by.
        name: what the model is called in the table.
        make: builds it.
        single: whether it runs in float32, where the model cannot run in float64. In float64,
            what is not rounding is a fault.
        transforms: whether `testing.check` tries `vmap`, `checkpoint` and `scan` too, which
            takes long. One model of each framework has it.
        fault: a part of the message with which the model is known to fail.
    """

    module: str
    name: str
    make: Callable[[], Subject]
    single: bool
    transforms: bool
    fault: str | None

    @property
    def title(self) -> str:
        """The name by which a command or a record asks for the model."""
        return f"{self.module}: {self.name}"

    @property
    def version(self) -> str:
        """The distribution and its version."""
        distribution = importlib.metadata.packages_distributions()[self.module][0]
        return f"{distribution} {importlib.metadata.version(distribution)}"


CATALOG: dict[str, Model] = {}


def model(
    name: str, *, single: bool = False, transforms: bool = False, fault: str | None = None
) -> Callable[[Callable[[], Subject]], Callable[[], Subject]]:
    """Registers the function that builds a model; the options are fields of `Model`."""

    def register(make: Callable[[], Subject]) -> Callable[[], Subject]:
        module = make.__module__.rpartition(".")[2]
        row = Model(module, name, make, single, transforms, fault)
        assert row.title not in CATALOG, f"two models are called {row.title}"
        CATALOG[row.title] = row
        return make

    return register


def modules() -> list[str]:
    """The files of `models/`."""
    return sorted(info.name for info in pkgutil.iter_modules(models.__path__))


def load(module: str) -> list[Model]:
    """The models of one file, whose package is imported now."""
    importlib.import_module(f"{models.__name__}.{module}")
    return [row for row in CATALOG.values() if row.module == module]
