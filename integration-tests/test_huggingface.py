"""Hugging Face transformers: a small random GPT-2."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers

import lorax


@pytest.fixture
def model():
    config = transformers.GPT2Config(
        vocab_size=59, n_positions=8, n_embd=22, n_layer=2, n_head=2, use_cache=False
    )
    # In float64, since the norms of such a small model amplify rounding errors of float32.
    with jax.enable_x64(True):
        model = transformers.FlaxGPT2LMHeadModel(config, seed=0, dtype=jnp.float64)
        model.params = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), model.params)
        yield model


TOKENS = np.array([[3, 1, 4, 1, 5], [9, 2, 6, 5, 58]])
KEY = jax.random.PRNGKey(1)


def logits(model):
    def apply(params, tokens, key, train):
        return model(tokens, params=params, dropout_rng=key, train=train).logits

    return apply


def test_every_weight_with_dropout(check_adapter, model):
    spec = lorax.infer_spec(
        logits(model), model.params, TOKENS, KEY, rank=2, train=True, where="transformer/*"
    )
    # Kernels are (out, in) in FlaxConv1D.
    c_attn = spec["transformer"]["h"]["0"]["attn"]["c_attn"]["kernel"]
    assert c_attn == lorax.LoraSpec(2, in_axes=(1,), out_axes=(0,))
    assert spec["transformer"]["wte"]["embedding"] == lorax.LoraSpec(2, in_axes=(0,), out_axes=(1,))
    for train in (True, False):
        check_adapter(
            logits(model), model.params, spec, TOKENS, KEY, train=train, tolerance=1e-7,
            transforms=train,
        )  # fmt: skip


def test_rules_select_attention_only(check_adapter, model):
    rule = lorax.LoraSpec(2, alpha=4, in_axes=(1,), out_axes=(0,))
    spec = lorax.spec_from_rules(model.params, [("*/attn/c_attn/kernel", rule)])
    frozen, tunable = check_adapter(
        logits(model), model.params, spec, TOKENS, KEY, train=False, tolerance=1e-7
    )
    assert lorax.count_params(tunable) == 2 * 2 * (22 + 66)
    merged = lorax.merge_params(frozen, tunable)
    assert jax.tree.map(jax.numpy.shape, merged) == jax.tree.map(jax.numpy.shape, model.params)
