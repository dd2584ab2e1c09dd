"""A product with a quantized weight, as an expert would write QLoRA."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

import lorax
from layer_ops import FlatLoraOps
from lorax.bases import Format


def product(format: Format) -> Callable[[jax.Array, Mapping[str, jax.Array]], jax.Array]:
    """`product(x, arrays)` on the arrays of a weight. Its backward pass decodes them again."""

    def decoded(arrays, dtype):
        """From codes [blocks, block, out], scales [blocks, out], outer [out]; or without blocks."""
        codes = arrays["codes"]
        wide = {"codes": codes}
        for name in arrays.keys() - {"codes"}:
            *sizes, out = arrays[name].shape
            sizes += [1] * (codes.ndim - 1 - len(sizes))
            wide[name] = arrays[name].reshape(*sizes, out)
        return format.decode(wide).astype(dtype).reshape(-1, codes.shape[-1])

    @jax.custom_vjp
    def product(x, arrays):
        return x @ decoded(arrays, x.dtype)

    def forward(x, arrays):
        return product(x, arrays), arrays

    def backward(arrays, cotangent):
        none = jax.tree.map(lambda x: jnp.zeros(x.shape, _tangent(x.dtype)), arrays)
        return cotangent @ decoded(arrays, cotangent.dtype).T, none

    product.defvjp(forward, backward)
    return product


def _tangent(dtype: Any) -> Any:
    return dtype if jnp.issubdtype(dtype, jnp.inexact) else jax.dtypes.float0


class QuantizedLoraOps(FlatLoraOps):
    """Hand-written LoRA on quantized weights, in the forms for which XLA on CPU has a fast path."""

    def __init__(self, format: Format) -> None:
        self._coded = product(format)

    def dense(self, f, w, x):
        if not isinstance(w, lorax.QuantizedWeight):
            return super().dense(f, w, x)
        return self._coded(x, w.arrays) + self.product(self.product(x, f["a"]), f["b"])
