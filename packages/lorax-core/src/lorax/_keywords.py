"""Tells options of Lorax from keywords of the model that share a name, or raises."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def refuses_ambiguous_keywords(function: Callable[P, R]) -> Callable[P, R]:
    """For a function of `fn`, its arguments and its keywords that has its own options.

    An option that is given while `fn` names a keyword like it could be meant for either, and raises
    a `TypeError`. A keyword that a `functools.partial` has bound is settled. Where `fn` takes
    `**kwargs`, the option is Lorax's.
    """
    parameters = inspect.signature(function).parameters.values()
    options = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        for name in sorted(options & kwargs.keys()):
            if args and name in _keywords(args[0]):
                raise TypeError(
                    f"`{name}` is an option of {function.__name__} and a keyword of the function "
                    f"that it is given, so {name}={kwargs[name]!r} could be meant for either. Bind "
                    f"the function's own first, with functools.partial(fn, {name}=...) or a "
                    f"lambda; {name}=... is then the option."
                )
        return function(*args, **kwargs)

    return checked


def _keywords(fn: Any) -> set[str]:
    """The keywords that a function names and nothing has bound yet."""
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
