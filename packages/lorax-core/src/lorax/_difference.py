"""Converts adapters of a base that `init_lora` has changed to adapters of the original base."""

from typing import Any

import jax
import jax.numpy as jnp

from ._adapter import is_adapter
from ._arrays import path_string
from ._errors import PairError
from ._pair import is_tunable_leaf
from .kinds.lora import at_same_scale


def adapter_difference(tunable: Any, start: Any) -> Any:
    """Returns the change made by training since `start`, as plain LoRA of twice the rank.

        W₀ + s·a b  =  (W₀ + s·a₀ b₀) + s·(a b − a₀ b₀)

    With `init="pissa"` or "olora", the frozen base is `W₀`, the original weight minus the first
    factors. The difference applies to the original weight, so it can be used without `W₀`.

    Args:
        tunable: the tunable tree after training.
        start: the tunable tree that `init_lora` returned.

    Returns:
        A tree with the structure of `tunable`: LoRA of twice the rank in place of each adapter, and
        each parameter in full as it is in `tunable`.

    Raises:
        PairError: if an adapter is not plain LoRA, or the two trees differ in more than numbers.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from lorax import LoraSpec, adapter_difference, init_lora, merge_params
        >>> params = {"w": jnp.arange(12.0).reshape(4, 3)}
        >>> spec = {"w": LoraSpec(2, init="pissa")}
        >>> frozen, start = init_lora(params, spec, jax.random.key(0))
        >>> trained = jax.tree.map(lambda x: x + 1, start)
        >>> difference = adapter_difference(trained, start)
        >>> moved, original = merge_params(frozen, trained), merge_params(params, difference)
        >>> bool(jnp.allclose(moved["w"], original["w"], atol=1e-4))
        True
    """
    if jax.tree.structure(tunable) != jax.tree.structure(start):
        raise PairError(
            "adapter_difference: the two trees differ in structure, ranks or alphas; give it the "
            "trained tree and the one that `init_lora` returned."
        )

    def difference(path: Any, after: Any, before: Any) -> Any:
        if not is_adapter(after):
            return after
        if after.kind != "lora":
            raise PairError(
                f"adapter_difference: `{path_string(path)}` has a {after.kind} adapter, and only "
                "plain LoRA is a sum of products."
            )
        axis = len(after.shared_axes)
        a = jnp.concatenate([after.a, before.a], after.a.ndim - 1)  # [*shared, *in, 2·rank]
        b = jnp.concatenate([after.b, -before.b], axis)  # [*shared, 2·rank, *out]
        return at_same_scale(after, a, b)

    return jax.tree_util.tree_map_with_path(difference, tunable, start, is_leaf=is_tunable_leaf)
