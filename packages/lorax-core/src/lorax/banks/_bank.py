"""Banks: adapters of any ranks and scales side by side, which are added and removed by slot."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._adapter import Adapter
from .._errors import ArgumentError, PairError, SlotError, a_kind
from .._pair import Pair, is_tunable_leaf
from .._statics import plain_number
from ..algebra._matrices import flatten_adapters
from ..kinds.lora import LoraWeight
from ._fit import Records, blank_of, described, emptied, padded_to, records_of, restored


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AdapterBank:
    """Adapters of one base, stacked.

    Attributes:
        tunable: the tree of adapters. Each factor is `[slots, *factor]`, padded to a common rank,
            and every scale in it is 1.
        scales: the scale of each slot by path, `[slots]`, for plain LoRA.
        records: the original ranks and scales by path, which `unstack_adapters` restores. They stay
            on the host: pass only `tunable` and `scales` to compiled functions.
    """

    tunable: Any
    scales: dict[str, jax.Array]
    records: dict[str, Records]

    @property
    def slots(self) -> int:
        """The number of slots."""
        return jax.tree.leaves(self.tunable)[0].shape[0]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class InterleavedBank:
    """A bank in the memory order of a product with all adapters, for `mix_adapters` only.

    Attributes:
        tunable: the tree of adapters. `a` of plain LoRA is `[*shared, *in, slots, rank]`, and every
            other factor `[slots, *factor]`.
        scales: the scales of the bank.
        slots: the number of slots.
    """

    tunable: Any
    scales: dict[str, jax.Array]
    slots: int = dataclasses.field(metadata={"static": True})


def stack_adapters(
    adapters: Sequence[Any], *, slots: int | None = None, rank: int | None = None
) -> AdapterBank:
    """Stacks adapters of one base into a bank.

    Plain LoRA may have any ranks, alphas and scalings: factors are padded with zeros, which remain
    zero in training, and scales become arrays. Other kinds need equal settings. If an adapter lacks
    a target, its slot there is filled with neutral factors, mostly zeros.

    Args:
        adapters: tunable trees of one structure.
        slots: the number of slots; by default, one per adapter.
        rank: the lowest rank to pad LoRA to, to leave room for higher ranks in `set_adapter`.

    Returns:
        The bank. `jax.vmap(step)(bank.tunable, bank.scales, …)` with `with_scales` in the loss
        trains all of them at once, and `select_adapters` picks one for each row of a batch.

    Raises:
        PairError: if the trees are not adapters of one base, or cannot be stacked.
        ArgumentError: if there are no adapters, or more than slots; if an argument has a
            wrong type.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from lorax import init_lora, stack_adapters
        >>> params = {"w": jnp.ones((5, 4))}
        >>> small, large = (init_lora(params, {"w": r}, jax.random.key(r)).tunable for r in (2, 3))
        >>> bank = stack_adapters([small, large], slots=4)
        >>> bank.tunable["w"].a.shape, bank.slots
        ((4, 5, 3), 4)
    """
    given: Any = adapters
    if isinstance(given, Mapping | str | Pair) or not isinstance(given, Iterable):
        kind = a_kind(given)
        raise ArgumentError(f"stack_adapters takes a sequence of tunable trees, not {kind}.")
    adapters = list(adapters)
    if not adapters:
        raise ArgumentError("stack_adapters: there are no adapters to stack.")
    slots, rank = plain_number(slots), plain_number(rank)
    for name, value in (("slots", slots), ("rank", rank)):
        if value is not None and (type(value) is not int or value < 1):
            raise ArgumentError(
                f"stack_adapters: {name}={value!r}; it must be a positive int, or None."
            )
    slots = len(adapters) if slots is None else slots
    if slots < len(adapters):
        raise ArgumentError(
            f"stack_adapters: {len(adapters)} adapters do not fit into {slots} slots."
        )
    flat = [flatten_adapters(tree) for tree in adapters]
    leaves, structure = flat[0]
    for k, (_, other) in enumerate(flat):
        if other != structure:
            raise PairError(
                f"stack_adapters: adapter {k} has the structure {other}, but adapter 0 has "
                f"{structure}. All must be for the same base."
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
        # Scales of other kinds are static and equal.
        if isinstance(blank, LoraWeight):
            scales[path] = jnp.asarray(records[path].scale())
    if all(node is None for node in stacked):
        raise ArgumentError("stack_adapters: the trees have no adapters.")
    return AdapterBank(jax.tree.unflatten(structure, stacked), scales, records)


def unstack_adapters(bank: AdapterBank) -> list[Any]:
    """Returns the tunable trees of a bank, bit-identical to what was stacked or trained since.

    Args:
        bank: a bank.

    Returns:
        A tree for each slot, or None for an empty slot.

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

    # A fully trained parameter is present in every slot, so no slot is empty.
    is_full = any(node is not None and not isinstance(node, Adapter) for _, node in leaves)
    present = [record.is_present for record in bank.records.values()]
    return [
        tree(slot) if is_full or any(is_present[slot] for is_present in present) else None
        for slot in range(bank.slots)
    ]


def set_adapter(bank: AdapterBank, index: int, tunable: Any) -> AdapterBank:
    """Returns the bank with another adapter in a slot. No shape changes, so nothing recompiles.

    Args:
        bank: a bank.
        index: the slot, from 0.
        tunable: a tunable tree of the same base, with ranks up to those of the bank.

    Returns:
        The new bank; the old one is unchanged.

    Raises:
        SlotError: if there is no such slot.
        PairError: if the tree belongs to another base, adapts a target that the bank does not,
            or has a higher rank or another dtype.

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
            f"set_adapter: the tree has the structure {other}, but the bank has {structure}; both "
            "must be for the same base."
        )
    rows, scales, records = [], dict(bank.scales), dict(bank.records)
    for (path, node), (_, new) in zip(leaves, news, strict=True):
        if node is None and new is not None:
            raise PairError(
                f"set_adapter: the adapter has a {described(new)} at `{path}`, but the bank has "
                "none there. Stack the bank again, including this adapter."
            )
        # Padded like the others, so that shapes stay the same.
        rows.append(None if node is None else padded_to(path, emptied(node), new))
        if path in records:
            # A copy: the records of the old bank must not change.
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
    """Returns the bank with the base in a slot. No shape changes.

    Args:
        bank: a bank of kinds whose neutral factors do not depend on the base: all but DoRA and
            trainable tokens.
        index: the slot, from 0.

    Returns:
        The new bank; the old one is unchanged.

    Raises:
        SlotError: if there is no such slot.
        PairError: if the neutral factors depend on the base.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from lorax import drop_adapter, init_lora, stack_adapters, unstack_adapters
        >>> params = {"w": jnp.ones((5, 4))}
        >>> one, two = (init_lora(params, {"w": 2}, jax.random.key(k)).tunable for k in range(2))
        >>> unstack_adapters(drop_adapter(stack_adapters([one, two]), 0))[0] is None
        True
    """
    _check_slot("drop_adapter", bank, index)
    # An adapter without any target: every slot entry becomes neutral.
    nothing = jax.tree.map(lambda node: None, bank.tunable, is_leaf=is_tunable_leaf)
    return set_adapter(bank, index, nothing)


def interleave_adapters(bank: AdapterBank) -> InterleavedBank:
    """Returns a copy of a bank with interleaved adapters, for decoding with `mix_adapters`.

        a: [slots, in, rank]  ->  [in, slots, rank]

    A product with all adapters has both `slots` and `rank` as outputs, so without this copy, every
    call transposes `a`. Make the copy once, outside of the compiled function, and again after
    `set_adapter`; no shape changes, so nothing recompiles. Kinds other than plain LoRA are
    unchanged.

    Args:
        bank: a bank.

    Returns:
        A bank for `mix_adapters`.

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
    """Raises `ArgumentError` for anything but a bank of a type that the function accepts."""
    if not isinstance(bank, (AdapterBank, *others)):
        raise ArgumentError(
            f"{function} takes a bank, as `stack_adapters` returns it, but got "
            f"{type(bank).__name__}."
        )


def _check_slot(function: str, bank: AdapterBank, index: Any) -> None:
    check_bank(function, bank)
    is_position = isinstance(index, int | np.integer) and not isinstance(index, bool)
    if not is_position or not 0 <= index < bank.slots:
        raise SlotError(
            f"{function}: there is no slot {index!r}; the bank has the slots 0 to {bank.slots - 1}."
        )


@jax.jit
def _stacked(nodes: Sequence[Any]) -> Any:
    # slots × [*axes] -> [slots, *axes]
    return jax.tree.map(lambda *arrays: jnp.stack(arrays), *nodes)


@jax.jit
def _replaced(stacked: Any, index: Any, row: Any) -> Any:
    # [slots, *axes] with [*axes] at one slot
    return jax.tree.map(lambda array, new: array.at[index].set(new), stacked, row)
