"""Banks of adapters: stacked, changed slot by slot, and unstacked bit for bit."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorax import (
    LORA_FULL,
    DoraSpec,
    IA3Spec,
    LoraSpec,
    MissSpec,
    PairError,
    drop_adapter,
    init_lora,
    select_adapters,
    set_adapter,
    stack_adapters,
    testing,
    unstack_adapters,
    with_dropout,
)

PARAMS = {
    "kernel": jnp.zeros((11, 7)),
    "stack": jnp.zeros((4, 5, 13)),
    "heads": jnp.zeros((8, 3, 10)),
    "bias": jnp.zeros(7),
}
PAIR = init_lora(PARAMS, dict.fromkeys(PARAMS, 0) | {"kernel": 2}, jax.random.key(0))


def adapter(seed, rank, alpha=None, scaling: Any = "standard", **changes):
    spec = {
        "kernel": LoraSpec(rank, alpha, scaling),
        "stack": LoraSpec(rank, alpha, scaling, shared_axes=[0]),
        "heads": LoraSpec(rank, alpha, scaling, in_axes=[0]),
        "bias": 0,
    }
    _, tunable = init_lora(PARAMS, spec | changes, jax.random.key(0))
    return testing.random_factors(tunable, jax.random.key(seed))


def four_adapters():
    return [
        adapter(1, 2, 0.1),
        adapter(2, 3, 16.3, "rslora"),
        adapter(3, 1) | {"heads": None},
        adapter(4, 3, kernel=0),
    ]


def assert_same(actual, wanted):
    assert jax.tree.structure(actual) == jax.tree.structure(wanted)
    for leaf, other in zip(jax.tree.leaves(actual), jax.tree.leaves(wanted), strict=True):
        assert leaf.dtype == other.dtype
        np.testing.assert_array_equal(leaf, other)


def test_unstacked_adapters_are_bit_identical():
    bank = stack_adapters(four_adapters(), slots=6, rank=4)
    assert bank.slots == 6
    assert bank.tunable["stack"].a.shape == (6, 4, 5, 4)
    assert bank.tunable["stack"].b.shape == (6, 4, 4, 13)
    assert bank.tunable["bias"] is None
    np.testing.assert_allclose(bank.scales["kernel"], [0.05, 16.3 / 3**0.5, 1, 1, 1, 1], rtol=1e-6)
    unstacked = unstack_adapters(bank)
    assert unstacked[4:] == [None, None]
    for actual, wanted in zip(unstacked, four_adapters(), strict=False):
        assert_same(actual, wanted)


def test_padding_and_missing_targets_are_zeros():
    bank = stack_adapters(four_adapters())
    assert not bank.tunable["kernel"].a[0, :, 2:].any()
    assert not bank.tunable["kernel"].b[0, 2:].any()
    assert not bank.tunable["heads"].a[2].any() and not bank.tunable["heads"].b[2].any()


def test_set_and_drop_keep_the_shapes_of_the_bank():
    bank = stack_adapters(four_adapters(), slots=5, rank=4)
    new = adapter(7, 4, 3.0)
    changed = set_adapter(drop_adapter(bank, 1), 4, new)
    shapes = lambda bank: jax.tree.map(lambda x: (x.shape, x.dtype), bank)  # noqa: E731
    assert shapes(changed) == shapes(bank)
    assert jax.tree.structure(changed) == jax.tree.structure(bank)
    unstacked = unstack_adapters(changed)
    assert unstacked[1] is None and not changed.tunable["stack"].a[1].any()
    assert_same(unstacked[4], new)
    assert_same(unstacked[0], four_adapters()[0])
    # The old bank is unchanged.
    assert_same(unstack_adapters(bank)[1], four_adapters()[1])
    replaced = set_adapter(bank, 1, adapter(8, 1) | {"stack": None})
    assert_same(unstack_adapters(replaced)[1], adapter(8, 1) | {"stack": None})


def test_stacks_other_kinds_and_full_parameters():
    kinds: dict[str, Any] = {
        "kernel": IA3Spec(),
        "heads": DoraSpec(LoraSpec(2, in_axes=[0])),
        "bias": LORA_FULL,
    }
    trees = [adapter(seed, 2, stack=MissSpec(3, shared_axes=[0]), **kinds) for seed in range(3)]
    for actual, wanted in zip(unstack_adapters(stack_adapters(trees)), trees, strict=True):
        assert_same(actual, wanted)


def test_bfloat16_factors_stay_bfloat16():
    tree = jax.tree.map(lambda x: x.astype(jnp.bfloat16), four_adapters()[0])
    assert_same(unstack_adapters(stack_adapters([tree]))[0], tree)


@pytest.mark.parametrize(
    ("trees", "options", "error", "message"),
    [
        ([], {}, ValueError, "no adapters to stack"),
        ([adapter(0, 2), adapter(1, 2)], {"slots": 1}, ValueError, "2 adapters do not fit into 1"),
        ([{"w": None}], {}, ValueError, "have no adapters"),
        ([adapter(0, 2)], {"slots": "3"}, ValueError, "slots='3'; it must be a positive int"),
        ([adapter(0, 2)], {"slots": 2.5}, ValueError, "slots=2.5; it must be"),
        ([adapter(0, 2)], {"rank": -1}, ValueError, "rank=-1; it must be a positive int"),
        (None, {}, ValueError, "takes a sequence of tunable trees, not a NoneType"),
        (PAIR, {}, ValueError, "trees, not a Pair"),
        ([PAIR], {}, PairError, "take the tunable tree"),
        ([adapter(0, 2), {"kernel": None}], {}, PairError, "adapter 1 has the structure"),
        (
            [adapter(0, 2), adapter(1, 2, heads=LoraSpec(2, in_axes=[0, 1]))],
            {},
            PairError,
            "`heads`.*same base",
        ),
        ([adapter(0, 2), adapter(1, 2, kernel=MissSpec(2))], {}, PairError, "`kernel`.*as_lora"),
        (
            [adapter(0, 2), jax.tree.map(lambda x: x.astype(jnp.bfloat16), adapter(1, 2))],
            {},
            PairError,
            "same dtype",
        ),
        (
            [adapter(0, 2, kernel=DoraSpec(2)), adapter(1, 2, kernel=0)],
            {},
            PairError,
            "without a dora adapter at `kernel` cannot stand for the base",
        ),
        ([adapter(0, 2, bias=LORA_FULL)], {"slots": 2}, PairError, "parameter in full at `bias`"),
    ],
)
def test_adapters_that_cannot_be_stacked_raise(trees, options, error, message):
    with pytest.raises(error, match=message):
        stack_adapters(trees, **options)


def test_adapters_that_do_not_fit_a_bank_raise():
    bank = stack_adapters([adapter(0, 2, kernel=0)], slots=2)
    bad: tuple[Any, ...] = (-1, 2, 1.0, True)
    for index in bad:
        with pytest.raises(IndexError, match="the bank has the slots 0 to 1"):
            set_adapter(bank, index, adapter(1, 2, kernel=0))
        with pytest.raises(IndexError, match="the bank has the slots 0 to 1"):
            drop_adapter(bank, index)
    with pytest.raises(PairError, match="lora adapter at `kernel`.*Stack the bank again"):
        set_adapter(bank, 1, adapter(1, 2))
    with pytest.raises(PairError, match="rank 3, and the bank has room for 2"):
        set_adapter(bank, 1, adapter(1, 3, kernel=0))
    with pytest.raises(PairError, match="has the structure"):
        set_adapter(bank, 1, {"kernel": None})
    full = stack_adapters([adapter(0, 2, bias=LORA_FULL)])
    with pytest.raises(PairError, match="parameter in full at `bias`"):
        drop_adapter(full, 0)


def test_trees_that_are_not_stored_adapters_raise():
    tree = adapter(1, 2)
    bank = stack_adapters([tree, tree])
    with pytest.raises(TypeError, match="takes a sequence of tunable trees, not a dict"):
        stack_adapters(tree)
    assert stack_adapters(each for each in (tree, tree)).slots == 2  # pyright: ignore[reportArgumentType]
    for of_one_call in (with_dropout(tree, jax.random.key(0), 0.5), select_adapters(bank, 0)):
        with pytest.raises(PairError, match="at `heads` was returned by with_dropout"):
            stack_adapters([of_one_call])
        with pytest.raises(PairError, match="is for a single call"):
            set_adapter(bank, 0, of_one_call)
