"""Finds the part of this package, Flax or PyTorch, that handles a model."""

import functools
import importlib
import sys
from typing import Any, Protocol

from lorax import ArgumentError

from ._defects import Defect
from ._extras import EXTRAS, major, need
from ._rows import Described


class Part(Protocol):
    """The interface of a part of this package: `_flax._part` and `_torch._part`."""

    DEFECTS: tuple[Defect, ...]

    def described(self, model: Any, params: Any = None) -> Described:
        """A model as rows."""
        ...

    def config_of(self, model: Any) -> Any:
        """The config of a model, if it has one."""
        ...

    def lora(self, model: Any, **options: Any) -> Any:
        """A model that takes the pair in place of its parameters."""
        ...


def part_of(model: Any) -> Part:
    """The part for a model; a `MissingPackageError` says what to install if it needs more."""
    if _is_of(model, "torch", "nn.Module") or _is_function(model):
        return _part("torch")
    if _is_of(model, "transformers", "PretrainedConfig"):
        return _part("torch" if major("transformers") >= 5 else "flax")
    if any(cls.__name__ == "FlaxPreTrainedModel" for cls in type(model).__mro__):
        return _part("flax")
    raise ArgumentError(
        "lorax_hf takes a PyTorch module or its function, a Flax model of transformers, or the "
        f"config of one, not {type(model).__name__}."
    )


def described(model: Any, params: Any = None) -> Described:
    """A model as rows, of either library."""
    return part_of(model).described(model, params)


def installed_parts() -> list[Part]:
    """The parts whose packages are installed."""
    parts: list[Part] = []
    for extra in EXTRAS:
        try:
            parts.append(_part(extra))
        except ImportError:
            continue
    return parts


def _part(extra: str) -> Part:
    need(extra)
    return importlib.import_module(f"{__package__}._{extra}._part")  # pyright: ignore[reportReturnType]


def _is_function(model: Any) -> bool:
    """Whether a model is a function that `from_torch` has returned."""
    return _is_of(model, f"{__package__}._torch._function", "ModuleFunction")


def _is_of(model: Any, package: str, name: str) -> bool:
    """Whether a model is an instance of a class, without importing its package."""
    if package not in sys.modules:
        return False
    return isinstance(model, functools.reduce(getattr, name.split("."), sys.modules[package]))
