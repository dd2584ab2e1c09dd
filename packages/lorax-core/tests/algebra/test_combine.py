"""`combine_adapters`: each method against exact sums of deltas, and invalid arguments."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorax import (
    DoraSpec,
    LoraSpec,
    PairError,
    SpecError,
    combine_adapters,
    init_lora,
    merge_params,
)

SHAPES = {
    "kernel": ((11, 7), LoraSpec(3, alpha=5)),
    "window": ((2, 3, 5, 9), LoraSpec(3, alpha=6)),
    "stack": ((4, 11, 13), LoraSpec(3, alpha=4, shared_axes=[0])),
    "heads": ((8, 3, 10), LoraSpec(3, in_axes=[0])),
}
PARAMS = {name: jnp.zeros(shape) for name, (shape, _) in SHAPES.items()}


def adapter(seed, rank=3, params=PARAMS, **changes):
    spec = {
        name: LoraSpec(rank, own.alpha, own.scaling, own.in_axes, own.out_axes, own.shared_axes)
        for name, (_, own) in SHAPES.items()
    }
    return init_lora(params, spec | changes, jax.random.key(seed), b_init="gaussian")[1]


def deltas(tunable):
    return merge_params(PARAMS, tunable)


def assert_close(actual, expected, tolerance=2e-6):
    for name in expected:
        np.testing.assert_allclose(actual[name], expected[name], rtol=1e-5, atol=tolerance)


def test_concatenation_is_the_exact_sum_for_any_ranks_and_scales():
    one, two = adapter(0), adapter(1, rank=5)
    combined, errors = combine_adapters({"one": (one, 0.7), "two": (two, -1.3)})
    expected = jax.tree.map(lambda x, y: 0.7 * x - 1.3 * y, deltas(one), deltas(two))
    assert_close(deltas(combined), expected)
    assert combined["stack"].rank == 8 and combined["stack"].scale == 1
    assert errors.keys() == SHAPES.keys() and max(errors.values()) < 1e-6


def test_merging_in_turn_equals_merging_the_concatenation():
    one, two = adapter(0), adapter(1, rank=5)
    combined, _ = combine_adapters({"one": (one, 1), "two": (two, 1)})
    assert_close(deltas(combined), merge_params(merge_params(PARAMS, one), two))


def matrices(array, spec):
    axes = spec.axes("", array.ndim)
    order = (*axes.shared, *axes.inputs, *axes.outputs)
    fans = axes.sizes(array.shape)
    return np.transpose(np.asarray(array, np.float64), order).reshape(-1, *fans)


def test_svd_is_the_best_approximation_of_its_rank():
    one, two = adapter(0), adapter(1, rank=5)
    combined, errors = combine_adapters({"one": (one, 0.7), "two": (two, 1.3)}, "svd", rank=2)
    exact = jax.tree.map(lambda x, y: 0.7 * x + 1.3 * y, deltas(one), deltas(two))
    for name, (_, spec) in SHAPES.items():
        expected = matrices(exact[name], spec)
        values = np.linalg.svd(expected, compute_uv=False)
        lowest = np.sqrt((values[:, 2:] ** 2).sum() / (values**2).sum())
        delta = matrices(deltas(combined)[name], spec)
        error = np.linalg.norm(delta - expected) / np.linalg.norm(expected)
        assert error == pytest.approx(lowest, rel=1e-4)
        assert errors[name] == pytest.approx(error, rel=1e-4)
        assert combined[name].rank == 2


def test_svd_keeps_the_highest_rank_by_default():
    combined, _ = combine_adapters({"1": (adapter(0, rank=2), 1), "2": (adapter(1), 1)}, "svd")
    assert {weight.rank for weight in combined.values()} == {3}


def test_linear_reports_its_distance_to_the_sum():
    one, two = adapter(0), adapter(1)
    combined, errors = combine_adapters({"one": (one, 0.6), "two": (two, -0.4)}, "linear")
    exact = jax.tree.map(lambda x, y: 0.6 * x - 0.4 * y, deltas(one), deltas(two))
    for name in SHAPES:
        delta = np.asarray(deltas(combined)[name], np.float64)
        error = np.linalg.norm(delta - exact[name]) / np.linalg.norm(exact[name])
        assert errors[name] == pytest.approx(error, rel=1e-4) and error > 0.1


def test_linear_of_one_adapter_scales_it():
    for weight in (2.5, -0.5):
        combined, errors = combine_adapters({"one": (adapter(0), weight)}, "linear")
        assert_close(deltas(combined), jax.tree.map(lambda x, w=weight: w * x, deltas(adapter(0))))
        assert max(errors.values()) < 1e-6


def test_target_of_some_adapters_is_combined_from_those():
    one, two = adapter(0), {**adapter(1), "kernel": None, "heads": None}
    three = {**adapter(2), "heads": None}
    given = {"1": (two, 0.5), "2": (one, 2.0), "3": (three, 0.25)}
    combined, _ = combine_adapters(given)
    deltas_of_one = deltas(one)
    np.testing.assert_allclose(
        deltas(combined)["heads"], 2 * deltas_of_one["heads"], rtol=1e-5, atol=1e-6
    )
    assert combined["kernel"].rank == 6 and combined["stack"].rank == 9
    no_adapters = {name: None for name in SHAPES}
    assert combine_adapters({"1": (no_adapters, 1), "2": (no_adapters, 1)}).tunable == no_adapters


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties", "dare_linear_svd"])
def test_random_pruning_keeps_the_mean(method):
    # Without pruning, DARE is linear, and its mean over many keys is the linear combination.
    one, two = adapter(0), adapter(1)
    given = {"one": (one, 0.6), "two": (two, 0.4)}
    key = jax.random.key(3)
    if method == "dare_linear":
        all_kept, _ = combine_adapters(given, method, density=1.0, key=key)
        linear, _ = combine_adapters(given, "linear")
        assert_close(deltas(all_kept), deltas(linear))
        many = [
            combine_adapters(given, method, density=0.5, key=k).tunable["stack"].a
            for k in jax.random.split(key, 60)
        ]
        mean, expected = sum(many) / 60, linear["stack"].a
        assert jnp.linalg.norm(mean - expected) < 0.25 * jnp.linalg.norm(expected)
        assert jnp.linalg.norm(many[0] - expected) > 0.5 * jnp.linalg.norm(expected)
    first, again = (combine_adapters(given, method, density=0.5, key=key).tunable for _ in range(2))
    assert jax.tree.all(jax.tree.map(lambda x, y: bool((x == y).all()), first, again))
    other = combine_adapters(given, method, density=0.5, key=jax.random.key(4)).tunable
    assert not (first["stack"].a == other["stack"].a).all()


def test_bfloat16_factors_are_combined_in_float32():
    low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), [adapter(0), adapter(1)])
    high = jax.tree.map(lambda x: x.astype(jnp.float32), low)
    actual, _ = combine_adapters({"1": (low[0], 0.5), "2": (low[1], 0.5)}, "linear")
    expected, _ = combine_adapters({"1": (high[0], 0.5), "2": (high[1], 0.5)}, "linear")
    assert actual["kernel"].a.dtype == jnp.bfloat16
    assert (actual["kernel"].a == expected["kernel"].a.astype(jnp.bfloat16)).all()


VALID = {"one": (adapter(0), 1.0), "two": (adapter(1), 1.0)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (({},), "no adapters"),
        (({"one": (adapter(0), float("nan"))},), "weight of 'one' is nan"),
        (({"one": (adapter(0), "1")},), "weight of 'one' is '1'"),
        ((VALID, "cat"), "method='cat' is not one of concatenate, svd, linear"),
        ((VALID, "linear_svd"), "not one of"),
        ((VALID, "linear", {"rank": 3}), "is only for methods that end in 'svd'"),
        ((VALID, "svd", {"rank": 0}), "positive int"),
        ((VALID, "ties"), "needs a density"),
        ((VALID, "ties", {"density": 1.5}), "at most 1"),
        ((VALID, "svd", {"density": 0.5}), "prunes nothing"),
        ((VALID, "ties", {"density": 0.5, "signs": "majority"}), "'total' or 'frequency'"),
        ((VALID, "dare_ties", {"density": 0.5}), "so it needs `key`"),
        (
            ({"one": (adapter(0), 1), "two": (adapter(1, rank=4), 1)}, "linear"),
            "'one' has 3, 'two' has 4. Use 'concatenate' or 'svd'",
        ),
    ],
)
def test_invalid_settings_raise(arguments, message):
    options = arguments[2] if len(arguments) > 2 else {}
    with pytest.raises(ValueError, match=message):
        combine_adapters(*arguments[:2], **options)


def test_adapters_of_different_bases_raise():
    one = adapter(0)
    with pytest.raises(PairError, match="tree of 'two' has the structure .* that of 'one'"):
        combine_adapters({"one": (one, 1), "two": ({"kernel": one["kernel"]}, 1)})
    wider = adapter(1, params=PARAMS | {"kernel": jnp.zeros((11, 8))})
    with pytest.raises(PairError, match="`kernel` has .* of sizes .* in 'two'"):
        combine_adapters({"one": (one, 1), "two": (wider, 1)})
    transposed = adapter(
        1, params=PARAMS | {"kernel": jnp.zeros((7, 11))}, kernel=LoraSpec(3, in_axes=[1])
    )
    with pytest.raises(PairError, match="All adapters must be for the same base"):
        combine_adapters({"one": (one, 1), "two": (transposed, 1)})
    dora = adapter(1, kernel=DoraSpec(LoraSpec(3)))
    with pytest.raises(PairError, match="'two' has a dora at `kernel`.*extract_lora"):
        combine_adapters({"one": (one, 1), "two": (dora, 1)})


def test_full_parameters_are_kept_or_raise():
    one, two = adapter(0), adapter(1)
    full = one | {"kernel": jnp.ones((11, 7))}
    without = two | {"kernel": None}
    assert (combine_adapters({"1": (full, 1), "2": (without, 0.5)}).tunable["kernel"] == 1).all()
    with pytest.raises(PairError, match="'1' trains `kernel` in full and has the weight 0.5"):
        combine_adapters({"1": (full, 0.5), "2": (without, 1)})
    with pytest.raises(PairError, match="'1', '2' train `kernel` in full"):
        combine_adapters({"1": (full, 1), "2": (full, 1)})
    with pytest.raises(PairError, match="'1' has a full parameter at `kernel`"):
        combine_adapters({"1": (full, 1), "2": (two, 1)})


@pytest.mark.parametrize("method", ["ties", "dare_ties", "ties_svd"])
def test_signs_of_complex_factors_raise(method):
    params = {"w": jnp.ones((9, 7), jnp.complex64)}
    pair = [
        init_lora(params, {"w": 2}, jax.random.key(k), b_init="gaussian").tunable for k in (0, 1)
    ]
    settings: dict[str, Any] = {"density": 0.5, "rank": 2 if method.endswith("svd") else None}
    if method.startswith("dare"):
        settings["key"] = jax.random.key(0)
    with pytest.raises(SpecError, match="`w.*` is complex, and .* compares signs"):
        combine_adapters({"one": (pair[0], 1.0), "two": (pair[1], 1.0)}, method, **settings)
