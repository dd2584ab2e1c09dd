"""Adapters of a bank for a call, or for each row of a batch: one of them, or a mixture of all."""

import dataclasses
from collections.abc import Hashable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from .._adapter import Adapter, Layout, static
from .._arrays import path_string
from .._compat import is_tracer
from .._contract import product_dtype
from .._errors import PairError
from .._factored import FactoredArray
from .._pair import is_tunable_leaf
from .._terms import Label
from .._within import Within
from ._bank import AdapterBank, InterleavedBank, check_bank
from ._fit import is_free, neutral_of


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
        bank: a bank of adapters of any kind; the frozen factors beside the base are those of all.
        index: the slot, a scalar; −1 is the base, bit for bit. Inside `jax.jit`, where its value is
            unknown, any other number without a slot is the base, too.

    Returns:
        A tunable tree for `lora(fn)`.

    Raises:
        IndexError: where there is no such slot.
        TypeError: where the index is not a scalar integer.
        PairError: where the bank has full parameters, or a kind that does not say with which
            factors it is the base.

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
    check_bank("select_adapters", bank)
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

    def picked(path: Any, node: Any) -> Any:
        if node is None:
            return None
        neutral = neutral_of(node)
        if neutral is None:
            raise _refused("select_adapters", path, node, "numbers of its own with no adapter")
        fills = {name: 0.0 if callable(fill) else fill for name, fill in neutral.items()}
        # [slots, *axes] -> [*axes], and past the end the numbers of the base.
        row = node.with_factors(
            {
                name: factor.at[place].get(mode="fill", fill_value=fills[name])
                for name, factor in node.factors().items()
            }
        )
        return row if is_free(neutral) else _Selected(row, place < bank.slots)

    tree = jax.tree_util.tree_map_with_path(picked, bank.tunable, is_leaf=is_tunable_leaf)
    scales = {path: x.at[place].get(mode="fill", fill_value=1) for path, x in bank.scales.items()}
    return with_scales(tree, scales)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Selected(Within):
    """An adapter, or the base where there is none."""

    adapter: Any
    is_there: Any

    def applied(
        self, base: Any, held: Mapping[str, Any] | None = None, source: Hashable = None
    ) -> FactoredArray:
        held = held or {}
        factors = self.adapter.factors()
        for name, number in self.adapter.neutral().items():
            factor, other = factors[name], number
            if callable(number):
                other: Any = jax.lax.stop_gradient(number(held))
                # Exact, so that it is the base to the last bit.
                wide = product_dtype(factor.dtype, other.dtype)
                factor, other = factor.astype(wide), other.astype(wide)
            factors[name] = jnp.where(self.is_there, factor, other)
        return self.adapter.with_factors(factors).applied(base, held, source)


def mix_adapters(bank: AdapterBank | InterleavedBank, weights: Any) -> Any:
    """A weighted sum of all adapters of a bank, as the tunable tree of a pair.

        delta  =  Σ_k weights[k] · scale_k · a_k b_k

    All adapters meet the input, so under `jax.vmap` over rows no factor is gathered:
    `mix_adapters(bank, jax.nn.one_hot(index, bank.slots))` equals `select_adapters(bank, index)`,
    moves fewer bytes where each row is one token, and takes more FLOPs everywhere. The weights
    may be learned: they have gradients.

    Args:
        bank: a bank of adapters that add to the base: of other kinds than DoRA, IA³ and OFT. From
            `interleave_adapters` it moves fewer bytes.
        weights: of each slot: `[slots]`. Zeros are the base, as long as all factors are finite.

    Returns:
        A tunable tree for `lora(fn)`.

    Raises:
        ValueError: where there is not a weight for each slot.
        PairError: where the bank has full parameters, or adapters that multiply the base.

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
    check_bank("mix_adapters", bank, InterleavedBank)
    weights = jnp.asarray(weights)
    if weights.shape != (bank.slots,) or not jnp.issubdtype(weights.dtype, jnp.floating):
        raise ValueError(
            f"mix_adapters: the weights are {weights.dtype}{list(weights.shape)}; they are floats, "
            f"one for each of the {bank.slots} slots. For weights of each row, call it under "
            "jax.vmap over the rows."
        )

    def mixed(path: Any, node: Any) -> Any:
        if node is None:
            return None
        if not (isinstance(node, Adapter) and type(node).applied is Adapter.applied):
            raise _refused("mix_adapters", path, node, "no delta that a sum could weigh")
        scale = bank.scales.get(path_string(path))
        if scale is None:
            return _Mixed(node, weights)
        scaled = weights * jax.lax.stop_gradient(scale).astype(weights.dtype)
        return _Mixed(node, scaled, isinstance(bank, InterleavedBank))

    return jax.tree_util.tree_map_with_path(mixed, bank.tunable, is_leaf=is_tunable_leaf)


def _refused(function: str, path: Any, node: Any, reason: str) -> PairError:
    contents = f"{node.kind} adapters" if isinstance(node, Adapter) else "full parameters"
    return PairError(
        f"{function}: the bank has {contents} at `{path_string(path)}`, which have {reason}. Map "
        "over `bank.tunable` with jax.vmap instead."
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Mixed(Within):
    """All adapters of a bank, each times a weight: one more label that is summed over."""

    adapter: Any
    weights: Any
    is_interleaved: bool = static(False)

    def layout(self, shape: tuple[int, ...]) -> Layout:
        layout = self.adapter.layout(shape)
        slot = self._slot(layout)
        factors = {name: (slot, *labels) for name, labels in layout.factors.items()}
        if self.is_interleaved:
            *before, rank = layout.factors["a"]
            factors["a"] = (*before, slot, rank)
        return layout._replace(factors=factors)

    def _slot(self, layout: Layout) -> Label:
        used = [*layout.out, *layout.factors.values(), *layout.held.values()]
        # A label that nothing in the layout uses yet.
        return Label(1 + max(label.id for labels in used for label in labels), len(self.weights))

    def applied(
        self, base: Any, held: Mapping[str, Any] | None = None, source: Hashable = None
    ) -> FactoredArray:
        slot = self._slot(self.adapter.layout(base.shape))
        if type(self.adapter).term is Adapter.term:
            # Σ_slot w[slot] · a[slot, in, rank] · b[slot, rank, out]: the slot is summed as the
            # rank is.
            term = self.term(base.shape, held or {}, source)
            weights = self.weights * self.adapter.scale
        else:
            # More than an einsum of its factors: the term of each slot, then one of all of them.
            of_slot = lambda adapter: adapter.term(base.shape, held or {}, source)  # noqa: E731
            term, weights = jax.vmap(of_slot)(self.adapter), self.weights
            term = dataclasses.replace(term, labels=tuple((slot, *row) for row in term.labels))
        term = dataclasses.replace(
            term, factors=(weights, *term.factors), labels=((slot,), *term.labels)
        )
        return FactoredArray(base, (term,))
