"""AdaLoRA: its start, its penalty, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorax import (
    AdaloraSpec,
    RankWarning,
    SpecError,
    adalora_orthogonality,
    adalora_pruner,
    init_lora,
    merge_params,
)
from lorax.testing import random_factors


def start(spec, shape=(9, 7)):
    return init_lora({"w": jnp.ones(shape)}, {"w": spec}, jax.random.key(0))


def test_begins_with_small_factors_and_no_delta():
    weight = start(AdaloraSpec(32), (64, 48)).tunable["w"]
    assert (weight.e == 0).all()
    for factor in (weight.a, weight.b):
        np.testing.assert_allclose(factor.std(), 0.02, rtol=0.05)


def test_is_the_product_of_its_three_factors():
    frozen, tunable = start(AdaloraSpec(3, alpha=6))
    weight = random_factors(tunable, jax.random.key(1))["w"]
    expected = 1 + 2 * weight.a @ jnp.diag(weight.e) @ weight.b
    np.testing.assert_allclose(merge_params(frozen, {"w": weight})["w"], expected, rtol=1e-5)


def with_factors(spec, shape, a, b):
    tunable = start(spec, shape).tunable
    return {"w": tunable["w"].with_factors({"a": a, "b": b, "e": tunable["w"].e}), "other": None}


def test_orthonormal_factors_have_no_penalty_and_a_gradient_of_zero():
    tunable = with_factors(AdaloraSpec(2), (3, 3), jnp.eye(3)[:, :2], jnp.eye(3)[1:])
    value, grads = jax.value_and_grad(adalora_orthogonality)(tunable)
    assert value == 0
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(grads))


def test_the_penalty_is_a_mean_over_factors_and_entries():
    a = jnp.stack([jnp.eye(3)[:, :2], 2 * jnp.eye(3)[:, :2]])
    b = jnp.stack([jnp.eye(3)[:2], jnp.zeros((2, 3))])
    tunable = with_factors(AdaloraSpec(2, shared_axes=[0]), (2, 3, 3), a, b)
    # ‖4 I − I‖ = 3 √2 and ‖0 − I‖ = √2, of four.
    np.testing.assert_allclose(adalora_orthogonality(tunable), np.sqrt(2), rtol=1e-6)


def test_other_weights_have_no_penalty():
    tunable = init_lora({"w": jnp.ones((5, 3))}, {"w": 2}, jax.random.key(0)).tunable
    assert adalora_orthogonality(tunable) == 0


BAD = {
    "rank 0": (AdaloraSpec(0), "`w` has an AdaloraSpec of rank 0; ranks begin at 1"),
    "rank 1.5": (AdaloraSpec(1.5), "`w` has rank 1.5; a rank is a positive int"),  # pyright: ignore
    "alpha": (AdaloraSpec(2, alpha=float("nan")), "`w` has alpha nan; it must be a finite number"),
}


@pytest.mark.parametrize("row", BAD)
def test_bad_settings_raise(row):
    spec, message = BAD[row]
    with pytest.raises(SpecError, match=message):
        start(spec)


def test_vectors_raise():
    with pytest.raises(SpecError, match="`w` has 1 dimension.*give it LORA_FREEZE or LORA_FULL"):
        start(AdaloraSpec(2), (5,))


def test_warns_of_a_rank_above_the_matrix():
    with pytest.warns(RankWarning, match="whose rank is at most 7"):
        start(AdaloraSpec(8))


def trained(factor):
    """A tunable tree and gradients whose importance grows with the rank."""
    tunable = random_factors(start(AdaloraSpec(4)).tunable, jax.random.key(1))
    weight = tunable["w"].with_factors(
        {name: jnp.ones_like(x) for name, x in tunable["w"].factors().items()}
    )
    ranks = jnp.arange(1.0, 5.0)
    grads = weight.with_factors(
        {
            "a": jnp.tile(ranks, (9, 1)) * factor,
            "e": ranks * factor,
            "b": jnp.tile(ranks[:, None], (1, 7)) * factor,
        }
    )
    tree = {"w": weight, "full": jnp.ones(3), "frozen": None}
    return tree, {"w": grads, "full": jnp.ones(3), "frozen": None}


def run(pruner, steps):
    tunable, _ = trained(1)
    state = pruner.init(tunable)
    masks = []
    for step in range(steps):
        _, grads = trained(1 + step)
        tunable, state = jax.jit(pruner.update)(tunable, grads, state, step)
        masks.append(tunable["w"].e.tolist())
    return tunable, masks


def test_the_least_important_ranks_go_first_and_the_budget_is_kept():
    tunable, masks = run(adalora_pruner(1, 8, t_init=2, t_final=2), 10)
    # All four until step 2, then floor(3 · (left / 4)³ + 1) of them.
    assert [sum(map(bool, e)) for e in masks] == [4, 4, 4, 2, 1, 1, 1, 1, 1, 1]
    assert masks[3] == [0, 0, 1, 1] and masks[-1] == [0, 0, 0, 1]
    assert (tunable["full"] == 1).all() and tunable["frozen"] is None


def test_ranks_are_kept_between_two_masks():
    _, masks = run(adalora_pruner(1, 8, every=5), 9)
    assert [sum(map(bool, e)) for e in masks][:8] == [4, 4, 4, 4, 4, 1, 1, 1]


def test_a_budget_of_all_ranks_keeps_them():
    _, masks = run(adalora_pruner(4, 4), 6)
    assert masks == [[1, 1, 1, 1]] * 6


def test_a_tree_without_adalora_is_left_alone():
    tunable = init_lora({"w": jnp.ones((5, 3))}, {"w": 2}, jax.random.key(0)).tunable
    pruner = adalora_pruner(1, 4)
    again, _ = pruner.update(tunable, tunable, pruner.init(tunable), 3)
    assert jax.tree.all(jax.tree.map(lambda x, y: (x == y).all(), again, tunable))


def test_entries_of_a_stack_share_the_budget():
    tunable = start(AdaloraSpec(4, shared_axes=[0]), (3, 9, 7)).tunable
    tunable = random_factors(tunable, jax.random.key(1))
    grads = random_factors(tunable, jax.random.key(2))
    pruner = adalora_pruner(2, 1)
    state = pruner.update(tunable, grads, pruner.init(tunable), 0)[1]
    tunable, state = pruner.update(tunable, grads, state, 1)
    assert state.kept["w"].shape == (3, 4) and state.kept["w"].sum() == 6
    np.testing.assert_array_equal(tunable["w"].e != 0, state.kept["w"])


@pytest.mark.parametrize(
    ("target", "total", "more"),
    [(0, 9, {}), (1, 9, {"t_init": 9}), (1, 9, {"t_final": -1}), (1, 9, {"every": 0})],
)
def test_a_schedule_that_does_not_fit_raises(target, total, more):
    with pytest.raises(ValueError, match="adalora_pruner takes target_rank and every from 1"):
        adalora_pruner(target, total, **more)
