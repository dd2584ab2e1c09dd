"""Trainable tokens: which rows are replaced and trained, and invalid specs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorax import DoraSpec, SpecError, TokensSpec, init_lora, lora, merge_params
from lorax.testing import random_factors

TABLE = jnp.arange(1.0, 13.0).reshape(6, 2)


def init_pair(spec, table=TABLE):
    return init_lora({"table": table}, {"table": spec}, jax.random.key(0))


def test_merge_replaces_only_the_given_rows():
    frozen, tunable = init_pair(TokensSpec([4, 1]))
    tunable = random_factors(tunable, jax.random.key(1))
    merged = merge_params(frozen, tunable)["table"]
    expected = TABLE.at[jnp.array([4, 1])].set(tunable["table"].values)
    # The merge adds a difference to the base's row, which rounds.
    np.testing.assert_allclose(merged, expected, rtol=0, atol=1e-7 * float(TABLE.max()))


def test_only_the_given_rows_have_gradients():
    frozen, tunable = init_pair(TokensSpec([4, 1]))
    look_up = lora(lambda params, tokens: params["table"][tokens])
    grads = jax.grad(lambda t: look_up((frozen, t), jnp.array([1, 1, 0, 5])).sum())(tunable)
    np.testing.assert_array_equal(grads["table"].values, [[0, 0], [2, 2]])


def test_rows_are_counted_along_the_input_axis():
    frozen, tunable = init_pair(TokensSpec([4], in_axes=[1]), TABLE.T)
    np.testing.assert_array_equal(tunable["table"].values, TABLE[4:5])
    np.testing.assert_array_equal(merge_params(frozen, tunable)["table"], TABLE.T)


def test_each_table_of_a_stack_has_its_own_values():
    _, tunable = init_pair(TokensSpec([4, 0], shared_axes=[0]), jnp.stack([TABLE, -TABLE]))
    assert tunable["table"].values.shape == (2, 2, 2)
    np.testing.assert_array_equal(tunable["table"].values[1], -TABLE[jnp.array([4, 0])])


def test_donating_the_trained_rows_keeps_the_frozen_ones():
    frozen, tunable = init_pair(TokensSpec([4]))
    step = jax.jit(lambda t: jax.tree.map(lambda x: x + 1, t), donate_argnums=0)
    step(tunable)
    np.testing.assert_array_equal(frozen["table"].factors["replaced"], TABLE[4:5])


def test_indices_may_be_any_sequence_of_ints():
    indices = (TokensSpec(make([4, 1])) for make in (list, tuple, np.array, jnp.array))  # pyright: ignore
    assert {spec.indices for spec in indices} == {(4, 1)}
    assert TokensSpec(range(2)).indices == (0, 1)


BAD = {
    "no index": (TokensSpec([]), "without indices; give it LORA_FREEZE"),
    "an int": (TokensSpec(3), "of 3; it takes a sequence of ints"),  # pyright: ignore
    "a string": (TokensSpec("12"), "of '12'; it takes a sequence of ints"),  # pyright: ignore
    "floats": (TokensSpec([1.0]), "it takes a sequence of ints"),  # pyright: ignore
    "truth values": (TokensSpec([True]), "it takes a sequence of ints"),
    "beyond the table": (TokensSpec([1, 6]), "with index 6, but its 6 rows are 0 to 5"),
    "negative": (TokensSpec([-1]), "with index -1, but its 6 rows are 0 to 5"),
    "twice": (TokensSpec([1, 2, 1]), "with index 1 more than once"),
    "DoRA": (DoraSpec(TokensSpec([1])), "DoraSpec of a TokensSpec, whose norm would"),
}


@pytest.mark.parametrize("row", BAD)
def test_invalid_indices_raise(row):
    spec, message = BAD[row]
    with pytest.raises(SpecError, match=f"^`table` has a .*{message}"):
        init_pair(spec)


def test_several_input_axes_raise():
    with pytest.raises(SpecError, match=r"`table` .* input axes \(0, 1\).* pass in_axes=\[0\]"):
        init_pair(TokensSpec([1]), jnp.ones((6, 2, 2)))


def test_vector_raises():
    with pytest.raises(SpecError, match="`table` has 1 dimension, so it cannot take TokensSpec"):
        init_pair(TokensSpec([1]), jnp.ones(6))


def test_shape_without_values_raises():
    shape = jax.ShapeDtypeStruct((6, 2), jnp.float32)
    with pytest.raises(SpecError, match="needs the rows of the table, .* under jax.eval_shape"):
        init_pair(TokensSpec([1]), shape)  # pyright: ignore
