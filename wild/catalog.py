"""The catalog of models that the files of `models/` register with `@model`."""

import importlib
import importlib.metadata
import pkgutil
from collections.abc import Callable
from typing import Any, NamedTuple

from . import models


class Subject(NamedTuple):
    """A function whose first argument is the parameters, and its arguments."""

    fn: Callable[..., Any]
    params: Any
    args: tuple[Any, ...]


class Model(NamedTuple):
    """One row of the table.

    Attributes:
        module: the file of `models/`, named like the module that it imports.
        name: the model's name in the table.
        make: builds the model.
        single: whether it runs in float32, because the model cannot run in float64. In float64,
            any error larger than rounding is a fault.
        transforms: whether `testing.check` also applies `vmap`, `checkpoint` and `scan`, which
            is slow. It is set for one model of each framework.
        fault: a part of the error message, if the model is known to fail.
    """

    module: str
    name: str
    make: Callable[[], Subject]
    single: bool
    transforms: bool
    fault: str | None

    @property
    def title(self) -> str:
        """The model's name on the command line and in records."""
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
        assert row.title not in CATALOG, f"two models have the title {row.title}"
        CATALOG[row.title] = row
        return make

    return register


def modules() -> list[str]:
    """The names of the files in `models/`."""
    return sorted(info.name for info in pkgutil.iter_modules(models.__path__))


def load(module: str) -> list[Model]:
    """Imports one file of `models/`; returns its models."""
    importlib.import_module(f"{models.__name__}.{module}")
    return [row for row in CATALOG.values() if row.module == module]
