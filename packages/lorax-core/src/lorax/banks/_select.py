"""Adapters of a bank for a call, or for each row of a batch: one of them, or a mixture of all."""

import dataclasses
from collections.abc import Hashable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from .._adapter import Adapter, Layout
from .._arrays import path_string
from .._compat import is_tracer
from .._errors import PairError
from .._factored import FactoredArray
from .._pair import is_tunable_leaf
from .._terms import Label
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
        # The scale follows from rank and alpha. It is an array here, and not to be trained.
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
    _check_additive("select_adapters", bank)
    # What has no slot is past the end: negative indices would count from there.
    place = jnp.where(index < 0, bank.slots, index)
    # [slots, *axes] -> [*axes], zeros past the end: Δ = 0, the base.
    tree = jax.tree.map(lambda x: x.at[place].get(mode="fill", fill_value=0), bank.tunable)
    scales = {path: x.at[place].get(mode="fill", fill_value=1) for path, x in bank.scales.items()}
    return with_scales(tree, scales)


def mix_adapters(bank: AdapterBank, weights: Any) -> Any:
    """A weighted sum of all adapters of a bank, as the tunable tree of a pair.

        delta  =  Σ_k weights[k] · scale_k · a_k b_k

    All adapters meet the input, so under `jax.vmap` over rows no factor is gathered:
    `mix_adapters(bank, jax.nn.one_hot(index, bank.slots))` equals `select_adapters(bank, index)`,
    moves fewer bytes where each row is one token, and takes more FLOPs everywhere. The weights
    may be learned: they have gradients.

    Args:
        bank: a bank of plain LoRA, or of other kinds whose delta is zero where their factors are.
        weights: of each slot: `[slots]`. Zeros are the base, as long as all factors are finite.

    Returns:
        A tunable tree for `lora(fn)`.

    Raises:
        ValueError: where there is not a weight for each slot.
        PairError: where the bank has what zeros do not make the base's.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from lorax import init_lora, lora, mix_adapters, stack_adapters
        >>> model, params = lora(lambda params, x: x @ params["w"]), {"w": jnp.ones((5, 4))}
        >>> bank = stack_adapters(
        ...     [init_lora(params, {"w": rank}, jax.random.key(0)).tunable for rank in (2, 3)]
        ... )
        >>> model((params, mix_adapters(bank, jnp.array([0.3, 0.7]))), jnp.ones((3, 5))).shape
        (3, 4)
    """
    weights = jnp.asarray(weights)
    if weights.shape != (bank.slots,) or not jnp.issubdtype(weights.dtype, jnp.floating):
        raise ValueError(
            f"mix_adapters: the weights are {weights.dtype}{list(weights.shape)}; they are floats, "
            f"one for each of the {bank.slots} slots. For weights of each row, call it under "
            "jax.vmap over the rows."
        )
    _check_additive("mix_adapters", bank)

    def mixed(path: Any, node: Any) -> Any:
        if node is None:
            return None
        scale = bank.scales.get(path_string(path))
        if scale is None:
            return _Mixed(node, weights)
        return _Mixed(node, weights * jax.lax.stop_gradient(scale).astype(weights.dtype))

    return jax.tree_util.tree_map_with_path(mixed, bank.tunable, is_leaf=is_tunable_leaf)


def _check_additive(function: str, bank: AdapterBank) -> None:
    leaves, _ = jax.tree_util.tree_flatten_with_path(bank.tunable, is_leaf=is_tunable_leaf)
    for path, node in leaves:
        if node is not None and not is_additive(node):
            contents = f"{node.kind} adapters" if isinstance(node, Adapter) else "full parameters"
            raise PairError(
                f"{function}: the bank has {contents} at `{path_string(path)}`, and zeros in their "
                "place are not the base. Map over `bank.tunable` with jax.vmap instead."
            )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Mixed(Within):
    """All adapters of a bank, each times a weight: one more label that is summed over."""

    adapter: Any
    weights: Any

    def layout(self, shape: tuple[int, ...]) -> Layout:
        layout = self.adapter.layout(shape)
        slot = self._slot(layout)
        return layout._replace(
            factors={name: (slot, *labels) for name, labels in layout.factors.items()}
        )

    def _slot(self, layout: Layout) -> Label:
        used = [*layout.out, *layout.factors.values(), *layout.held.values()]
        # A label that nothing in the layout uses yet.
        return Label(1 + max(label.id for labels in used for label in labels), len(self.weights))

    def applied(
        self, base: Any, held: Mapping[str, Any] | None = None, source: Hashable = None
    ) -> FactoredArray:
        term = self.term(base.shape, held or {}, source)
        slot = self._slot(self.adapter.layout(base.shape))
        # Σ_slot w[slot] · a[slot, in, rank] · b[slot, rank, out]: the slot is summed as the rank
        # is.
        weights = self.weights * self.adapter.scale
        term = dataclasses.replace(
            term, factors=(weights, *term.factors), labels=((slot,), *term.labels)
        )
        return FactoredArray(base, (term,))
