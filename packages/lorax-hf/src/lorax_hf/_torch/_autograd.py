"""`torch.autograd.Function` on arrays, as a `jax.custom_vjp` of its `forward` and `backward`.

torchax 0.0.13 runs `forward` alone, and JAX differentiates through it: the gradient of a
straight-through estimator, or of a reversed gradient, is then silently another.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch.utils import _pytree
from torch.utils.checkpoint import CheckpointFunction

from lorax import ArgumentError

from .._errors import OperatorError
from ._arrays import numpy_of


def use_backward(env: Any, running: Callable[..., Any]) -> None:
    """Makes `Function.apply` on tensors of torchax use the function's `backward`.

    Args:
        env: the torchax environment.
        running: of `env`, a name and a key, the context in which operators run on arrays.
    """
    original = torch.autograd.Function.apply.__func__

    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs or not any(map(_is_array, _pytree.tree_leaves(args))):
            return original(cls, *args, **kwargs)
        if cls is CheckpointFunction:  # `checkpoint(use_reentrant=True)`
            function, _, *inputs = args
            return function(*inputs)
        return _Call(cls, args, env, running)()

    setattr(torch.autograd.Function, "apply", classmethod(apply))  # noqa: B010


class Context:
    """What `forward` keeps for `backward`: the `ctx` of a PyTorch function."""

    def __init__(self, needs_input_grad: tuple[bool, ...]) -> None:
        self.needs_input_grad = needs_input_grad
        self.saved_tensors: tuple[Any, ...] = ()
        self.constant: list[Any] = []

    def save_for_backward(self, *tensors: Any) -> None:
        self.saved_tensors = tensors

    def save_for_forward(self, *tensors: Any) -> None:
        """Only for forward-mode derivatives, which `jax.custom_vjp` does not have."""

    def mark_non_differentiable(self, *tensors: Any) -> None:
        self.constant = list(tensors)

    def mark_dirty(self, *tensors: Any) -> None:
        raise OperatorError(
            "a torch.autograd.Function that changes its inputs in place (`mark_dirty`) is not "
            "supported. Return a new tensor."
        )

    def set_materialize_grads(self, value: bool) -> None:
        """The gradients of unused outputs are zeros in either case."""


class _Call:
    """One call of a function.

    JAX traces `_forward` and `_backward` at different times, so the arrays that one passes to the
    other are returned, and all else is kept here.
    """

    def __init__(self, cls: Any, args: Any, env: Any, running: Callable[..., Any]) -> None:
        self.cls, self.env, self.running = cls, env, running
        self.args = _Split(args)
        sizes = [len(_pytree.tree_leaves(arg)) for arg in args]
        # Where each argument that is an array itself is. Arrays in lists have no gradient.
        self.number = {sum(sizes[:k]): k for k, arg in enumerate(args) if _is_array(arg)}
        self.inputs = [jax.typeof(array) for array in self.args.arrays]

    def __call__(self) -> Any:
        call = jax.custom_vjp(lambda key, *arrays: self._forward(key, arrays)[0])
        call.defvjp(lambda key, *arrays: self._forward(key, arrays), self._backward)
        has_key = self.env._property.content.prng is not None
        key = self.env.get_and_rotate_prng_key() if has_key else None
        outputs = call(key, *self.args.arrays)
        if not torch.is_grad_enabled():
            outputs = jax.lax.stop_gradient(outputs)
        return self.returned.with_arrays(self.env, outputs)

    def _forward(
        self, key: jax.Array | None, arrays: Sequence[jax.Array]
    ) -> tuple[list[jax.Array], list[jax.Array]]:
        """The arrays that `forward` returns, and those that it keeps."""
        args = self.args.with_arrays(self.env, arrays)
        context = Context(tuple(_is_array(arg) and _is_inexact(arg.jax()) for arg in args))
        with self.running(self.env, self.cls.__name__, key), torch.no_grad():
            if self.cls.setup_context is torch.autograd.Function.setup_context:
                returned = self.cls.forward(context, *args)
            else:
                returned = self.cls.forward(*args)
                self.cls.setup_context(context, args, returned)
        constant = [id(tensor) for tensor in context.constant]
        context.constant = []
        self.returned, self.kept = _Split(returned), _Split(vars(context))
        self.is_constant = [
            id(leaf) in constant for leaf in _pytree.tree_leaves(returned) if _is_array(leaf)
        ]
        return self.returned.arrays, self.kept.arrays

    def _backward(self, kept: Sequence[jax.Array], given: Sequence[Any]) -> tuple[Any, ...]:
        """The gradients of the arrays among the arguments."""
        context = Context(())
        of_outputs = [
            _of_output(*output)
            for output in zip(given, self.returned.types, self.is_constant, strict=True)
        ]
        with self.running(self.env, self.cls.__name__):
            vars(context).update(self.kept.with_arrays(self.env, kept))
            returned = self.returned.with_arrays(self.env, of_outputs, lambda _: None)
            gradients = self.cls.backward(context, *_as_tuple(returned))
            of_inputs = (
                self._gradient(place, array, _as_tuple(gradients))
                for place, array in zip(self.args.places, self.inputs, strict=True)
            )
            return None, *of_inputs

    def _gradient(self, place: int, array: Any, gradients: tuple[Any, ...]) -> Any:
        """The gradient of one array, from those that `backward` returns for the arguments."""
        if not _is_inexact(array):
            return np.zeros(array.shape, jax.dtypes.float0)
        number = self.number.get(place)
        value = None if number is None else gradients[number]
        if value is None:
            return jnp.zeros(array.shape, array.dtype)
        gradient = value.jax() if _is_array(value) else jnp.asarray(numpy_of(value))
        if gradient.shape != array.shape:
            raise ArgumentError(
                f"{self.cls.__name__}.backward returns a gradient of the shape {gradient.shape} "
                f"for its argument {number}, whose shape is {array.shape}."
            )
        return _conj(gradient).astype(array.dtype)


class _Split:
    """A tree whose leaves are arrays and other values."""

    def __init__(self, tree: Any) -> None:
        leaves, self._structure = _pytree.tree_flatten(tree)
        self.places = [place for place, leaf in enumerate(leaves) if _is_array(leaf)]
        self.arrays = [leaves[place].jax() for place in self.places]
        self.types = [jax.typeof(array) for array in self.arrays]
        self._others = [None if _is_array(leaf) else leaf for leaf in leaves]

    def with_arrays(
        self, env: Any, arrays: Sequence[Any], other: Callable[[Any], Any] = lambda value: value
    ) -> Any:
        """The tree, with tensors of these arrays, and `other` of each other value."""
        leaves = list(map(other, self._others))
        for place, array in zip(self.places, arrays, strict=True):
            leaves[place] = env.j2t_iso(array)
        return _pytree.tree_unflatten(leaves, self._structure)


def _of_output(gradient: Any, output: Any, is_constant: bool) -> jax.Array:
    """The gradient of an output, as PyTorch gives it to `backward`."""
    if is_constant or not _is_inexact(output):
        return jnp.zeros(output.shape, output.dtype)
    return _conj(gradient)


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, tuple | list) else (value,)


def _conj(array: Any) -> jax.Array:
    """Between the gradients of JAX and of PyTorch, which are conjugate for complex arrays."""
    return jnp.conj(array)


def _is_array(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and hasattr(value, "jax")


def _is_inexact(array: Any) -> bool:
    return jnp.issubdtype(array.dtype, jnp.inexact)
