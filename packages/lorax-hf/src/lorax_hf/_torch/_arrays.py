"""Conversion between tensors and arrays, in the arguments and results of modules."""

import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import torch

from lorax import ArgumentError

# `Tensor.numpy` does not support bfloat16 and float8: their bits are viewed as integers.
_BY_BITS = {
    torch.bfloat16: (torch.int16, ml_dtypes.bfloat16),
    torch.float8_e4m3fn: (torch.uint8, ml_dtypes.float8_e4m3fn),
    torch.float8_e5m2: (torch.uint8, ml_dtypes.float8_e5m2),
}


def numpy_of(tensor: torch.Tensor, dtype: Any = None) -> np.ndarray[Any, Any]:
    """A copy of a tensor as a NumPy array; floating-point ones are cast to `dtype`, if given."""
    tensor = tensor.detach().cpu().resolve_conj().resolve_neg()
    if tensor.dtype in _BY_BITS:
        bits, native = _BY_BITS[tensor.dtype]
        array = tensor.contiguous().view(bits).numpy().view(native)
    else:
        array = tensor.numpy()
    refuse_lost_bits(array)
    wanted = dtype if dtype is not None and tensor.is_floating_point() else None
    return np.array(array, dtype=wanted, order="C")


def refuse_lost_bits(array: np.ndarray[Any, Any]) -> None:
    """Raises `ArgumentError` if JAX would wrap integers of an array to its narrower type."""
    kept = jax.dtypes.canonicalize_dtype(array.dtype)
    if array.dtype.kind not in "iu" or kept == array.dtype or not array.size:
        return
    limits = np.iinfo(kept)
    if array.min() < limits.min or array.max() > limits.max:
        raise ArgumentError(
            f"an array {array.dtype} {array.shape} has integers that {kept} does not hold, such as "
            f"{array.max()}. JAX has 64 bits under `jax.config.update('jax_enable_x64', True)`."
        )


def dtype_of(tensor: torch.Tensor) -> Any:
    """The dtype that JAX gives a tensor."""
    if tensor.dtype in _BY_BITS:
        return jnp.dtype(_BY_BITS[tensor.dtype][1])
    native = torch.empty((), dtype=tensor.dtype).numpy().dtype
    return jax.dtypes.canonicalize_dtype(native)


def in_jax(env: Any, value: Any) -> Any:
    """A module's arguments, with every array in them converted to a torchax tensor."""
    if isinstance(value, np.ndarray):
        refuse_lost_bits(value)
        value = jnp.asarray(value)
    if isinstance(value, jax.Array):
        return env.j2t_iso(value)
    if isinstance(value, torch.Tensor):
        raise ArgumentError(
            "the function of a PyTorch module takes JAX arrays, not tensors of PyTorch: pass "
            "`jnp.asarray(x)`."
        )
    return _mapped(value, lambda each: in_jax(env, each), lambda other: other)


def out_of_jax(value: Any) -> Any:
    """A module's result, with tensors as arrays; classes of outputs are registered as pytrees."""
    if isinstance(value, torch.Tensor):
        array_of = getattr(value, "jax", None)  # of torchax
        return jnp.asarray(numpy_of(value)) if array_of is None else array_of()
    if value is None or isinstance(value, bool | int | float | complex | str | jax.Array):
        return value
    return _mapped(value, out_of_jax, _refuse)


def _mapped(value: Any, change: Callable[[Any], Any], other: Callable[[Any], Any]) -> Any:
    """The same structure, with `change` applied to its members, or `other` to a leaf."""
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(change, value))
    if type(value) in (tuple, list):
        return type(value)(map(change, value))
    if isinstance(value, Mapping):
        changed = {key: change(each) for key, each in value.items()}
        if type(value) is dict:
            return changed
        _register_mapping(type(value))
        return type(value)(**changed)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value)]
        changed = {name: change(getattr(value, name)) for name in names}
        if other is _refuse:
            _register_dataclass(type(value), names)
        return type(value)(**changed)
    return other(value)


def _refuse(value: Any) -> Any:
    raise ArgumentError(
        f"the module returns a {type(value).__name__}, which is neither an array nor a tuple, "
        "list, dict or dataclass of them. Call it so that it does not (for a cache, "
        "`use_cache=False`), or wrap it in a module that returns arrays."
    )


def _register_mapping(cls: type) -> None:
    """Registers a class of outputs, such as transformers', so that `jax.jit` can return it."""

    def flatten(value: Any) -> Any:
        keys = tuple(value.keys())
        return [(jax.tree_util.DictKey(key), value[key]) for key in keys], keys

    def unflatten(keys: Any, values: Any) -> Any:
        return cls(**dict(zip(keys, values, strict=True)))

    def plain(value: Any) -> Any:
        return list(value.values()), tuple(value.keys())

    _once(cls, lambda: jax.tree_util.register_pytree_with_keys(cls, flatten, unflatten, plain))


def _register_dataclass(cls: type, names: list[str]) -> None:
    _once(cls, lambda: jax.tree_util.register_dataclass(cls, data_fields=names, meta_fields=[]))


_registered: set[type] = set()


def _once(cls: type, register: Callable[[], Any]) -> None:
    if cls not in _registered:
        _registered.add(cls)
        # A `ValueError` means that the class is already registered.
        with contextlib.suppress(ValueError):
            register()
