"""Tensors that share their memory: a change in place of one changes the others.

In PyTorch, `x.view(…)`, `x.transpose(…)`, `x.chunk(…)` and `x.detach()` return tensors in the
memory of `x`. torchax 0.0.13 returns copies, so that a change in place of one is lost in the other.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._mode_utils import no_dispatch

from .._errors import OperatorError

# Functions, methods and properties whose result may be in the memory of their first argument.
_VIEWS = frozenset(
    "view view_as reshape flatten ravel unflatten squeeze unsqueeze contiguous expand expand_as "
    "broadcast_to transpose permute t T mT movedim moveaxis swapaxes swapdims narrow select split "
    "chunk unbind tensor_split hsplit vsplit dsplit diagonal unfold as_strided".split()
)


class Aliases(TorchFunctionMode):
    """Records which tensor the result of an operator shares its memory with."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if args and _name(func) in _VIEWS and not any(map(_is_dtype, [*args, *kwargs.values()])):
            return _linked(func, args, kwargs, result)
        return result


def share_memory() -> None:
    """Makes a tensor of torchax read and write the memory of the tensor that it is a view of."""
    from torchax.tensor import Tensor as TorchaxTensor

    Tensor: Any = TorchaxTensor  # its attributes are replaced

    def get(self: Any) -> jax.Array:
        alias = self.__dict__.get("_alias")
        return self.__dict__["_array"] if alias is None else alias.read()

    def put(self: Any, array: jax.Array) -> None:
        alias, own = self.__dict__.get("_alias"), self.__dict__.get("_array")
        if alias is not None and array.shape == tuple(alias.twin.shape):
            alias.write(array)
            return
        self.__dict__["_alias"], self.__dict__["_array"] = None, array
        is_reshaped = own is not None and own.shape != array.shape  # as by `unsqueeze_`
        self.__dict__["_writes"] = self.__dict__.get("_writes", 0) + (not is_reshaped)

    def flattened(self: Any, start_dim: int = 0, end_dim: int = -1) -> Any:
        return torch.flatten(self, start_dim, end_dim)

    Tensor._elem = property(get, put)
    Tensor.flatten = flattened  # that of torchax is not seen by a mode
    Tensor.detach = detached
    Tensor.data = property(detached, Tensor.data.fset)


def detached(tensor: Any) -> Any:
    """A tensor in the same memory, without a gradient."""
    result = type(tensor)(jax.lax.stop_gradient(tensor.jax()), tensor._env)
    root, twin = _layout(tensor)
    result.__dict__["_alias"] = _Alias(root, twin, result._elem, is_detached=True)
    return result


@dataclasses.dataclass
class _Alias:
    """The memory of a tensor: some entries of another one, its root, which has no alias itself."""

    root: Any
    twin: torch.Tensor  # on the meta device, a view of a contiguous tensor of the root's shape
    array: jax.Array  # the entries, after `writes` changes of the root
    is_detached: bool = False

    def __post_init__(self) -> None:
        self.writes = self.root.__dict__["_writes"]
        self.root_shape = self.root._elem.shape

    def read(self) -> jax.Array:
        """The entries."""
        if self.writes != self.root.__dict__["_writes"]:
            self._check_shape()
            array = self._taken(self.root._elem).astype(self.array.dtype)
            self.array = jax.lax.stop_gradient(array) if self.is_detached else array
            self.writes = self.root.__dict__["_writes"]
        return self.array

    def write(self, array: jax.Array) -> None:
        """Changes the entries in the root."""
        self._check_shape()
        if any(stride == 0 and size > 1 for size, stride in self._axes()):
            raise OperatorError(
                "a tensor that `expand` returned is changed in place, and its entries share their "
                "memory. Call `clone()` first, as in PyTorch."
            )
        before = self.root._elem
        after = self._placed(before, array.astype(before.dtype))
        if self.is_detached and jnp.issubdtype(before.dtype, jnp.inexact):
            # The gradient of the root is as if there had been no change.
            after = jax.lax.stop_gradient(after) + (before - jax.lax.stop_gradient(before))
        self.root._elem = after
        self.array, self.writes = array, self.root.__dict__["_writes"]

    def _check_shape(self) -> None:
        if self.root._elem.shape != self.root_shape:
            raise OperatorError(
                f"a tensor of the shape {self.root_shape} gets another shape in place, and then it "
                "or a view of it is changed. Use the operator that returns a new tensor, such as "
                "`unsqueeze` for `unsqueeze_`."
            )

    def _axes(self) -> list[tuple[int, int]]:
        return list(zip(self.twin.shape, self.twin.stride(), strict=True))

    def _taken(self, whole: jax.Array) -> jax.Array:
        order = self._order()
        if order is None:
            return whole.reshape(-1)[self._index()]
        shape = [self.twin.shape[d] for d in order]
        return whole.reshape(shape).transpose([order.index(d) for d in range(len(order))])

    def _placed(self, whole: jax.Array, array: jax.Array) -> jax.Array:
        order = self._order()
        if order is None:
            return whole.reshape(-1).at[self._index()].set(array).reshape(whole.shape)
        return array.transpose(order).reshape(whole.shape)

    def _order(self) -> list[int] | None:
        """The order of axes in which the entries are all of the root's; None if there is none."""
        axes = self._axes()
        order = sorted(range(len(axes)), key=lambda d: (-axes[d][1], -axes[d][0]))
        count = 1
        for size, stride in (axes[d] for d in reversed(order)):
            if size != 1 and stride != count:
                return None
            count *= size
        return order if count == math.prod(self.root_shape) else None

    def _index(self) -> jax.Array:
        index = jnp.full((), int(self.twin.storage_offset()), jnp.int32)
        for size, stride in self._axes():
            index = index[..., None] + jnp.arange(size, dtype=jnp.int32) * stride
        return index


def _linked(func: Any, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> Any:
    """The result, whose memory is recorded if PyTorch would return a view of the first argument."""
    layout = _layout(args[0])
    if layout is None:
        return result
    root, twin = layout
    try:
        with no_dispatch(), torch._C.DisableTorchFunction():
            twins = func(twin, *map(_blank, args[1:]), **{k: _blank(v) for k, v in kwargs.items()})
    except (RuntimeError, TypeError):  # of a view that PyTorch would refuse
        return result
    if isinstance(twins, torch.Tensor):
        return _in_memory(args[0], result, root, twin, twins)
    pairs = zip(result, twins, strict=True)
    return type(result)(_in_memory(args[0], one, root, twin, of) for one, of in pairs)


def _in_memory(base: Any, result: Any, root: Any, before: torch.Tensor, after: torch.Tensor) -> Any:
    """One result, in the memory of the root where its twin is in that of the twin before."""
    if not _is_plain(result):
        return result
    is_view = after is before or after._is_view()
    if result is base:
        # torchax's `contiguous` returns the tensor itself, also where PyTorch copies it.
        return result if is_view else type(result)(result._elem, result._env)
    if is_view:
        alias = base.__dict__.get("_alias")
        is_detached = alias is not None and alias.is_detached
        result.__dict__["_alias"] = _Alias(root, after, result._elem, is_detached)
    return result


def _layout(tensor: Any) -> Any:
    """The tensor whose memory this one is in, and this one's twin; None if it is not of torchax."""
    from torchax.view import NarrowInfo, View

    if isinstance(tensor, View):
        info = tensor.view_info
        layout = _layout(tensor.parent) if isinstance(info, NarrowInfo) else None
        if layout is None or not isinstance(info, NarrowInfo):
            return None
        root, twin = layout
        with no_dispatch(), torch._C.DisableTorchFunction():
            return root, twin[info.slices]
    if not _is_plain(tensor):
        return None
    alias = tensor.__dict__.get("_alias")
    return (tensor, _blank(tensor)) if alias is None else (alias.root, alias.twin)


def _blank(value: Any) -> Any:
    """A contiguous tensor of the same shape without memory; another value as it is."""
    if not isinstance(value, torch.Tensor):
        return value
    with no_dispatch(), torch._C.DisableTorchFunction():
        return torch.empty(tuple(value.shape), dtype=value.dtype, device="meta")


def _name(func: Any) -> str:
    name = getattr(func, "__name__", "")
    return getattr(func.__self__, "__name__", "") if name == "__get__" else name


def _is_plain(value: Any) -> bool:
    from torchax.tensor import Tensor

    return isinstance(value, Tensor)


def _is_dtype(value: Any) -> bool:
    return isinstance(value, torch.dtype)
