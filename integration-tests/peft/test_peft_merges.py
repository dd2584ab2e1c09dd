"""`lorax merge` on models of transformers writes models with PEFT's outputs."""

import copy
import json
import warnings

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

from lorax_io._command import main

TOKENS = torch.tensor([[1, 5, 9, 2, 7]])
SMALL = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}  # fmt: skip


def make(cls=LlamaForCausalLM, **config):
    torch.manual_seed(0)
    return cls(LlamaConfig(**SMALL, **config)).eval()


def adapted(model, folder, config, **options):
    """Saves a PEFT model with random factors to a folder, and returns it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft_model = get_peft_model(copy.deepcopy(model), config)
        numbers = torch.Generator().manual_seed(1)
        for parameter in peft_model.parameters():
            if parameter.requires_grad:
                parameter.data = torch.randn(parameter.shape, generator=numbers) / 10
        peft_model.save_pretrained(folder, **options)
    return peft_model.eval()


def logits(model):
    with torch.no_grad():
        return model(TOKENS).logits.numpy()


def merged(tmp_path, cls=AutoModelForCausalLM):
    base, out = str(tmp_path / "base"), str(tmp_path / "merged")
    assert main(["merge", str(tmp_path / "adapter"), "--base", base, "--out", out]) == 0
    return cls.from_pretrained(out).eval()


def assert_close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("both", [False, True], ids=["one tensor", "both tensors"])
def test_untied_head_is_saved(tmp_path, both):
    base = make(tie_word_embeddings=True)
    base.save_pretrained(tmp_path / "base")
    if both:
        file = tmp_path / "base" / "model.safetensors"
        tensors = load_file(file)
        head = {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
        save_file(tensors | head, file, {"format": "pt"})
    config = LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "lm_head"])
    model = adapted(base, tmp_path / "adapter", config)
    merged_model = merged(tmp_path)
    assert merged_model.config.tie_word_embeddings is False
    assert_close(logits(merged_model), logits(model))
    assert np.abs(logits(base) - logits(model)).max() > 1e-3


def test_sequence_classifier_of_old_peft_is_merged(tmp_path):
    base = make(LlamaForSequenceClassification, num_labels=3)
    base.save_pretrained(tmp_path / "base")
    config = LoraConfig(r=3, target_modules=["q_proj"], task_type=TaskType.SEQ_CLS)
    model = adapted(base, tmp_path / "adapter", config)
    file = tmp_path / "adapter" / "adapter_config.json"
    # PEFT 0.10 does not list the head.
    file.write_text(json.dumps(json.loads(file.read_text()) | {"modules_to_save": None}))
    reloaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter").eval()
    assert_close(logits(reloaded), logits(model))
    assert_close(logits(merged(tmp_path, AutoModelForSequenceClassification)), logits(model))


def test_resized_vocabulary_is_merged(tmp_path):
    base = make(tie_word_embeddings=False)
    base.resize_token_embeddings(64)
    base.save_pretrained(tmp_path / "base")
    resized = copy.deepcopy(base)
    with torch.no_grad():
        resized.get_input_embeddings().weight[61:] += 1
        resized.get_output_embeddings().weight[61:] += 1
    config = LoraConfig(r=3, target_modules=["q_proj"])
    model = adapted(resized, tmp_path / "adapter", config, save_embedding_layers=True)
    assert_close(logits(merged(tmp_path)), logits(model))
    assert np.abs(logits(base) - logits(model)).max() > 1e-3
