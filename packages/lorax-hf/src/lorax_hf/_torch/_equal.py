"""Compares two layers: whether they compute the same function of their parameters and inputs."""

import functools
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

# Attributes that every module has; they are compared below, or do not affect the forward pass.
_COMMON = {*vars(nn.Module()), "_is_hf_initialized"}


def difference(one: nn.Module, other: nn.Module, step: int) -> str | None:
    """The first difference of two layers, such as "`window` is 5, not None"; None if equal.

    Args:
        one: a layer.
        other: a later layer.
        step: the difference of their indices. Integer attributes that differ by exactly this are
            taken for the layer's index, and found again by `index_names`.
    """
    return next(_differences("", one, other, step), None)


def _differences(name: str, one: Any, other: Any, step: int, inside: bool = False) -> Iterator[str]:
    """The differences of two members of layers.

    What is `inside` another object than a module is the same for all layers of a scan, so tensors
    and integers must be equal there.
    """
    if one is other:
        return
    label = f"`{name}`" if name else "it"
    if type(one) is not type(other):
        yield f"{label} is a {type(other).__name__}, not a {type(one).__name__}"
        return
    if isinstance(one, nn.Module):
        yield from _of_modules(name, one, other, step, inside)
    elif isinstance(one, torch.Tensor):
        if (one.shape, one.dtype) != (other.shape, other.dtype):
            yield f"{label} has the shape {tuple(other.shape)}, not {tuple(one.shape)}"
        elif inside and not _same_values(one, other):
            yield f"{label} has other values"
    elif isinstance(one, dict):
        yield from _of_members(name, one, other, step, inside=True)
    elif isinstance(one, list | tuple):
        ones, others = (dict(enumerate(value)) for value in (one, other))
        yield from _of_members(name, ones, others, step, inside=True)
    elif not inside and _is_index(one, other, step):
        return
    elif not _same(one, other):
        parts, others = _parts(one), _parts(other)
        if parts is None or others is None:
            yield f"{label} is {other!r}, not {one!r}"
        else:
            yield from _of_members(name, parts, others, step, inside=True)


def _of_modules(
    name: str, one: nn.Module, other: nn.Module, step: int, inside: bool
) -> Iterator[str]:
    for members in ("_parameters", "_buffers", "_modules"):
        yield from _of_members(name, getattr(one, members), getattr(other, members), step, inside)
    yield from _of_members(name, _attributes(one), _attributes(other), step, inside)
    for hooks in ("_forward_hooks", "_forward_pre_hooks"):
        ones, others = (list(getattr(module, hooks).values()) for module in (one, other))
        if next(_differences(hooks, ones, others, step), None) is not None:
            yield f"`{name or type(one).__name__}` has other hooks"


def _of_members(name: str, one: Any, other: Any, step: int, inside: bool = False) -> Iterator[str]:
    prefix = f"{name}." if name else ""
    for key in [*one, *(key for key in other if key not in one)]:
        if key not in one or key not in other:
            yield f"`{prefix}{key}` is in only one of them"
        else:
            yield from _differences(f"{prefix}{key}", one[key], other[key], step, inside)


def _parts(value: Any) -> dict[str, Any] | None:
    """The parts of an object without an `__eq__` of its own; None if they are not known."""
    if isinstance(value, types.MethodType):
        return {"__func__": value.__func__}
    if isinstance(value, types.FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
        return {"code": value.__code__, "defaults": value.__defaults__, "closure": cells}
    if isinstance(value, functools.partial):
        return {"func": value.func, "args": value.args, "keywords": value.keywords}
    bases = type(value).__mro__[:-1]
    in_python = all("__slots__" not in vars(base) and "__module__" in vars(base) for base in bases)
    plain = type(value).__eq__ is object.__eq__ and hasattr(value, "__dict__")
    return vars(value) if in_python and plain and vars(value) else None


def _attributes(module: nn.Module) -> dict[str, Any]:
    return {key: value for key, value in vars(module).items() if key not in _COMMON}


def _same_values(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.device.type == other.device.type == "meta":
        return True
    return one.device == other.device and torch.equal(one, other)


def _is_index(one: Any, other: Any, step: int) -> bool:
    return type(one) is int and other - one == step != 0


def _same(one: Any, other: Any) -> bool:
    try:
        return bool(one == other)
    except Exception:  # whatever a custom class raises, it does not say that they are equal
        return False


def index_names(one: nn.Module, other: nn.Module, step: int) -> list[tuple[str, str]]:
    """The attributes that hold a layer's index: the name of the submodule, and of the attribute."""
    names: list[tuple[str, str]] = []
    others = dict(other.named_modules())
    for name, module in one.named_modules():
        theirs = _attributes(others[name])
        for key, value in _attributes(module).items():
            if type(value) is int and _is_index(value, theirs[key], step):
                names.append((name, key))
    return names
