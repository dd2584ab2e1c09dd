"""Selects or mixes the adapters of a bank, for a whole call or for each row of a batch."""

import dataclasses
import numbers
from collections.abc import Hashable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from .._adapter import Adapter, Layout, static
from .._arrays import is_array, path_string
from .._compat import is_tracer
from .._contract import product_dtype
from .._errors import ArgumentError, PairError, SlotError, a_kind
from .._factored import FactoredArray
from .._pair import is_tunable_leaf
from .._terms import Label
from .._within import Within
from ._bank import AdapterBank, InterleavedBank, check_bank
from ._fit import is_free, neutral_of


def with_scales(tunable: Any, scales: Mapping[str, jax.Array]) -> Any:
    """Returns adapters of a bank with their scales, which are arrays in a bank.

        delta  =  scale · a b

    Call this inside a loss that `jax.vmap` maps over the adapters of a bank. Scales are not
    trained, so they are not in the tree that an optimizer sees.

    Args:
        tunable: the tunable tree of one adapter of a bank.
        scales: the scale of each adapter, by path.

    Returns:
        A tunable tree for `lora(fn)`. Gradients with respect to `tunable` pass through it.

    Raises:
        PairError: if `scales` has a path at which `tunable` has no adapter.
        ArgumentError: if `scales` is not a dict of numbers.

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
    given: Any = scales
    if not isinstance(given, Mapping):
        raise ArgumentError(
            f"with_scales takes the scales of a bank, a dict by path, not {a_kind(given)}."
        )
    for path, scale in given.items():
        if not isinstance(scale, numbers.Real) and not is_array(scale):
            raise ArgumentError(
                f"with_scales: the scale at `{path}` must be a number, not {a_kind(scale)}."
            )
    unknown = dict(scales)

    def scaled(path: Any, node: Any) -> Any:
        name = path_string(path)
        is_scaled = name in unknown and isinstance(node, Adapter | Within)
        return _Scaled(node, unknown.pop(name)) if is_scaled else node

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
    """An adapter times a scalar array."""

    adapter: Any
    number: Any

    def applied(
        self, base: Any, frozen: Mapping[str, Any] | None = None, source: Hashable = None
    ) -> FactoredArray:
        if jnp.ndim(self.number):
            raise ArgumentError(
                f"The scale of with_scales at `{source}` has shape {jnp.shape(self.number)}, but "
                "an adapter has a single scale. For the scales of all slots of a bank, map over "
                "`bank.tunable` and `bank.scales` together with jax.vmap."
            )
        weight = self.adapter.applied(base, frozen, source)
        # The scale follows from rank and alpha. Although it is an array here, it is not trained.
        number = jax.lax.stop_gradient(self.number)
        # One more factor without labels, which can multiply the narrow product x · a. Times `a` or
        # `b`, it would make a copy of that factor of each adapter in every step.
        return dataclasses.replace(weight, terms=tuple(t.times(number, ()) for t in weight.terms))


def select_adapters(bank: AdapterBank, index: Any) -> Any:
    """Returns the adapter in one slot of a bank, as the tunable tree of a pair.

    Under `jax.vmap` over rows, each row has its own adapter: the factors are gathered per row, and
    the base is still multiplied in one product for all rows. A model whose rows depend on each
    other, through batch norm or expert capacity, computes different results for a row alone.

    Args:
        bank: a bank of adapters of any kind, which share the frozen factors.
        index: the slot, a scalar; −1 selects the base, bit for bit. Inside `jax.jit`, where the
            value is unknown, any other invalid slot selects the base as well.

    Returns:
        A tunable tree for `lora(fn)`.

    Raises:
        SlotError: if there is no such slot.
        ArgumentError: if the index is not a scalar integer.
        PairError: if the bank has fully trained parameters, or a kind of adapter without
            `neutral` factors.

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
    index = _as_array("select_adapters", "index", index)
    if index.ndim or not jnp.issubdtype(index.dtype, jnp.integer):
        raise ArgumentError(
            f"select_adapters: the index is {index.dtype}{list(index.shape)}; it must be a scalar "
            "integer. For one index per row, map over the rows with jax.vmap."
        )
    if not is_tracer(index) and not -1 <= int(index) < bank.slots:
        raise SlotError(
            f"select_adapters: there is no slot {int(index)}; the bank has the slots 0 to "
            f"{bank.slots - 1}, and -1 is the base."
        )
    # Negative indices would count from the end, so they are moved past it: out of range.
    place = jnp.where(index < 0, bank.slots, index)

    def picked(path: Any, node: Any) -> Any:
        if node is None:
            return None
        neutral = neutral_of(node)
        if neutral is None:
            raise _refused("select_adapters", path, node, "no values that stand for the base alone")
        # Neutral factors that depend on the base are filled in by `_Selected`, which sees it.
        fills = {name: 0.0 if callable(fill) else fill for name, fill in neutral.items()}
        # [slots, *axes] -> [*axes]; out of range, the gather fills with the neutral numbers.
        row = node.with_factors(
            {
                name: factor.at[place].get(mode="fill", fill_value=fills[name])
                for name, factor in node.factors().items()
            }
        )
        return row if is_free(neutral) else _Selected(row, place < bank.slots)

    tree = jax.tree_util.tree_map_with_path(picked, bank.tunable, is_leaf=is_tunable_leaf)
    # Out of range, the factors are neutral, and the scale is 1.
    scales = {path: x.at[place].get(mode="fill", fill_value=1) for path, x in bank.scales.items()}
    return with_scales(tree, scales)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Selected(Within):
    """An adapter, or the base if `is_there` is False."""

    adapter: Any
    is_there: Any

    def applied(
        self, base: Any, frozen: Mapping[str, Any] | None = None, source: Hashable = None
    ) -> FactoredArray:
        frozen = frozen or {}
        factors = self.adapter.factors()
        for name, number in self.adapter.neutral().items():
            factor, other = factors[name], number
            if callable(number):
                other: Any = jax.lax.stop_gradient(number(frozen))
                # Without rounding, so that the result is bit-identical to the base.
                wide = product_dtype(factor.dtype, other.dtype)
                factor, other = factor.astype(wide), other.astype(wide)
            factors[name] = jnp.where(self.is_there, factor, other)
        return self.adapter.with_factors(factors).applied(base, frozen, source)


def mix_adapters(bank: AdapterBank | InterleavedBank, weights: Any) -> Any:
    """Returns a weighted sum of all adapters of a bank, as the tunable tree of a pair.

        delta  =  Σ_k weights[k] · scale_k · a_k b_k

    The input is multiplied by all adapters, so under `jax.vmap` over rows no factor is gathered:
    `mix_adapters(bank, jax.nn.one_hot(index, bank.slots))` equals `select_adapters(bank, index)`.
    It always takes more FLOPs, but moves fewer bytes if each row is one token. The weights have
    gradients, so they may be learned.

    Args:
        bank: a bank of adapters that are added to the base, which excludes DoRA, IA³ and OFT. A
            bank from `interleave_adapters` moves fewer bytes.
        weights: one weight per slot: `[slots]`. Zeros give the base, if all factors are finite.

    Returns:
        A tunable tree for `lora(fn)`.

    Raises:
        ArgumentError: if there is not a weight for each slot.
        PairError: if the bank has full parameters, or adapters that multiply the base.

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
    weights = _as_array("mix_adapters", "weights", weights)
    if weights.shape != (bank.slots,) or not jnp.issubdtype(weights.dtype, jnp.floating):
        raise ArgumentError(
            f"mix_adapters: the weights are {weights.dtype}{list(weights.shape)}; they are "
            f"floats, one for each of the {bank.slots} slots. For different weights in each row, "
            "map over the rows with jax.vmap."
        )

    def mixed(path: Any, node: Any) -> Any:
        if node is None:
            return None
        # Kinds that override `applied` multiply the base, and have no delta to sum.
        if not (isinstance(node, Adapter) and type(node).applied is Adapter.applied):
            raise _refused("mix_adapters", path, node, "no delta to weight")
        # Only plain LoRA has scales as arrays; other kinds have equal static ones.
        scale = bank.scales.get(path_string(path))
        if scale is None:
            return _Mixed(node, weights)
        scaled = weights * jax.lax.stop_gradient(scale).astype(weights.dtype)
        return _Mixed(node, scaled, isinstance(bank, InterleavedBank))

    return jax.tree_util.tree_map_with_path(mixed, bank.tunable, is_leaf=is_tunable_leaf)


def _as_array(function: str, name: str, value: Any) -> jax.Array:
    try:
        return jnp.asarray(value)
    except (TypeError, ValueError) as error:
        raise ArgumentError(f"{function}: `{name}` cannot be {value!r}: {error}") from error


def _refused(function: str, path: Any, node: Any, reason: str) -> PairError:
    contents = f"{node.kind} adapters" if isinstance(node, Adapter) else "full parameters"
    return PairError(
        f"{function}: the bank has {contents} at `{path_string(path)}`, which have {reason}. Map "
        "over `bank.tunable` with jax.vmap instead."
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Mixed(Within):
    """All adapters of a bank, each times a weight: the slot is one more label to sum over."""

    adapter: Any
    weights: Any
    is_interleaved: bool = static(False)

    def layout(self, shape: tuple[int, ...]) -> Layout:
        layout = self.adapter.layout(shape)
        slot = self._slot(layout)
        factors = {name: (slot, *labels) for name, labels in layout.factors.items()}
        if self.is_interleaved:
            # Interleaved: a [in, slots, rank], with the slots next to the rank.
            *before, rank = layout.factors["a"]
            factors["a"] = (*before, slot, rank)
        return layout._replace(factors=factors)

    def _slot(self, layout: Layout) -> Label:
        used = [*layout.out, *layout.factors.values(), *layout.frozen.values()]
        # A label that nothing in the layout uses yet.
        return Label(1 + max(label.id for labels in used for label in labels), len(self.weights))

    def applied(
        self, base: Any, frozen: Mapping[str, Any] | None = None, source: Hashable = None
    ) -> FactoredArray:
        slot = self._slot(self.adapter.layout(base.shape))
        if type(self.adapter).term is Adapter.term:
            # Σ_slot w[slot] · a[slot, in, rank] · b[slot, rank, out]: the slot is summed over like
            # the rank.
            term = self.term(base.shape, frozen or {}, source)
            weights = self.weights * self.adapter.scale
        else:
            # The term is not a plain einsum of the factors, so it is computed per slot by vmap; the
            # new leading axis of every factor is the slot.
            of_slot = lambda adapter: adapter.term(base.shape, frozen or {}, source)  # noqa: E731
            term, weights = jax.vmap(of_slot)(self.adapter), self.weights
            term = dataclasses.replace(term, labels=tuple((slot, *row) for row in term.labels))
        return FactoredArray(base, (term.times(weights, (slot,)),))
