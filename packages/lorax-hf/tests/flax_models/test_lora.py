"""`lora(model)` is called like the model, with a pair in place of its parameters."""

import copy
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import lorax
import lorax_hf
from lorax import testing

IDS = jnp.array([[3, 5, 7, 11], [13, 17, 19, 23]])


@pytest.fixture(scope="module")
def gpt2():
    """The model, its adapted form, the pair, and the merged parameters."""
    model = tiny.make("FlaxGPT2LMHeadModel")
    spec = lorax_hf.spec(model, rank=2, alpha=4, targets="all-linear")
    frozen, tunable = lorax.init_lora(model.params, spec, jax.random.key(0))
    tunable = testing.random_factors(tunable, jax.random.key(1))
    adapted = lorax_hf.lora(model, on_materialize="error", on_unused="error")
    return model, adapted, (frozen, tunable), lorax.merge_params(frozen, tunable)


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"train": True, "dropout_rng": jax.random.key(2)},
        {"output_hidden_states": True, "output_attentions": True},
        {"attention_mask": jnp.array([[1, 1, 1, 0], [1, 1, 1, 1]])},
    ],
    ids=["plain", "dropout", "hidden states", "mask"],
)
def test_adapted_model_is_called_like_the_model(gpt2, kwargs):
    model, adapted, pair, merged = gpt2
    actual, plain = adapted(IDS, params=pair, **kwargs), model(IDS, params=merged, **kwargs)
    assert type(actual) is type(plain) and actual.keys() == plain.keys()
    assert not np.allclose(actual.logits, model(IDS, **kwargs).logits, atol=1e-3)
    for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-4)


@pytest.mark.parametrize(
    "kwargs",
    [{}, {"do_sample": True, "prng_key": jax.random.PRNGKey(3)}, {"num_beams": 3}],
    ids=["greedy", "sampled", "beams"],
)
def test_generated_tokens_equal_those_of_the_merged_model(gpt2, kwargs):
    model, adapted, pair, merged = gpt2
    kwargs = {"max_length": 9, "pad_token_id": 0, "eos_token_id": 60, **kwargs}
    actual = adapted.generate(IDS, params=pair, **kwargs).sequences
    np.testing.assert_array_equal(actual, model.generate(IDS, params=merged, **kwargs).sequences)
    assert (actual[:, 4:] != 0).any()


def test_gradients_reach_the_factors(gpt2):
    _, adapted, (frozen, tunable), _ = gpt2
    loss = lambda t: jnp.sum(adapted(IDS, params=(frozen, t)).logits ** 2)  # noqa: E731
    assert all(float(jnp.abs(g).max()) > 0 for g in jax.tree.leaves(jax.grad(loss)(tunable)))


def test_other_attributes_are_the_models(gpt2):
    model, adapted, _, _ = gpt2
    assert adapted.config is model.config and adapted.dtype == model.dtype


def test_missing_parameters_raise(gpt2):
    with pytest.raises(TypeError, match="params"):
        gpt2[1](IDS)


@pytest.mark.parametrize(
    "copy_model", [copy.copy, copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))]
)
def test_adapted_model_can_be_copied_and_pickled(gpt2, copy_model):
    model, adapted, pair, _ = gpt2
    copied = copy_model(adapted)
    assert (copied.model is model) == (copy_model is copy.copy)
    assert copied.config.to_dict() == model.config.to_dict()
    np.testing.assert_array_equal(copied(IDS, params=pair).logits, adapted(IDS, params=pair).logits)
    assert copied._options == adapted._options != {}


def test_unknown_attribute_raises(gpt2):
    with pytest.raises(AttributeError, match="no_such_thing"):
        gpt2[1].no_such_thing  # noqa: B018
