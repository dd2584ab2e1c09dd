"""Layer operations with hand-written kinds of adapters, as a careful user would write them."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from layer_ops import FlatLoraOps, PlainOps


class IA3Ops(PlainOps):
    """`(x W) · gain`."""

    def dense(self, f, w, x):
        return super().dense(None, w, x) * f["gain"]


class DoraOps(FlatLoraOps):
    """`(x W + (x a) b) · magnitude / ‖W + a b‖`, with `square = ‖W‖²` and a detached norm."""

    def dense(self, f, w, x):
        a, b = f["a"], f["b"]
        # ‖W + a b‖² = ‖W‖² + Σ_r b[r, out] (2 aᵀ W + aᵀ a b)[r, out]
        square = f["square"] + jnp.sum(b * (2 * (a.T @ w) + (a.T @ a) @ b), 0)
        gain = f["magnitude"] / jnp.sqrt(jax.lax.stop_gradient(square))
        return super().dense(f, w, x) * gain


# By the name of the row in the table. LoRA-FA has the operations of LoRA: its `a` is frozen.
OPS: Mapping[str, PlainOps] = {
    "LoRA": FlatLoraOps(),
    "DoRA": DoraOps(),
    "IA³": IA3Ops(),
    "LoRA-FA": FlatLoraOps(),
}
