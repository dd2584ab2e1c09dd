"""Uses of a weight: plain, or with hand-written LoRA as a careful user would write it.

A model calls one of these methods wherever it uses a weight, with the weight's factors
`{"a": …, "b": …}`, the weight, and the input.
"""

import jax
import jax.numpy as jnp


class PlainOps:
    """Without LoRA: the factors are ignored."""

    def dense(self, _, w, x):
        return x @ w

    def dense_each(self, f, p, names, x):
        """Products of one input with several weights."""
        return [self.dense(f[name], p[name], x) for name in names]

    def transposed(self, _, w, x):
        """A kernel `[out, in]`."""
        return x @ w.T

    def to_heads(self, _, w, x):
        return jnp.einsum("...d,dhk->...hk", x, w)

    def from_heads(self, _, w, x):
        return jnp.einsum("...hk,hkd->...d", x, w)

    def conv(self, _, w, x, stride=1, groups=1):
        return jax.lax.conv_general_dilated(
            x,
            w,
            (stride, stride),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        )

    def embed(self, _, w, tokens):
        return w[tokens]

    def logits(self, _, w, x):
        """An embedding's table as the output layer."""
        return x @ w.T

    def experts(self, _, w, x):
        """One product for each expert, on its own rows."""
        return jnp.einsum("end,edf->enf", x, w)


PLAIN = PlainOps()


class LoraOps(PlainOps):
    """Adds `(x a) b` to the output of the weight."""

    def product(self, x, w):
        """A product over the last axis of x. The subclass below writes it in another form."""
        with jax.named_scope("lora"):  # for the profile
            return x @ w

    def dense(self, f, w, x):
        return PLAIN.dense(f, w, x) + self.product(self.product(x, f["a"]), f["b"])

    def transposed(self, f, w, x):
        return PLAIN.transposed(f, w, x) + self.product(self.product(x, f["a"]), f["b"])

    def to_heads(self, f, w, x):
        middle = self.product(x, f["a"])
        delta = self.product(middle, f["b"].reshape(middle.shape[-1], -1))
        y = PLAIN.to_heads(f, w, x)
        return y + delta.reshape(y.shape)

    def from_heads(self, f, w, x):
        rows = x.reshape(*x.shape[:-2], -1)
        middle = self.product(rows, f["a"].reshape(rows.shape[-1], -1))
        return PLAIN.from_heads(f, w, x) + self.product(middle, f["b"])

    def conv(self, f, w, x, stride=1, groups=1):
        """A convolution with `a`, then a product with `b`.

        All groups share `a`, and each has its part of `b`.
        """
        y = PLAIN.conv(f, w, x, stride, groups)
        if groups == 1:
            return y + self.product(PLAIN.conv(f, f["a"], x, stride), f["b"])
        rank, out = f["b"].shape
        middle = PLAIN.conv(f, jnp.tile(f["a"], groups), x, stride, groups)
        middle = middle.reshape(*middle.shape[:3], groups, rank)
        b = f["b"].reshape(rank, groups, out // groups)
        return y + jnp.einsum("nhwgr,rgo->nhwgo", middle, b).reshape(y.shape)

    def embed(self, f, w, tokens):
        return PLAIN.embed(f, w, tokens) + self.product(f["a"][tokens], f["b"])

    def logits(self, f, w, x):
        return PLAIN.logits(f, w, x) + self.product(self.product(x, f["b"].T), f["a"].T)

    def experts(self, f, w, x):
        return PLAIN.experts(f, w, x) + (x @ f["a"]) @ f["b"]


class FlatLoraOps(LoraOps):
    """The same, in forms for which XLA on CPU has a fast path.

    Every product is over [rows, width], and the groups of a convolution become examples.
    """

    def product(self, x, w):
        with jax.named_scope("lora"):
            return (x.reshape(-1, x.shape[-1]) @ w).reshape(*x.shape[:-1], w.shape[-1])

    def conv(self, f, w, x, stride=1, groups=1):
        if groups == 1:
            return super().conv(f, w, x, stride)
        y = PLAIN.conv(f, w, x, stride, groups)
        images, height, width, _ = x.shape
        x = jnp.moveaxis(x.reshape(images, height, width, groups, -1), 3, 0)
        middle = PLAIN.conv(f, f["a"], x.reshape(-1, *x.shape[2:]), stride)
        middle = middle.reshape(groups, images, *middle.shape[1:])
        b = f["b"].reshape(f["b"].shape[0], groups, -1)
        return y + jnp.einsum("gnhwr,rgo->nhwgo", middle, b).reshape(y.shape)


class FusedLoraOps(FlatLoraOps):
    """Concatenates the `a` of weights that have the same input."""

    def dense_each(self, f, p, names, x):
        middles = self.product(x, jnp.concatenate([f[name]["a"] for name in names], 1))
        middles = jnp.split(middles, len(names), -1)
        return [
            PLAIN.dense(None, p[name], x) + self.product(middle, f[name]["b"])
            for name, middle in zip(names, middles, strict=True)
        ]
