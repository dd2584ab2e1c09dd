"""The torchax environment in which every module runs, with patched operators."""

import functools
import importlib.metadata
import inspect
from collections.abc import Callable
from typing import Any

import torch

from lorax import MissingPackageError

from . import (
    _attention,
    _convolution,
    _embedding,
    _gradients,
    _grouped_mm,
    _linear,
    _pooling,
    _random,
)
from ._aliases import share_memory
from ._autograd import use_backward
from ._importing import missing_overloads_allowed
from ._modes import running


@functools.cache
def environment() -> Any:
    """The environment of torchax, with the operators that this package fixes or adds."""
    try:
        with missing_overloads_allowed():
            import torchax

            env = torchax.default_env()
    except Exception as error:
        raise MissingPackageError(f"torchax cannot be imported. {_installed()}") from error
    for module in _MODULES:
        for op, function in module.OPERATORS.items():
            _put(env, op, function)
    for op, functional in _random.IN_PLACE.items():
        _put_in_place(env, op, functional)
    _gradients.keep_types()
    share_memory()
    use_backward(env, running)
    return env


_MODULES = (
    _attention,
    _convolution,
    _embedding,
    _gradients,
    _grouped_mm,
    _linear,
    _pooling,
    _random,
)


def register(op: Any, function: Callable[..., Any]) -> None:
    """Sets a function of JAX arrays as the implementation of an operator."""
    if isinstance(op, str):
        op = functools.reduce(getattr, op.split("."), torch.ops)
    _put(environment(), op, function)


def _put(env: Any, op: Any, function: Callable[..., Any]) -> None:
    from torchax.ops.ops_registry import Operator

    # torchax 0.0.13: `override_op_definition` gives the function its own tensors, not arrays.
    entry = Operator(
        op,
        function,
        is_jax_function=True,
        is_user_defined=True,
        needs_env="env" in inspect.signature(function).parameters,
        is_view_op=False,
    )
    _set(env, op, entry)


def _put_in_place(env: Any, op: Any, functional: Any) -> None:
    """Sets an operator that changes a tensor to what another one returns."""
    from torchax.ops.op_base import InplaceOp
    from torchax.ops.ops_registry import Operator

    entry = Operator(
        op,
        InplaceOp(functional),
        is_jax_function=False,
        is_user_defined=True,
        needs_env=False,
        is_view_op=True,
    )
    _set(env, op, entry)


def _set(env: Any, op: Any, entry: Any) -> None:
    try:
        for each in _overloads(op):
            env._ops[each] = entry
    except AttributeError as error:
        raise MissingPackageError(
            f"This torchax has no table of operators. {_installed()}"
        ) from error


def _overloads(op: Any) -> list[Any]:
    """An operator and its overloads: torchax may look it up under any of them."""
    if isinstance(op, torch._ops.OpOverload):
        return [op]
    if isinstance(op, torch._ops.OpOverloadPacket):
        return [op, *(getattr(op, name) for name in op.overloads() if not name.endswith("out"))]
    return [op]


def _installed() -> str:
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("torch", "torchax")]
    return (
        f"{' and '.join(versions)} may be incompatible; torch 2.13 and torchax 0.0.13 work "
        'together: pip install "torch==2.13.*" "torchax==0.0.13"'
    )
