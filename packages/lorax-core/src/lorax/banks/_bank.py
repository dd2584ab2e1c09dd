"""The bank itself: adapters of any ranks and scales side by side, put in and taken out by slot."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._adapter import Adapter
from .._errors import PairError
from .._pair import is_tunable_leaf
from ..algebra._matrices import flatten_adapters
from ..kinds.lora import LoraWeight
from ._fit import Records, blank_of, described, emptied, padded_to, records_of, restored


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AdapterBank:
    """Adapters of one base, stacked.

    Attributes:
        tunable: the tree of adapters. Each factor is `[slots, *factor]` and padded to one rank, and
            every scale in it is 1.
        scales: by path, the scale of each slot: `[slots]`, for plain LoRA.
        records: by path, what `unstack_adapters` restores. It stays on the host: pass `tunable` and
            `scales` to compiled functions.
    """

    tunable: Any
    scales: dict[str, jax.Array]
    records: dict[str, Records]

    @property
    def slots(self) -> int:
        """How many adapters it has room for."""
        return jax.tree.leaves(self.tunable)[0].shape[0]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class InterleavedBank:
    """A bank in the order in which a product of all adapters reads it, for `mix_adapters` alone.

    Attributes:
        tunable: the tree of adapters. `a` of plain LoRA is `[*shared, *in, slots, rank]`, and every
            other factor `[slots, *factor]`.
        scales: those of the bank.
        slots: how many adapters it has room for.
    """

    tunable: Any
    scales: dict[str, jax.Array]
    slots: int = dataclasses.field(metadata={"static": True})


def stack_adapters(
    adapters: Sequence[Any], *, slots: int | None = None, rank: int | None = None
) -> AdapterBank:
    """A bank of adapters of one base.

    Plain LoRA may have any ranks, alphas and scalings: factors are padded with zeros, which stay
    zeros in training, and scales become arrays. Other kinds are stacked where their settings are
    equal. A target that an adapter lacks has the numbers with which it is the base's, mostly zeros.

    Args:
        adapters: tunable trees of one structure.
        slots: how many the bank has room for; by default, as many as there are.
        rank: to which LoRA is padded at least, so that `set_adapter` can put a higher rank in.

    Returns:
        The bank. `jax.vmap(step)(bank.tunable, bank.scales, …)` with `with_scales` in the loss
        trains all of them at once, and `select_adapters` picks one for each row of a batch.

    Raises:
        PairError: where the trees are not adapters of one base, or cannot be stacked.
        ValueError: where there are no adapters, or more than slots.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from lorax import init_lora, stack_adapters
        >>> params = {"w": jnp.ones((5, 4))}
        >>> small, large = (init_lora(params, {"w": r}, jax.random.key(r)).tunable for r in (2, 3))
        >>> bank = stack_adapters([small, large], slots=4)
        >>> bank.tunable["w"].a.shape, bank.slots
        ((4, 5, 3), 4)
    """
    if not adapters:
        raise ValueError("stack_adapters: there are no adapters to stack.")
    slots = len(adapters) if slots is None else slots
    if slots < len(adapters):
        raise ValueError(f"stack_adapters: {len(adapters)} adapters do not fit {slots} slots.")
    flat = [flatten_adapters(tree) for tree in adapters]
    leaves, structure = flat[0]
    for k, (_, other) in enumerate(flat):
        if other != structure:
            raise PairError(
                f"stack_adapters: adapter {k} has another structure than adapter 0: {other}, and "
                f"not {structure}. All belong to one base."
            )
    stacked, scales, records = [], {}, {}
    for path, *nodes in zip(
        [path for path, _ in leaves], *([node for _, node in each] for each, _ in flat), strict=True
    ):
        # Free slots are zeros, which are the base.
        nodes += [None] * (slots - len(nodes))
        blank = blank_of(path, nodes, rank)
        stacked.append(
            None if blank is None else _stacked([padded_to(path, blank, n) for n in nodes])
        )
        if isinstance(blank, Adapter):
            records[path] = records_of(nodes)
        if isinstance(blank, LoraWeight):
            scales[path] = jnp.asarray(records[path].scale())
    if all(node is None for node in stacked):
        raise ValueError("stack_adapters: the trees have no adapters.")
    return AdapterBank(jax.tree.unflatten(structure, stacked), scales, records)


def unstack_adapters(bank: AdapterBank) -> list[Any]:
    """The tunable trees of a bank, bit for bit as they were stacked or trained since.

    Args:
        bank: a bank.

    Returns:
        A tree for each slot, None for an empty one.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from lorax import init_lora, stack_adapters, unstack_adapters
        >>> params = {"w": jnp.ones((5, 4))}
        >>> small, large = (init_lora(params, {"w": r}, jax.random.key(r)).tunable for r in (2, 3))
        >>> back, _ = unstack_adapters(stack_adapters([small, large]))
        >>> back["w"].rank, bool((back["w"].a == small["w"].a).all())
        (2, True)
    """
    check_bank("unstack_adapters", bank)
    leaves, structure = flatten_adapters(bank.tunable)

    def tree(slot: int) -> Any:
        restored_leaves = [restored(bank.records.get(path), node, slot) for path, node in leaves]
        return jax.tree.unflatten(structure, restored_leaves)

    # A parameter in place of an adapter is in every slot, so no slot is free.
    is_full = any(node is not None and not isinstance(node, Adapter) for _, node in leaves)
    present = [record.is_present for record in bank.records.values()]
    return [
        tree(slot) if is_full or any(is_present[slot] for is_present in present) else None
        for slot in range(bank.slots)
    ]


def set_adapter(bank: AdapterBank, index: int, tunable: Any) -> AdapterBank:
    """The bank with another adapter in a slot. Every shape stays, so nothing compiles again.

    Args:
        bank: a bank.
        index: the slot, from 0.
        tunable: a tunable tree of the same base, of ranks up to the bank's.

    Returns:
        The new bank; the old one is unchanged.

    Raises:
        IndexError: where there is no such slot.
        PairError: where the tree is of another base, adapts what the bank does not, or has a higher
            rank or another dtype.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from lorax import init_lora, set_adapter, stack_adapters, unstack_adapters
        >>> params = {"w": jnp.ones((5, 4))}
        >>> one, two = (init_lora(params, {"w": 2}, jax.random.key(k)).tunable for k in range(2))
        >>> bank = set_adapter(stack_adapters([one], slots=2), 1, two)
        >>> bool((unstack_adapters(bank)[1]["w"].a == two["w"].a).all())
        True
    """
    _check_slot("set_adapter", bank, index)
    leaves, structure = flatten_adapters(bank.tunable)
    news, other = flatten_adapters(tunable)
    if other != structure:
        raise PairError(
            f"set_adapter: the tree has the structure {other}, and the bank {structure}; both "
            "belong to one base."
        )
    rows, scales, records = [], dict(bank.scales), dict(bank.records)
    for (path, node), (_, new) in zip(leaves, news, strict=True):
        if node is None and new is not None:
            raise PairError(
                f"set_adapter: the adapter has a {described(new)} at `{path}`, and the bank has "
                "nothing there. Stack the bank again, with this adapter among the others."
            )
        rows.append(None if node is None else padded_to(path, emptied(node), new))
        if path in records:
            # The records of the old bank stay as they are.
            record = jax.tree.map(np.copy, records[path])
            for value, entry in zip(
                jax.tree.leaves(record), jax.tree.leaves(records_of([new])), strict=True
            ):
                value[index] = entry[0]
            records[path] = record
        if path in scales:
            scales[path] = jnp.asarray(records[path].scale())
    row = jax.tree.unflatten(structure, rows)
    # The index is traced, so one compiled program serves all slots.
    return AdapterBank(_replaced(bank.tunable, np.int32(index), row), scales, records)


def drop_adapter(bank: AdapterBank, index: int) -> AdapterBank:
    """The bank with the base in a slot. Every shape stays.

    Args:
        bank: a bank of kinds that are the base beside any base with the same numbers, mostly zeros:
            all but DoRA and trained tokens.
        index: the slot, from 0.

    Returns:
        The new bank; the old one is unchanged.

    Raises:
        IndexError: where there is no such slot.
        PairError: where the base's own numbers would have to be in the slot.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from lorax import drop_adapter, init_lora, stack_adapters, unstack_adapters
        >>> params = {"w": jnp.ones((5, 4))}
        >>> one, two = (init_lora(params, {"w": 2}, jax.random.key(k)).tunable for k in range(2))
        >>> unstack_adapters(drop_adapter(stack_adapters([one, two]), 0))[0] is None
        True
    """
    _check_slot("drop_adapter", bank, index)
    nothing = jax.tree.map(lambda node: None, bank.tunable, is_leaf=is_tunable_leaf)
    return set_adapter(bank, index, nothing)


def interleave_adapters(bank: AdapterBank) -> InterleavedBank:
    """A copy of a bank whose adapters are side by side, for decoding with `mix_adapters`.

        a: [slots, in, rank]  ->  [in, slots, rank]

    A product of all adapters has both `slots` and `rank` as outputs. Without this copy, every call
    makes one of `a`. Make it once, outside of the compiled function, and again after `set_adapter`:
    no shape changes, so nothing compiles again. Kinds other than plain LoRA stay as they are.

    Args:
        bank: a bank.

    Returns:
        What `mix_adapters` takes in place of the bank.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from lorax import init_lora, interleave_adapters, stack_adapters
        >>> params = {"w": jnp.ones((5, 4))}
        >>> one, two = (init_lora(params, {"w": 2}, jax.random.key(k)).tunable for k in range(2))
        >>> interleave_adapters(stack_adapters([one, two])).tunable["w"].a.shape
        (5, 2, 2)
    """
    check_bank("interleave_adapters", bank)

    def interleaved(node: Any) -> Any:
        if not isinstance(node, LoraWeight):
            return node
        return dataclasses.replace(node, a=jnp.moveaxis(node.a, 0, -2))

    tree = jax.tree.map(interleaved, bank.tunable, is_leaf=is_tunable_leaf)
    return InterleavedBank(tree, bank.scales, bank.slots)


def check_bank(function: str, bank: Any, *others: type) -> None:
    """Refuses what is not a bank, or not in an order that the function takes."""
    if not isinstance(bank, (AdapterBank, *others)):
        raise TypeError(
            f"{function} takes a bank, as `stack_adapters` returns it, and was given "
            f"{type(bank).__name__}."
        )


def _check_slot(function: str, bank: AdapterBank, index: Any) -> None:
    check_bank(function, bank)
    if not isinstance(index, int | np.integer) or not 0 <= index < bank.slots:
        raise IndexError(
            f"{function}: there is no slot {index!r}; the bank has 0 to {bank.slots - 1}."
        )


@jax.jit
def _stacked(nodes: Sequence[Any]) -> Any:
    # slots × [*axes] -> [slots, *axes]
    return jax.tree.map(lambda *arrays: jnp.stack(arrays), *nodes)


@jax.jit
def _replaced(stacked: Any, index: Any, row: Any) -> Any:
    # [slots, *axes] with [*axes] at one slot
    return jax.tree.map(lambda array, new: array.at[index].set(new), stacked, row)
