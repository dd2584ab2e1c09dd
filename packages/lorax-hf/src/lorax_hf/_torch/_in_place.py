"""Changes in place of parts of tensors, such as `x[:, :2].zero_()`."""

from typing import Any

from torch.overrides import TorchFunctionMode


class InPlace(TorchFunctionMode):
    """Writes the result of an operator that changes a slice of a tensor into that tensor.

    torchax 0.0.13 does so for some operators. Others change a copy of the slice.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        from torchax.view import View

        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        changes = (name.endswith("_") and not name.endswith("__")) or kwargs.get("inplace")
        if not changes or not args or not isinstance(args[0], View):
            return func(*args, **kwargs)
        part, *others = args
        value = part.torch()
        func(value, *others, **kwargs)
        part.update(value)
        return part
