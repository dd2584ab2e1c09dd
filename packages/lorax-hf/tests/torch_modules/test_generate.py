"""`generate`: greedy tokens equal PyTorch's; sampling, padding, and errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_torch
import torch
import transformers

import lorax
import lorax_hf
from lorax import testing

IDS = tiny_torch.IDS
_SIZES = tiny_torch.CAUSAL["llama"]
MODELS = {
    **{kind: {} for kind in tiny_torch.CAUSAL},
    "gpt_oss": {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 5},
}


def torch_greedy(model, ids, new, **options):
    with torch.no_grad():
        tokens = model.generate(
            torch.from_numpy(ids),
            max_new_tokens=new,
            min_new_tokens=None,
            do_sample=False,
            **{"pad_token_id": 0, "eos_token_id": -1, **options},
        )
    return tokens.numpy()


@pytest.mark.parametrize("kind", MODELS)
def test_greedy_tokens_equal_torch(kind):
    model = tiny_torch.randomized_causal(kind, **MODELS[kind])
    fn, params = lorax_hf.from_torch(model)
    tokens = lorax_hf.generate(fn, params, jnp.asarray(IDS), max_new_tokens=9)
    np.testing.assert_array_equal(tokens, torch_greedy(model, IDS, 9))
    assert len(np.unique(np.asarray(tokens)[:, 7:])) > 3


def test_padded_prompts_and_ends():
    model = tiny_torch.randomized_causal("llama")
    fn, params = lorax_hf.from_torch(model)
    ids = IDS.copy()
    mask = np.ones_like(ids)
    ids[1, :3], mask[1, :3] = 0, 0
    plain = torch_greedy(model, ids, 8, attention_mask=torch.from_numpy(mask))
    end = int(plain[0, 10])
    expected = torch_greedy(
        model, ids, 8, attention_mask=torch.from_numpy(mask), eos_token_id=end, pad_token_id=3
    )
    run = lambda **options: lorax_hf.generate(  # noqa: E731
        fn, params, ids, max_new_tokens=8, attention_mask=mask, **options
    )
    np.testing.assert_array_equal(run(), plain)
    tokens = np.asarray(run(eos_token_id=end, pad_token_id=3))
    np.testing.assert_array_equal(tokens[:, : expected.shape[1]], expected)
    assert (tokens[0, 11:] == 3).all()
    assert (np.asarray(run(eos_token_id=end))[0, 11:] == end).all()
    several = np.asarray(run(eos_token_id=[198, end], pad_token_id=3))
    np.testing.assert_array_equal(several, tokens)
    with pytest.raises(ValueError, match="pad prompts on their left"):
        lorax_hf.generate(fn, params, ids, max_new_tokens=8, attention_mask=mask[:, ::-1])
    with pytest.raises(ValueError, match=r"attention_mask has the shape \(2, 3\)"):
        lorax_hf.generate(fn, params, ids, max_new_tokens=8, attention_mask=mask[:, :3])


def test_adapter_generates_the_tokens_of_the_merged_model():
    model = tiny_torch.randomized_causal("qwen3")
    fn, params = lorax_hf.from_torch(model)
    spec = lorax_hf.spec(model, rank=2, targets="all-linear")
    frozen, tunable = lorax.init_lora(params, spec, jax.random.key(0))
    tunable = testing.random_factors(tunable, jax.random.key(1))
    ids = jnp.asarray(IDS)
    tokens = lorax_hf.generate(fn, (frozen, tunable), ids, max_new_tokens=6)
    merged = lorax.merge_params(frozen, tunable)
    np.testing.assert_array_equal(tokens, lorax_hf.generate(fn, merged, ids, max_new_tokens=6))
    assert (tokens != lorax_hf.generate(fn, params, ids, max_new_tokens=6)).any()


def test_sampling_follows_the_distribution():
    model = tiny_torch.randomized_causal("gpt2")
    fn, params = lorax_hf.from_torch(model)
    ids = jnp.tile(jnp.asarray(IDS[:1]), (1500, 1))
    logits = fn(params, ids[:1]).logits[0, -1] / 0.7
    key = jax.random.key(0)

    def drawn(**options):
        tokens = lorax_hf.generate(
            fn, params, ids, max_new_tokens=1, do_sample=True, temperature=0.7, rng=key, **options
        )
        return np.bincount(np.asarray(tokens[:, -1]), minlength=199) / len(ids)

    expected = np.asarray(jax.nn.softmax(logits))
    assert np.abs(drawn() - expected).max() < 0.05
    order = np.argsort(-expected)
    few = drawn(top_k=3)
    assert set(np.flatnonzero(few)) == set(order[:3])
    np.testing.assert_allclose(
        few[order[:3]], expected[order[:3]] / expected[order[:3]].sum(), atol=0.06
    )
    kept = int(np.searchsorted(np.cumsum(expected[order]), 0.3)) + 1
    assert set(np.flatnonzero(drawn(top_p=0.3))) == set(order[:kept])
    assert set(np.flatnonzero(drawn(top_p=1e-9))) == {order[0]}
    same = [
        lorax_hf.generate(fn, params, IDS, max_new_tokens=5, do_sample=True, rng=key) for _ in "ab"
    ]
    np.testing.assert_array_equal(*same)


def test_generate_compiles_once():
    model = tiny_torch.randomized_causal("llama")
    fn, params = lorax_hf.from_torch(model)
    for _ in range(2):
        lorax_hf.generate(fn, params, IDS, max_new_tokens=4)
    assert [program._cache_size() for program in fn.programs.values()] == [1]
    compiled = jax.jit(lambda p, ids: lorax_hf.generate(fn, p, ids, max_new_tokens=4))
    np.testing.assert_array_equal(
        compiled(params, jnp.asarray(IDS)), lorax_hf.generate(fn, params, IDS, max_new_tokens=4)
    )


def test_lengths_beyond_the_positions_raise_or_warn():
    fn, params = lorax_hf.from_torch(tiny_torch.causal("gpt2", n_positions=9))
    with pytest.raises(ValueError, match="are 10 tokens, and GPT2LMHeadModel has positions for 9"):
        lorax_hf.generate(fn, params, IDS, max_new_tokens=3)
    fn, params = lorax_hf.from_torch(tiny_torch.causal("llama", max_position_embeddings=9))
    with pytest.warns(lorax_hf.ModuleWarning, match="positions for 9"):
        lorax_hf.generate(fn, params, IDS, max_new_tokens=3)


REFUSED = {
    "mamba": (
        lambda: transformers.MambaForCausalLM(
            transformers.MambaConfig(
                hidden_size=16, num_hidden_layers=1, vocab_size=31, state_size=4
            )
        ),
        r"MambaForCausalLM \(mamba\) keeps a state other than keys and values",
    ),
    "t5": (
        lambda: transformers.T5ForConditionalGeneration(
            transformers.T5Config(
                d_model=16, d_kv=4, d_ff=24, num_layers=1, num_heads=4, vocab_size=31
            )
        ),
        "is an encoder-decoder model",
    ),
    "bert": (
        lambda: transformers.BertLMHeadModel(
            transformers.BertConfig(
                hidden_size=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                intermediate_size=24,
                vocab_size=31,
            )
        ),
        "BertLMHeadModel is an encoder.*`is_decoder=True`",
    ),
    "gpt_neo": (
        lambda: transformers.GPTNeoForCausalLM(
            transformers.GPTNeoConfig(
                hidden_size=16,
                num_layers=1,
                attention_types=[[["global"], 1]],
                num_heads=2,
                vocab_size=31,
            )
        ),
        r"GPTNeoForCausalLM \(gpt_neo\) computes its mask from the length of its cache",
    ),
    "linear": (lambda: torch.nn.Linear(2, 2), "Linear is not a model of transformers"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_models_raise(name):
    make, message = REFUSED[name]
    fn, params = lorax_hf.from_torch(make())
    with pytest.raises(lorax_hf.StaticCacheError, match=message):
        lorax_hf.generate(fn, params, IDS, max_new_tokens=2)


def test_invalid_arguments_raise():
    fn, params = lorax_hf.from_torch(tiny_torch.causal("llama"))
    with pytest.raises(TypeError, match="the function that `from_torch`"):
        lorax_hf.generate(lambda p, x: x, params, IDS, max_new_tokens=2)
    with pytest.raises(ValueError, match=r"integers of shape \[batch, length\], not int32 \(7,\)"):
        lorax_hf.generate(fn, params, IDS[0], max_new_tokens=2)
    with pytest.raises(ValueError, match="max_new_tokens=0"):
        lorax_hf.generate(fn, params, IDS, max_new_tokens=0)
    with pytest.raises(ValueError, match="have no prompt to continue"):
        lorax_hf.generate(fn, params, IDS[:, :0], max_new_tokens=2)
    drops, _ = lorax_hf.from_torch(tiny_torch.causal("llama"), train=True)
    with pytest.raises(TypeError, match="is in training mode"):
        lorax_hf.generate(drops, params, IDS, max_new_tokens=2)
    with pytest.raises(TypeError, match="do_sample=True needs `rng=`"):
        lorax_hf.generate(fn, params, IDS, max_new_tokens=2, do_sample=True)
    for name, value in (("temperature", 0.0), ("top_k", 0), ("top_p", 0.0), ("top_p", 1.5)):
        settings = {"do_sample": True, "rng": jax.random.key(0), name: value}
        with pytest.raises(ValueError, match=f"{name}={value} must be "):
            lorax_hf.generate(fn, params, IDS, max_new_tokens=2, **settings)
