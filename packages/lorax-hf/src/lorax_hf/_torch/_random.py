"""Random numbers of modules: all come from the key of the call."""

import contextlib
from collections.abc import Generator
from typing import Any

import jax
import torch
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree
from torch.utils.weak import WeakIdKeyDictionary

from lorax import ArgumentError


@contextlib.contextmanager
def randomness(env: Any, rng: jax.Array | None, name: str) -> Generator[None]:
    """Random numbers inside this block come from `rng`; without it, drawing one is an error."""
    before = env._property.content
    keys = type(before).override(before, prng=rng)

    def refuse() -> Any:
        raise ArgumentError(
            f"{name} draws random numbers: call it with `rng=`, a `jax.random` key."
        )

    if rng is None:
        keys.get_and_rotate_prng_key = refuse
    env._property.content = keys
    try:
        yield
    finally:
        env._property.content = before


class Draws(TorchFunctionMode):
    """Draws with the call's key where the module does not name a device.

    Ordinary tensors would be drawn by PyTorch when the function is compiled, and be the same in
    each of its calls. Those that cannot be drawn with the key are an error where they are used.
    A single number is not an error as long as it only decides in Python.
    """

    def __init__(self) -> None:
        super().__init__()
        self._drawn: Any = WeakIdKeyDictionary()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [
            leaf for leaf in _pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)
        ]
        if any(hasattr(tensor, "jax") for tensor in tensors):
            if any(tensor in self._drawn for tensor in tensors):
                # Not a `TypeError`, for which Python would report the operands instead.
                raise ArgumentError(
                    "random numbers that PyTorch has drawn are used here, and would be the same "
                    "in all calls of a compiled function. Draw them on the device of an input: "
                    "pass `device=x.device` to the function that makes the tensor."
                )
            return func(*args, **kwargs)
        generator = kwargs.get("generator")
        if func in _FACTORIES and generator is None and kwargs.get("device") is None:
            if _count(func, args, kwargs) != 1:
                kwargs = {**kwargs, "device": "jax"}
        before = torch.get_rng_state()
        result = func(*args, **kwargs)
        if generator is None and not torch.equal(before, torch.get_rng_state()):
            self._mark(result)
        elif any(tensor in self._drawn for tensor in tensors):
            self._mark(result)
        return result

    def _mark(self, result: Any) -> None:
        for leaf in _pytree.tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and not hasattr(leaf, "jax"):
                self._drawn[leaf] = True


_FACTORIES = (torch.rand, torch.randn, torch.randint, torch.randperm)


def _count(func: Any, args: Any, kwargs: Any) -> int:
    """The number of elements that a function makes."""
    with torch._C.DisableTorchFunction(), torch._C._DisableTorchDispatch():
        return func(*args, **{**kwargs, "device": "meta"}).numel()


def _exponential(x: jax.Array, lambd: float = 1.0, env: Any = None) -> jax.Array:
    return jax.random.exponential(env.get_and_rotate_prng_key(), x.shape, x.dtype) / lambd


def _cauchy(x: jax.Array, median: float = 0.0, sigma: float = 1.0, env: Any = None) -> jax.Array:
    return jax.random.cauchy(env.get_and_rotate_prng_key(), x.shape, x.dtype) * sigma + median


# torchax 0.0.13 draws these with the same key in every call, and does not change the tensor.
OPERATORS = {torch.ops.aten.exponential: _exponential, torch.ops.aten.cauchy: _cauchy}
IN_PLACE = {
    torch.ops.aten.exponential_: torch.ops.aten.exponential,
    torch.ops.aten.cauchy_: torch.ops.aten.cauchy,
}
