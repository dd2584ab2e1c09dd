"""`resize_adapter` and `as_lora`: best approximations, ranks, and kinds that are not a LoRA."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorax import (
    AdaloraSpec,
    DeloraSpec,
    DoraSpec,
    GraloraSpec,
    IA3Spec,
    LoconSpec,
    LohaSpec,
    LokrSpec,
    LoraFASpec,
    LoraSpec,
    MissSpec,
    PairError,
    TokensSpec,
    VeraSpec,
    as_lora,
    init_lora,
    materialize,
    merge_params,
    resize_adapter,
)

PARAMS = {"kernel": jnp.zeros((13, 9)), "stack": jnp.zeros((3, 11, 7)), "bias": jnp.zeros(9)}
SPEC = {
    "kernel": LoraSpec(6, alpha=4, scaling="rslora"),
    "stack": LoraSpec(5, alpha=3, shared_axes=[0]),
    "bias": -1,
}


def adapter():
    return init_lora(PARAMS, SPEC, jax.random.key(0), b_init="gaussian")[1]


def test_best_approximation_of_a_rank_with_the_same_scale():
    tunable = adapter()
    resized, errors = resize_adapter(tunable, 2)
    for name in ("kernel", "stack"):
        exact = np.asarray(materialize(PARAMS[name], tunable[name]), np.float64)
        delta = np.asarray(materialize(PARAMS[name], resized[name]), np.float64)
        values = np.linalg.svd(exact, compute_uv=False)
        lowest = np.sqrt((values[..., 2:] ** 2).sum() / (values**2).sum())
        error = np.linalg.norm(delta - exact) / np.linalg.norm(exact)
        assert error == pytest.approx(lowest, rel=1e-4)
        assert errors[name] == pytest.approx(lowest, rel=1e-4)
        assert resized[name].scale == pytest.approx(tunable[name].scale)
        assert resized[name].rank == 2
    assert (resized["bias"] == tunable["bias"]).all() and "bias" not in errors


def test_a_higher_rank_changes_nothing():
    tunable = adapter()
    resized, errors = resize_adapter(tunable, 8)
    assert jax.tree.all(jax.tree.map(lambda x, y: bool((x == y).all()), tunable, resized))
    assert jax.tree.structure(tunable) == jax.tree.structure(resized)
    assert max(errors.values()) < 1e-6


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.99])
def test_every_entry_keeps_at_least_the_energy(energy):
    tunable = adapter()
    resized, _ = resize_adapter(tunable, energy=energy)
    for name in ("kernel", "stack"):
        exact = np.asarray(materialize(PARAMS[name], tunable[name]), np.float64)
        squares = np.linalg.svd(exact, compute_uv=False) ** 2
        kept = np.cumsum(squares, -1) / squares.sum(-1, keepdims=True)
        rank = resized[name].rank
        assert (kept[..., rank - 1] >= energy).all()
        assert rank == 1 or not (kept[..., rank - 2] >= energy).all()
    same, _ = resize_adapter(tunable, tolerance=(1 - energy) ** 0.5)
    assert [w.rank for w in (same["kernel"], same["stack"])] == [
        w.rank for w in (resized["kernel"], resized["stack"])
    ]
    assert resize_adapter(tunable, 1, energy=energy).tunable["kernel"].rank == 1


def test_rank_of_a_delta_is_found():
    tunable = adapter()
    weight = tunable["kernel"]
    # Twice the same factors: rank 6 in 12.
    double = type(weight)(
        jnp.concatenate([weight.a, weight.a], 1), jnp.concatenate([weight.b, weight.b], 0), 12
    )
    resized, errors = resize_adapter({"w": double}, tolerance=1e-5)
    assert resized["w"].rank == 6 and errors["w"] < 1e-5


def test_zero_delta_has_rank_one():
    _, tunable = init_lora(PARAMS, SPEC, jax.random.key(0))
    resized, errors = resize_adapter(tunable, energy=0.9)
    assert resized["kernel"].rank == 1 and errors["kernel"] == 0
    assert not materialize(PARAMS["kernel"], resized["kernel"]).any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "give a rank, an energy or a tolerance"),
        ({"rank": 0}, "positive int"),
        ({"rank": True}, "positive int"),
        ({"energy": 1.5}, "from 0 to 1"),
        ({"tolerance": -0.1}, "from 0 to 1"),
        ({"energy": 0.5, "tolerance": 0.5}, "energy is 1 − tolerance²"),
    ],
)
def test_invalid_settings_raise(arguments, message):
    with pytest.raises(ValueError, match=message):
        resize_adapter(adapter(), **arguments)


def test_resize_of_another_kind_raises_with_its_path():
    _, tunable = init_lora({"w": jnp.ones((4, 3))}, {"w": IA3Spec()}, jax.random.key(0))
    with pytest.raises(PairError, match="`w` is ia3.*as_lora"):
        resize_adapter(tunable, 2)


def random_pair(shape, spec):
    key = jax.random.key(1)
    params = {"w": jax.random.normal(key, shape)}
    pair = init_lora(params, {"w": spec}, key)
    leaves, structure = jax.tree.flatten(pair.tunable)
    keys = jax.random.split(key, len(leaves))
    filled = [jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    return params, pair._replace(tunable=jax.tree.unflatten(structure, filled))


@pytest.mark.parametrize(
    ("shape", "spec", "rank"),
    [
        ((12, 7), LoraSpec(3, alpha=6), 3),
        ((12, 7), MissSpec(4), 4),
        ((12, 7), LoraFASpec(3, alpha=6), 3),
        ((12, 7), VeraSpec(5), 5),
        ((12, 7), AdaloraSpec(4, alpha=2), 4),
        ((12, 7), DeloraSpec(4), 4),
        ((5, 12, 7), DeloraSpec(4, shared_axes=[0]), 4),
        ((3, 2, 8, 7), LoconSpec(3, alpha=2), 3),
        ((12, 7), TokensSpec([1, 5, 8]), 3),
        ((12, 7), LohaSpec(2), 4),
        ((24, 16), GraloraSpec(4, blocks=2), 8),
        ((48, 48), LokrSpec(2, factor=4), 8),
    ],
    ids=lambda value: type(value).__name__ if hasattr(value, "blank") else str(value),
)
def test_as_lora_of_kinds_that_are_products_of_two_factors(shape, spec, rank):
    params, pair = random_pair(shape, spec)
    converted = as_lora(pair)
    assert converted["w"].rank == rank and converted["w"].kind == "lora"
    expected = merge_params(pair)["w"]
    merged = merge_params(params, converted)["w"]
    np.testing.assert_allclose(merged, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (IA3Spec(), "multiplies the weight"),
        (DoraSpec(LoraSpec(2)), "multiplies the weight"),
        (LohaSpec(3), "has a delta of rank 9 on a weight whose rank is 8"),
        (LokrSpec(8, factor=2), "has a delta of rank 8 on a weight whose rank is 8"),
    ],
    ids=lambda value: type(value).__name__ if hasattr(value, "blank") else "",
)
def test_as_lora_of_other_kinds_raises(spec, reason):
    _, pair = random_pair((12, 8), spec)
    with pytest.raises(PairError, match=f"`w` {reason}.*no LoRA equals it.*extract_lora"):
        as_lora(pair)
