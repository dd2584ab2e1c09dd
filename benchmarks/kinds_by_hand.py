"""Kinds of adapters written into the model, as a careful user would."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from ways import Flat, Plain


class LoraByHand(Flat):
    """`x W + (x a) b`, also with a frozen `a`."""


class IA3ByHand(Plain):
    """`(x W) · gain`."""

    def dense(self, f, w, x):
        return super().dense(None, w, x) * f["gain"]


class DoraByHand(Flat):
    """`(x W + (x a) b) · magnitude / ‖W + a b‖`, where `square` is `‖W‖²` and the norm detached."""

    def dense(self, f, w, x):
        a, b = f["a"], f["b"]
        # ‖W + a b‖² = ‖W‖² + Σ_r b[r, out] (2 aᵀ W + aᵀ a b)[r, out]
        square = f["square"] + jnp.sum(b * (2 * (a.T @ w) + (a.T @ a) @ b), 0)
        gain = f["magnitude"] / jnp.sqrt(jax.lax.stop_gradient(square))
        return super().dense(f, w, x) * gain


# By the names of the rows of the table.
WRITTEN: Mapping[str, Plain] = {
    "LoRA": LoraByHand(),
    "DoRA": DoraByHand(),
    "IA³": IA3ByHand(),
    "LoRA-FA": LoraByHand(),
}
