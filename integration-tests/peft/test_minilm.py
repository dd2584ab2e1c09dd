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
TOLERANCE = 1e-4  # of the largest embedding
SENTENCES = [
    "The film is a delight.",
    "This movie is wonderful, and I loved all of it.",
    "Interest rates rose by a quarter of a point.",
]


@pytest.fixture(scope="module")
def base():
    """Program, model, tokenizer, and the folder that they are from."""
    sys.path.insert(0, str(FOLDER))
    try:
        minilm, download = (importlib.import_module(name) for name in ("minilm", "download"))
    finally:
        sys.path.remove(str(FOLDER))
    files = download.fetch_all(download.MINILM, download.cache_folder() / "all-MiniLM-L6-v2")
    return minilm, *minilm.load(files[0].parent), files[0].parent


def test_peft_gives_the_same_embeddings(base, tmp_path):
    minilm, model, tokenizer, folder = base
    spec = lorax_hf.spec(model, rank=8, alpha=16, targets="all-linear", exclude=minilm.UNUSED)
    frozen, tunable = lorax.init_lora(model.params, spec, jax.random.key(0))
    tunable = jax.tree.map(lambda x: x / 8, testing.random_factors(tunable, jax.random.key(1)))
    save_peft(tmp_path, tunable, lorax_hf.peft_names(model), task_type="FEATURE_EXTRACTION")

    prompts = [tokenizer.encode(sentence).ids for sentence in SENTENCES]
    (rows, tokens, last), *_ = importlib.import_module("data").batches(prompts, len(prompts))
    plain = minilm.mean_embedding(model)(model.params, tokens, last)
    ours = minilm.mean_embedding(lorax_hf.lora(model))((frozen, tunable), tokens, last)

    def embeddings(model):
        model.eval()
        mask = torch.from_numpy((np.arange(tokens.shape[1]) <= last[:, None]).astype(np.int64))
        with torch.no_grad():
            outputs = model(torch.from_numpy(tokens), attention_mask=mask).last_hidden_state
        return ((outputs * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)).numpy()

    pretrained = BertModel.from_pretrained(folder)
    close(embeddings(pretrained), plain)
    assert np.abs(ours - plain).max() > 0.05 * np.abs(plain).max()
    close(embeddings(PeftModel.from_pretrained(pretrained, tmp_path)), ours)

    unit = np.asarray(plain)[np.argsort(rows)]
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    films, other = unit[0] @ unit[1], unit[2] @ unit[:2].T
    assert films > 0.4 > 0.2 > other.max()


def close(theirs, ours):
    np.testing.assert_allclose(theirs, ours, rtol=0, atol=TOLERANCE * np.abs(ours).max())
