"""Distinguishes options of Lorax from keyword arguments of the model with the same name."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from ._errors import ArgumentError

P = ParamSpec("P")
R = TypeVar("R")


def refuses_ambiguous_keywords(function: Callable[P, R]) -> Callable[P, R]:
    """Decorates a function that takes `fn`, its arguments and keywords, and options of its own.

    An option whose name is also a keyword of `fn` could be meant for either, and raises
    `ArgumentError`. A keyword that `functools.partial` has bound is not ambiguous. If `fn` takes
    `**kwargs`, the option is Lorax's.
    """
    parameters = inspect.signature(function).parameters.values()
    options = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        for name in sorted(options & kwargs.keys()):
            if args and name in _keywords(args[0]):
                raise ArgumentError(
                    f"`{name}` is an option of {function.__name__} and a keyword of your "
                    f"function, so {name}={kwargs[name]!r} is ambiguous. Bind the keyword of your "
                    f"function first, with functools.partial(fn, {name}=...) or a lambda; "
                    f"{name}=... is then the option."
                )
        return function(*args, **kwargs)

    return checked


def _keywords(fn: Any) -> set[str]:
    """Returns the named keywords of a function that are not bound yet."""
    bound: set[str] = set()
    while isinstance(fn, functools.partial):
        bound |= fn.keywords.keys()
        fn = fn.func
    try:
        parameters = inspect.signature(fn).parameters.values()
    except (TypeError, ValueError):  # Some builtins have no signature.
        return set()
    named = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    return named - bound
