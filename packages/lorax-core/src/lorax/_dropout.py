"""Dropout on the input of adapters, with PRNG keys in the adapter; the model needs no changes."""

import dataclasses
import math
import numbers
import zlib
from collections.abc import Hashable, Mapping
from typing import Any

import jax

from ._adapter import Adapter, Labeled, static
from ._arrays import checked_key, path_string
from ._errors import ArgumentError, PairError
from ._factored import FactoredArray, Keys
from ._pair import has_adapters, is_tunable_leaf
from ._terms import Term
from ._within import Within


def with_dropout(tunable: Any, key: jax.Array, rate: float) -> Any:
    """Returns adapters that drop entries of their input, each with keys of its own.

        x @ W  +  scale · (drop(x) @ a) @ b,    drop(x) = mask ⊙ x / (1 − rate)

    The base sees all of `x`. Keys are data, so call this inside the loss with a new key in each
    step, and not at all for evaluation. Every entry of the shared axes has a mask of its own, such
    as each layer of a `scan`, and so does every use of a weight. Under `jax.checkpoint`, the same
    mask is recomputed. Nothing is dropped if there is no delta or no input: for IA³, for looked
    up rows, and for fully trained parameters.

    With DoRA, the norm is that of the whole weight, and the input of the base is not dropped.

    Args:
        tunable: the tunable tree of a pair.
        key: a PRNG key, new style or old.
        rate: the fraction of entries that is dropped, at least 0 and below 1.

    Returns:
        A tunable tree for the same `lora(fn)`. Gradients with respect to `tunable` pass through it.

    Raises:
        ArgumentError: if the rate is not in [0, 1).
        PairError: if the tree has no adapter, or dropout already.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from lorax import init_lora, lora, with_dropout
        >>> model = lora(lambda params, x: x @ params["w"])
        >>> params, key = {"w": jnp.ones((3, 2))}, jax.random.key(0)
        >>> frozen, tunable = init_lora(params, {"w": 1}, key)
        >>> def loss(tunable, x, key):
        ...     return model((frozen, with_dropout(tunable, key, 0.05)), x).sum()
        >>> jax.grad(loss)(tunable, jnp.ones((4, 3)), key)["w"].a.shape
        (3, 1)
    """
    if isinstance(rate, bool) or not isinstance(rate, numbers.Real) or not 0 <= rate < 1:
        raise ArgumentError(
            f"with_dropout: the rate is {rate!r}; it must be at least 0 and below 1."
        )
    if rate == 0:
        return tunable
    if not has_adapters(tunable):
        raise PairError(
            "with_dropout: the tree has no adapter, so there is nothing to drop. Pass the tunable "
            "tree of a pair."
        )
    key = checked_key(key, "with_dropout")

    def dropped(path: Any, node: Any) -> Any:
        if not isinstance(node, Adapter):
            return node
        if isinstance(node, _Dropped):
            raise PairError(
                f"with_dropout: the adapter at `{path_string(path)}` has dropout already."
            )
        # Folded from the path, so that adding a layer changes no other layer's mask.
        own = jax.random.fold_in(key, zlib.crc32(path_string(path).encode()))
        return _Dropped(node, own, float(rate))

    return jax.tree_util.tree_map_with_path(dropped, tunable, is_leaf=is_tunable_leaf)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Dropped(Within):
    """An adapter with dropout on its input."""

    adapter: Any
    key: Any
    rate: float = static()

    def applied(
        self, base: Any, frozen: Mapping[str, Any] | None = None, source: Hashable = None
    ) -> FactoredArray:
        weight = self.adapter.applied(base, frozen, source)
        axes = Labeled.of(self.axes, base.shape)
        sizes = [label.size for label in axes.shared]
        # One key for each entry of the shared axes.
        keys = jax.random.split(self.key, math.prod(sizes))
        data = jax.random.key_data(keys).reshape(*sizes, -1)  # [*shared, words]
        labels = (*axes.shared, axes.inner(0, data.shape[-1]))
        term = Term((data,), (labels,), axes.out, () if source is None else (source,))
        impl = str(jax.random.key_impl(self.key))
        return dataclasses.replace(weight, keys=Keys(term, self.rate, impl))
