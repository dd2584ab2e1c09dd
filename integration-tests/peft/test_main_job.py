"""The adapter of the fine-tuning example in PyTorch, with the real weights."""

import functools
import importlib
import pathlib
import sys

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import lorax
from lorax import testing
from lorax_io import flax_names, load_peft, save_merged, save_peft

FOLDER = pathlib.Path(__file__).parents[2] / "examples" / "finetune"
TOLERANCE = 1e-4  # relative to the largest logit


@pytest.fixture(scope="module")
def base():
    """The parameters, configuration and model of the example."""
    sys.path.insert(0, str(FOLDER))
    try:
        download, model = (importlib.import_module(name) for name in ("download", "model"))
    finally:
        sys.path.remove(str(FOLDER))
    weights = download.fetch(download.WEIGHTS, download.cache_folder())
    params, config = model.load_llama(gguf.GGUFReader(weights))
    return params, config, functools.partial(model.next_token_logits, config=config)


def hf_config(params, config):
    """The model's `config.json`, from the shapes of its weights."""
    embedding = params["model"]["embed_tokens"]["embedding"]
    gate = params["model"]["layers"]["0"]["mlp"]["gate_proj"]["kernel"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": embedding.shape[0],
        "hidden_size": embedding.shape[1],
        "intermediate_size": gate.shape[1],
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "rope_theta": float(config.rope_theta),
        "rms_norm_eps": float(config.norm_eps),
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
    }


def test_peft_has_the_same_logits(base, tmp_path):
    params, config, model = base
    leaf = lorax.LoraSpec(rank=8, alpha=16)
    spec = lorax.spec_from_rules(params, [("*/self_attn/[qv]_proj/kernel", leaf)])
    frozen, tunable = lorax.init_lora(params, spec, jax.random.key(0))
    # As large as trained factors, which change the logits by half of their size.
    tunable = jax.tree.map(lambda x: x / 8, testing.random_factors(tunable, jax.random.key(1)))
    names = flax_names(params)
    save_peft(tmp_path / "adapter", tunable, names, task_type="CAUSAL_LM")
    blank = jax.tree.map(lambda leaf: None, params)
    save_merged(tmp_path / "base", params, blank, names, config=hf_config(params, config))
    save_merged(tmp_path / "merged", frozen, tunable, names, config=hf_config(params, config))

    tokens = np.array([[1, 504, 1743, 314, 260, 2240, 30], [1, 28, 39, 1, 7, 11, 13]])
    last = jnp.array([6, 6])
    plain = np.asarray(jax.jit(model)(params, tokens, last))
    expected = np.asarray(jax.jit(lorax.lora(model))((frozen, tunable), tokens, last))
    reloaded = load_peft(tmp_path / "adapter", params, names)
    np.testing.assert_array_equal(jax.jit(lorax.lora(model))(reloaded, tokens, last), expected)

    def logits(model):
        with torch.no_grad():
            return model(torch.from_numpy(tokens)).logits[:, -1].numpy()

    pretrained = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert_close(logits(pretrained), plain)
    assert np.abs(expected - plain).max() > 0.05 * np.abs(plain).max()
    assert_close(logits(PeftModel.from_pretrained(pretrained, tmp_path / "adapter")), expected)
    assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), expected)


def assert_close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=TOLERANCE * np.abs(expected).max())
