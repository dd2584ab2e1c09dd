"""Deprecated names of arguments."""

import functools
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

from ._errors import ArgumentError

F = TypeVar("F", bound=Callable[..., Any])


def takes_old_names(**names: str) -> Callable[[F], F]:
    """Lets a function accept keyword arguments by old names, with a `DeprecationWarning`.

    Args:
        **names: maps each old name to the current one.
    """

    def decorate(fn: F) -> F:
        @functools.wraps(fn)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            for old, new in names.items():
                if old in kwargs:
                    warnings.warn(
                        f"{fn.__name__}({old}=…) is now called `{new}`. The old name will be "
                        "removed in the next minor version.",
                        DeprecationWarning,
                        stacklevel=2,
                    )
                    if new in kwargs:
                        raise ArgumentError(f"{fn.__name__}() got both `{old}` and `{new}`.")
                    kwargs[new] = kwargs.pop(old)
            return fn(*args, **kwargs)

        return wrapper  # type: ignore[return-value]

    return decorate
