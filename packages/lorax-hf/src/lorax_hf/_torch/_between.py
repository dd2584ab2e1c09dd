"""Placeholders for values that do not exist while a module's layers are scanned."""

from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree

from .._errors import ScanError


class Between(torch.Tensor):
    """A placeholder for a layer's result inside a scan: it has a shape, but no values."""

    @staticmethod
    def of(shape: tuple[int, ...], dtype: torch.dtype) -> "Between":
        empty = torch.empty(shape, dtype=dtype, device="meta")
        return torch.Tensor._make_subclass(Between, empty)


_OF_SHAPE = {
    *(getattr(torch.Tensor, name).__get__ for name in ("shape", "dtype", "ndim", "device")),
    *(torch.Tensor.size, torch.Tensor.dim, torch.Tensor.is_floating_point),
}


class BetweenRefused(TorchFunctionMode):
    """Raises if an operator is called on a placeholder."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(isinstance(leaf, Between) for leaf in _pytree.tree_leaves((args, kwargs))):
            if func not in _OF_SHAPE:
                refuse_between()
            with torch._C.DisableTorchFunction():
                return func(*args, **kwargs)
        return func(*args, **kwargs)


def refuse_between() -> None:
    raise ScanError(
        "the outputs of single layers are used, as for `output_hidden_states`, but scanned "
        "layers do not have them. Call the module without this option, or create the function "
        "without `scan_layers`."
    )


class LayerIndex:
    """A placeholder for the index of a layer, which is not a single number in a scan."""

    def __init__(self, name: str) -> None:
        self._name = name

    def _refuse(self, *_: Any) -> Any:
        raise ScanError(
            f"a layer uses its index, `{self._name}`, as for a cache, but scanned layers do not "
            "have one. Call the module without a cache, or create the function without "
            "`scan_layers`."
        )

    __index__ = __int__ = __float__ = __bool__ = __hash__ = __eq__ = __ne__ = _refuse
    __lt__ = __le__ = __gt__ = __ge__ = __add__ = __radd__ = __sub__ = __rsub__ = _refuse
    __mul__ = __rmul__ = __mod__ = __floordiv__ = __truediv__ = __str__ = __format__ = _refuse
