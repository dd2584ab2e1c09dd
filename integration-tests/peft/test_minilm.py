"""The adapter of all-MiniLM-L6-v2 in PyTorch, with the real weights."""

import importlib
import pathlib
import sys

import jax
import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import BertModel

import lorax
import lorax_hf
from lorax import testing
from lorax_io import save_peft

FOLDER = pathlib.Path(__file__).parents[2] / "examples" / "finetune"
TOLERANCE = 1e-4  # relative to the largest embedding
SENTENCES = [
    "The film is a delight.",
    "This movie is wonderful, and I loved all of it.",
    "Interest rates rose by a quarter of a point.",
]


@pytest.fixture(scope="module")
def base():
    """The example's module, and the model, the tokenizer and their folder."""
    sys.path.insert(0, str(FOLDER))
    try:
        minilm, download = (importlib.import_module(name) for name in ("minilm", "download"))
    finally:
        sys.path.remove(str(FOLDER))
    files = download.fetch_all(download.MINILM, download.cache_folder() / "all-MiniLM-L6-v2")
    return minilm, *minilm.load(files[0].parent), files[0].parent


def test_peft_has_the_same_embeddings(base, tmp_path):
    minilm, model, tokenizer, folder = base
    spec = lorax_hf.spec(model, rank=8, alpha=16, targets="all-linear", exclude=minilm.UNUSED)
    frozen, tunable = lorax.init_lora(model.params, spec, jax.random.key(0))
    tunable = jax.tree.map(lambda x: x / 8, testing.random_factors(tunable, jax.random.key(1)))
    save_peft(tmp_path, tunable, lorax_hf.peft_names(model), task_type="FEATURE_EXTRACTION")

    prompts = [tokenizer.encode(sentence).ids for sentence in SENTENCES]
    (rows, tokens, last), *_ = importlib.import_module("data").batches(prompts, len(prompts))
    plain = minilm.mean_embedding(model)(model.params, tokens, last)
    expected = minilm.mean_embedding(lorax_hf.lora(model))((frozen, tunable), tokens, last)

    def embeddings(model):
        model.eval()
        mask = torch.from_numpy((np.arange(tokens.shape[1]) <= last[:, None]).astype(np.int64))
        with torch.no_grad():
            outputs = model(torch.from_numpy(tokens), attention_mask=mask).last_hidden_state
        return ((outputs * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)).numpy()

    pretrained = BertModel.from_pretrained(folder)
    assert_close(embeddings(pretrained), plain)
    assert np.abs(expected - plain).max() > 0.05 * np.abs(plain).max()
    assert_close(embeddings(PeftModel.from_pretrained(pretrained, tmp_path)), expected)

    unit = np.asarray(plain)[np.argsort(rows)]
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    films, other = unit[0] @ unit[1], unit[2] @ unit[:2].T
    assert films > 0.4 > 0.2 > other.max()


def assert_close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=TOLERANCE * np.abs(expected).max())
