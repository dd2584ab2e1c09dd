"""One adapter of a bank for each call, or for each row of a batch."""

import dataclasses
from collections.abc import Hashable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from .._adapter import Adapter
from .._arrays import path_string
from .._compat import is_tracer
from .._errors import PairError
from .._factored import FactoredArray
from .._pair import is_tunable_leaf
from .._within import Within
from ._bank import AdapterBank
from ._fit import is_additive


def with_scales(tunable: Any, scales: Mapping[str, jax.Array]) -> Any:
    """Adapters of a bank with their scales, which are arrays there.

        delta  =  scale · a b

    Call it inside the loss that `jax.vmap` maps over a bank's adapters: scales are not trained, so
    they are not in the tree that an optimizer sees.

    Args:
        tunable: the tunable tree of one adapter of a bank.
        scales: by path, the adapter's scale.

    Returns:
        A tunable tree for `lora(fn)`. Gradients with respect to `tunable` pass through it.

    Raises:
        PairError: where `scales` has a path at which `tunable` has no adapter.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from lorax import LoraSpec, init_lora, lora, stack_adapters, with_scales
        >>> model, params = lora(lambda params, x: x @ params["w"]), {"w": jnp.ones((5, 4))}
        >>> specs = [{"w": LoraSpec(2, alpha=4)}, {"w": LoraSpec(3, alpha=30)}]
        >>> bank = stack_adapters(
        ...     [init_lora(params, spec, jax.random.key(0)).tunable for spec in specs]
        ... )
        >>> def loss(tunable, scales, x):
        ...     return model((params, with_scales(tunable, scales)), x).sum()
        >>> grads = jax.vmap(jax.grad(loss))(bank.tunable, bank.scales, jnp.ones((2, 7, 5)))
        >>> grads["w"].b.shape
        (2, 3, 4)
    """
    unknown = dict(scales)

    def scaled(path: Any, node: Any) -> Any:
        scale = unknown.pop(path_string(path), None)
        return node if scale is None or node is None else _Scaled(node, scale)

    tree = jax.tree_util.tree_map_with_path(scaled, tunable, is_leaf=is_tunable_leaf)
    if unknown:
        raise PairError(
            f"with_scales: there is no adapter at {', '.join(f'`{path}`' for path in unknown)}. "
            "Pass `bank.tunable` and `bank.scales` of the same bank."
        )
    return tree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Scaled(Within):
    """An adapter times a number that is an array."""

    adapter: Any
    number: Any

    def applied(
        self, base: Any, held: Mapping[str, Any] | None = None, source: Hashable = None
    ) -> FactoredArray:
        weight = self.adapter.applied(base, held, source)
        number = jax.lax.stop_gradient(self.number)
        return dataclasses.replace(weight, terms=tuple(term.scale(number) for term in weight.terms))


def select_adapters(bank: AdapterBank, index: Any) -> Any:
    """The adapter in one slot of a bank, as the tunable tree of a pair.

    Under `jax.vmap` over rows each row has its own: the factors are gathered for it, and the base
    is in one product for all rows. A model whose rows mix, as with batch norm or a capacity of
    experts, computes something else for a row than for a batch.

    Args:
        bank: a bank of plain LoRA, or of other kinds whose delta is zero where their factors are.
        index: the slot, a scalar; −1 is the base, bit for bit. Inside `jax.jit`, where its value is
            unknown, any other number without a slot is the base, too.

    Returns:
        A tunable tree for `lora(fn)`.

    Raises:
        IndexError: where there is no such slot.
        TypeError: where the index is not a scalar integer.
        PairError: where the bank has what zeros do not make the base's.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from lorax import init_lora, lora, select_adapters, stack_adapters
        >>> model, params = lora(lambda params, x: x @ params["w"]), {"w": jnp.ones((5, 4))}
        >>> bank = stack_adapters(
        ...     [init_lora(params, {"w": rank}, jax.random.key(0)).tunable for rank in (2, 3)]
        ... )
        >>> def row(x, index):
        ...     return model((params, select_adapters(bank, index)), x)
        >>> jax.vmap(row)(jnp.ones((3, 5)), jnp.array([1, 0, -1])).shape
        (3, 4)
    """
    index = jnp.asarray(index)
    if index.ndim or not jnp.issubdtype(index.dtype, jnp.integer):
        raise TypeError(
            f"select_adapters: the index is {index.dtype}{list(index.shape)}; it is a scalar "
            "integer. For an index of each row, call it under jax.vmap over the rows."
        )
    if not is_tracer(index) and not -1 <= int(index) < bank.slots:
        raise IndexError(
            f"select_adapters: there is no slot {int(index)}; the bank has 0 to {bank.slots - 1}, "
            "and -1 is the base."
        )
    # What has no slot is past the end: negative indices would count from there.
    place = jnp.where(index < 0, bank.slots, index)

    def taken(path: Any, node: Any) -> Any:
        if node is not None and not is_additive(node):
            what = f"{node.kind} adapters" if isinstance(node, Adapter) else "full parameters"
            raise PairError(
                f"select_adapters: the bank has {what} at `{path_string(path)}`, and zeros in "
                "their place are not the base. Map over `bank.tunable` with jax.vmap instead."
            )
        return jax.tree.map(lambda x: x.at[place].get(mode="fill", fill_value=0), node)

    tree = jax.tree_util.tree_map_with_path(taken, bank.tunable, is_leaf=is_tunable_leaf)
    scales = {path: x.at[place].get(mode="fill", fill_value=1) for path, x in bank.scales.items()}
    return with_scales(tree, scales)
