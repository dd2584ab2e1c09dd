"""Tests of examples/finetune/minilm.py with a tiny random BERT, without its downloads."""

import importlib
import json
import pathlib
import random
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import tokenizers
import transformers
from tokenizers import models, normalizers, pre_tokenizers, processors

import lorax_hf
from lorax_io import save_merged

FOLDER = pathlib.Path(__file__).parents[1] / "examples" / "finetune"
GOOD, BAD, OTHER = ("fine", "lovely", "great"), ("dull", "flat", "bland"), ("a", "film", "plot")
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *GOOD, *BAD, *OTHER]


@pytest.fixture(scope="module")
def minilm():
    """The program as a module, with the modules in its folder."""
    sys.path.insert(0, str(FOLDER))
    try:
        return importlib.import_module("minilm")
    finally:
        sys.path.remove(str(FOLDER))


@pytest.fixture(scope="module")
def model():
    config = transformers.BertConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        initializer_range=0.3,
    )
    return transformers.FlaxBertModel(config, seed=3)


@pytest.fixture
def folder(model, tmp_path):
    """A folder with the model in PyTorch's format, and its tokenizer."""
    folder = tmp_path / "model"
    blank = jax.tree.map(lambda leaf: None, model.params)
    names = lorax_hf.peft_names(model)
    save_merged(folder, model.params, blank, names, config=model.config.to_dict())
    vocabulary = {word: index for index, word in enumerate(WORDS)}
    tokenizer = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.enable_padding(length=128)
    tokenizer.enable_truncation(4)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def edit_weights(folder, edit):
    """Applies `edit` to the tensors of the weights file."""
    path = folder / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    edit(tensors)
    safetensors.numpy.save_file(tensors, path, metadata={"format": "pt"})


def test_every_parameter_is_loaded(minilm, model, folder):
    buffer = {"embeddings.position_ids": np.arange(512)[None]}
    edit_weights(folder, lambda tensors: tensors.update(buffer))
    loaded, tokenizer = minilm.load(folder)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, model.params)
    assert tokenizer.encode("A film: lovely!").tokens == [
        *("[CLS]", "a", "film", "[UNK]", "lovely", "[UNK]", "[SEP]")
    ]


KERNEL = "encoder.layer.1.attention.self.query.weight"


@pytest.mark.parametrize(
    "edit, message",
    [
        (lambda tensors: tensors.pop(KERNEL), f"does not contain {KERNEL}"),
        (
            lambda tensors: tensors.update({"cls.weight": np.ones(3)}),
            "contains the unknown cls.weight",
        ),
    ],
    ids=["missing", "extra"],
)
def test_missing_or_unknown_tensors_raise(minilm, folder, edit, message):
    edit_weights(folder, edit)
    with pytest.raises(minilm.LoadError, match=message):
        minilm.load(folder)


def test_different_weights_raise(minilm, model, folder):
    edit_weights(folder, lambda tensors: tensors.update({KERNEL: tensors[KERNEL].T.copy()}))
    with pytest.raises(minilm.LoadError, match=f"differs from the model in {KERNEL}"):
        minilm.check_weights(model, folder / "model.safetensors")


def test_padding_does_not_change_embeddings(minilm, model):
    embed = minilm.mean_embedding(model)
    tokens = np.array([[2, 4, 10, 9, 3]])
    alone = embed(model.params, tokens, np.array([4]))
    padded = np.pad(tokens, ((0, 1), (0, 4)))  # the second row is all padding
    both = embed(model.params, padded, np.array([4, 0]))
    np.testing.assert_allclose(both[:1], alone, rtol=1e-4, atol=1e-5)
    assert np.isfinite(both).all()
    outputs = model(tokens).last_hidden_state
    np.testing.assert_allclose(alone, np.mean(outputs, axis=1), rtol=1e-4, atol=1e-5)


def test_probe_minimizes_its_loss(minilm):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 5)).astype(np.float32)
    positive = x[:, 0] + rng.normal(size=200) > 0.5
    head = minilm.fit_probe(x, positive)

    def loss(head):
        margins = x @ head["weight"] + head["bias"]
        losses = jnp.logaddexp(0, jnp.where(positive, -margins, margins))
        return jnp.mean(losses) + 3e-3 * jnp.sum(head["weight"] ** 2)

    for gradient in jax.tree.leaves(jax.grad(loss)(head)):
        np.testing.assert_allclose(gradient, 0, atol=1e-4)


@pytest.fixture
def run(minilm, folder, tmp_path, monkeypatch):
    """`run(*arguments)`: runs the program with local files instead of downloads."""
    rng = random.Random(0)
    rows = []
    for number in range(1400):
        positive = rng.random() < 0.5
        words = [*rng.choices(OTHER, k=rng.randint(1, 26)), rng.choice(GOOD if positive else BAD)]
        rng.shuffle(words)
        rows.append(f"{number}\t{2 if positive else -2}\t{' '.join(words)}\n")
    (tmp_path / "reviews.txt").write_text("".join(rows))
    files = {
        minilm.MINILM: [folder / asset.name for asset in minilm.MINILM],
        (minilm.REVIEWS,): [tmp_path / "reviews.txt"],
    }
    monkeypatch.setattr(minilm, "download", lambda assets, cache: files[tuple(assets)])
    fixed = ["--out", str(tmp_path / "out"), "--steps", "12", "--limit-eval", "60", "--rank", "2"]
    return lambda *arguments: minilm.main([*fixed, *arguments])


def test_example_trains_and_saves(minilm, run, tmp_path, capsys):
    assert run() == 0
    config = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (2, 16)
    assert config["base_model_name_or_path"] == minilm.BASE
    assert len(config["target_modules"]) == 2 * 6  # six in each layer
    head = safetensors.numpy.load_file(tmp_path / "out" / "head.safetensors")
    assert head["weight"].shape == (32,) and head["bias"].shape == ()


def test_modified_adapter_fails_the_check(minilm, run, monkeypatch):
    load_peft = minilm.load_peft

    def halved(*args):
        frozen, tunable = load_peft(*args)
        return frozen, jax.tree.map(lambda leaf: leaf / 2, tunable)

    monkeypatch.setattr(minilm, "load_peft", halved)
    assert run("--steps", "2") == 1


def test_wrong_weights_exit_with_an_error(run, folder):
    edit_weights(folder, lambda tensors: tensors.pop(KERNEL))
    assert run() == 1
