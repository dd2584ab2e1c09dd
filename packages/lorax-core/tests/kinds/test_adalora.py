"""AdaLoRA: initial factors, orthogonality penalty, pruning, and invalid specs."""

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


def init_pair(spec, shape=(9, 7)):
    return init_lora({"w": jnp.ones(shape)}, {"w": spec}, jax.random.key(0))


def test_initial_factors_are_small_and_the_delta_is_zero():
    weight = init_pair(AdaloraSpec(32), (64, 48)).tunable["w"]
    assert (weight.e == 0).all()
    for factor in (weight.a, weight.b):
        np.testing.assert_allclose(factor.std(), 0.02, rtol=0.05)


def test_delta_is_the_product_of_three_factors():
    frozen, tunable = init_pair(AdaloraSpec(3, alpha=6))
    weight = random_factors(tunable, jax.random.key(1))["w"]
    expected = 1 + 2 * weight.a @ jnp.diag(weight.e) @ weight.b
    np.testing.assert_allclose(merge_params(frozen, {"w": weight})["w"], expected, rtol=1e-5)


def with_factors(spec, shape, a, b):
    tunable = init_pair(spec, shape).tunable
    return {"w": tunable["w"].with_factors({"a": a, "b": b, "e": tunable["w"].e}), "other": None}


def test_orthonormal_factors_have_zero_penalty_and_gradient():
    tunable = with_factors(AdaloraSpec(2), (3, 3), jnp.eye(3)[:, :2], jnp.eye(3)[1:])
    value, grads = jax.value_and_grad(adalora_orthogonality)(tunable)
    assert value == 0
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(grads))


def test_the_penalty_is_a_mean_over_factors_and_entries():
    a = jnp.stack([jnp.eye(3)[:, :2], 2 * jnp.eye(3)[:, :2]])
    b = jnp.stack([jnp.eye(3)[:2], jnp.zeros((2, 3))])
    tunable = with_factors(AdaloraSpec(2, shared_axes=[0]), (2, 3, 3), a, b)
    # Of four norms, two are not zero: ‖4 I − I‖ = 3 √2 and ‖0 − I‖ = √2.
    np.testing.assert_allclose(adalora_orthogonality(tunable), np.sqrt(2), rtol=1e-6)


def test_other_kinds_have_zero_penalty():
    tunable = init_lora({"w": jnp.ones((5, 3))}, {"w": 2}, jax.random.key(0)).tunable
    assert adalora_orthogonality(tunable) == 0


BAD = {
    "rank 0": (AdaloraSpec(0), "`w` has an AdaloraSpec of rank 0; ranks begin at 1"),
    "rank 1.5": (AdaloraSpec(1.5), "`w` has rank 1.5; a rank is a positive int"),  # pyright: ignore
    "alpha": (AdaloraSpec(2, alpha=float("nan")), "`w` has alpha nan; it must be a finite number"),
}


@pytest.mark.parametrize("row", BAD)
def test_invalid_settings_raise(row):
    spec, message = BAD[row]
    with pytest.raises(SpecError, match=message):
        init_pair(spec)


def test_vector_raises():
    with pytest.raises(SpecError, match="`w` has 1 dimension.*give it LORA_FREEZE or LORA_FULL"):
        init_pair(AdaloraSpec(2), (5,))


def test_rank_above_that_of_the_matrix_warns():
    with pytest.warns(RankWarning, match="whose rank is at most 7"):
        init_pair(AdaloraSpec(8))


def tree_and_gradients(factor):
    """A tunable tree, and gradients with which rank k is more important than rank k - 1."""
    tunable = random_factors(init_pair(AdaloraSpec(4)).tunable, jax.random.key(1))
    weight = tunable["w"].with_factors(
        {name: jnp.ones_like(x) for name, x in tunable["w"].factors().items()}
    )
    importance = jnp.arange(1.0, 5.0)
    grads = weight.with_factors(
        {
            "a": jnp.tile(importance, (9, 1)) * factor,
            "e": importance * factor,
            "b": jnp.tile(importance[:, None], (1, 7)) * factor,
        }
    )
    tree = {"w": weight, "full": jnp.ones(3), "frozen": None}
    return tree, {"w": grads, "full": jnp.ones(3), "frozen": None}


def run_pruner(pruner, steps):
    tunable, _ = tree_and_gradients(1)
    state = pruner.init(tunable)
    masks = []
    for step in range(steps):
        _, grads = tree_and_gradients(1 + step)
        tunable, state = jax.jit(pruner.update)(tunable, grads, state, step)
        masks.append(tunable["w"].e.tolist())
    return tunable, masks


def test_prunes_the_least_important_ranks_to_the_budget():
    tunable, masks = run_pruner(adalora_pruner(1, 8, t_init=2, t_final=2), 10)
    # Four ranks until step 2, then floor(3 · (remaining steps / 4)³ + 1).
    assert [sum(map(bool, e)) for e in masks] == [4, 4, 4, 2, 1, 1, 1, 1, 1, 1]
    assert masks[3] == [0, 0, 1, 1] and masks[-1] == [0, 0, 0, 1]
    assert (tunable["full"] == 1).all() and tunable["frozen"] is None


def test_mask_changes_only_every_so_many_steps():
    _, masks = run_pruner(adalora_pruner(1, 8, every=5), 9)
    assert [sum(map(bool, e)) for e in masks][:8] == [4, 4, 4, 4, 4, 1, 1, 1]


def test_target_of_the_full_rank_prunes_nothing():
    _, masks = run_pruner(adalora_pruner(4, 4), 6)
    assert masks == [[1, 1, 1, 1]] * 6


def test_a_tree_without_adalora_is_unchanged():
    tunable = init_lora({"w": jnp.ones((5, 3))}, {"w": 2}, jax.random.key(0)).tunable
    pruner = adalora_pruner(1, 4)
    again, _ = pruner.update(tunable, tunable, pruner.init(tunable), 3)
    assert jax.tree.all(jax.tree.map(lambda x, y: (x == y).all(), again, tunable))


def test_entries_of_a_stack_share_the_budget():
    tunable = init_pair(AdaloraSpec(4, shared_axes=[0]), (3, 9, 7)).tunable
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
def test_invalid_schedule_raises(target, total, more):
    with pytest.raises(ValueError, match="adalora_pruner takes target_rank and every from 1"):
        adalora_pruner(target, total, **more)
