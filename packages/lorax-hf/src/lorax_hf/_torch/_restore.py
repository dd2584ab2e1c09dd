"""Restores a module after a call, so that it keeps no tracer and no state."""

import collections
import contextlib
import types
from collections.abc import Callable, Generator, Iterator
from typing import Any

import torch

# What is not changed by a call, or not part of the module's copy.
_OUTSIDE = (type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType, torch.Tensor)


@contextlib.contextmanager
def restored(module: torch.nn.Module) -> Generator[None]:
    """At the end of this block, restores everything that the module's attributes refer to.

    These are the attributes of all submodules and of other objects, and the members of lists,
    dicts, sets and deques.
    """
    undo = list(_undo(module))
    try:
        yield
    finally:
        for restore in undo:
            restore()


def _undo(root: Any) -> Iterator[Callable[[], None]]:
    """For each mutable object that is reachable from `root`, a function that restores it."""
    seen: dict[int, Any] = {}  # with the objects, so that no other gets the same id
    waiting = [root]
    while waiting:
        value = waiting.pop()
        if id(value) in seen or isinstance(value, _OUTSIDE):
            continue
        if isinstance(value, dict):
            seen[id(value)] = value
            waiting += dict.values(value)
            yield _restore_dict(value, dict(value))
        elif isinstance(value, list | set | collections.deque):
            seen[id(value)] = value
            waiting += value
            yield _restore_members(value, list(value))
        elif isinstance(value, tuple):
            waiting += value
        attributes = getattr(value, "__dict__", None)
        if type(attributes) is dict and id(attributes) not in seen:
            seen[id(value)] = value
            waiting.append(attributes)


def _restore_dict(value: dict[Any, Any], members: dict[Any, Any]) -> Callable[[], None]:
    kind: Any = collections.OrderedDict if isinstance(value, collections.OrderedDict) else dict

    def restore() -> None:
        kind.clear(value)
        kind.update(value, members)

    return restore


def _restore_members(value: Any, members: list[Any]) -> Callable[[], None]:
    def restore() -> None:
        value.clear()
        add = value.update if isinstance(value, set) else value.extend
        add(members)

    return restore
