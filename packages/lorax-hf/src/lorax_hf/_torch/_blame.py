"""Adds the name of the running submodule to errors inside a module."""

import contextlib
from collections.abc import Generator
from typing import Any

import jax
import torch
from torch.overrides import TorchFunctionMode

from .._errors import OperatorError


@contextlib.contextmanager
def errors_named(module: torch.nn.Module) -> Generator[None]:
    """Adds the operator and the submodule to errors inside this block."""
    from torchax.tensor import OperatorNotFound

    try:
        yield
    except OperatorNotFound as error:
        operator = str(error).removeprefix("Operator with name ").partition(" has no")[0]
        raise OperatorError(
            f"torchax does not have the operator `{operator}`, which {_running(module, error)} "
            "uses. Add it as a function of JAX arrays: "
            f"`lorax_hf.register_op({_as_given(operator)!r}, function)`."
        ) from error
    except jax.errors.ConcretizationTypeError as error:
        error.add_note(
            f"{_running(module, error)} has Python control flow that depends on the values of an "
            "array, which cannot be traced. Outside `jax.jit`, it may work."
        )
        raise
    except Exception as error:
        error.add_note(f"Raised while {_running(module, error)} was running.")
        raise


class OperandErrors(TorchFunctionMode):
    """Turns a `TypeError` in `x + y`, such as for shapes that do not match, into a `ValueError`.

    For a `TypeError`, Python would report that the operator does not support these types.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        try:
            return func(*args, **(kwargs or {}))
        except TypeError as error:
            if func not in _BINARY:
                raise
            raise ValueError(str(error)) from error


_BINARY = {
    getattr(torch.Tensor, f"__{side}{name}__")
    for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul")
    for side in ("", "r")
    if hasattr(torch.Tensor, f"__{side}{name}__")
} | {getattr(torch.Tensor, name) for name in ("add", "sub", "mul", "div", "matmul", "pow")}


def _running(module: torch.nn.Module, error: BaseException) -> str:
    """The innermost submodule in the traceback of an error."""
    names = {id(owner): name for name, owner in module.named_modules()}
    innermost, traceback = module, error.__traceback__
    while traceback is not None:
        owner = traceback.tb_frame.f_locals.get("self")
        if id(owner) in names:
            innermost = owner
        traceback = traceback.tb_next
    name = names[id(innermost)]
    where = f"`{name}`" if name else "the module"
    return f"{where} ({type(innermost).__name__})"


def _as_given(operator: str) -> str:
    """An operator's name in the form that `register_op` takes: `aten::roll` is `aten.roll`."""
    return operator.replace("::", ".")
