"""Tied heads: an adapted head is saved as a separate weight, and the config is updated."""

import json
import pathlib

import numpy as np
import pytest
import safetensors.numpy

import lorax
from lorax_io import AdapterWarning, Embedding, Linear, UnsupportedAdapterError, save_merged

Q, TABLE, HEAD = "model.layers.0.self_attn.q_proj", "model.embed_tokens", "lm_head"


def write(files, config, *, head: bool, table="random"):
    tensors = {f"{Q}.weight": files.draw(6, 5), f"{TABLE}.weight": files.draw(11, 5)}
    if head:
        tensors[f"{HEAD}.weight"] = tensors[f"{TABLE}.weight"].copy()
    files.base(tensors, config)
    return tensors


def adapt(files, module=HEAD):
    if module == HEAD:
        factors = files.pair(HEAD, 11, 5)
        delta = factors[f"{HEAD}.lora_B.weight"] @ factors[f"{HEAD}.lora_A.weight"]
    else:
        factors = {
            f"{TABLE}.lora_embedding_A": files.draw(2, 11),
            f"{TABLE}.lora_embedding_B": files.draw(5, 2),
        }
        delta = (factors[f"{TABLE}.lora_embedding_B"] @ factors[f"{TABLE}.lora_embedding_A"]).T
    files.peft(files.pair(Q, 6, 5) | factors, target_modules=["q_proj", module.rpartition(".")[2]])
    return 2 * delta


def config_of(folder):
    return json.loads(pathlib.Path(folder, "config.json").read_text())


@pytest.mark.parametrize("head", [True, False], ids=["both tensors", "one tensor"])
@pytest.mark.parametrize(
    "config",
    [
        {"tie_word_embeddings": True, "model_type": "llama"},
        {"model_type": "gpt2"},
        {"text_config": {"tie_word_embeddings": True}, "tie_word_embeddings": False},
    ],
    ids=["tied", "not in the config", "tied in the text config"],
)
def test_adapted_head_is_untied(shell, files, head, config):
    base = write(files, config, head=head)
    delta = adapt(files)
    shell.succeed("merge adapter --base base --out merged", warning="tie_word_embeddings = false")
    merged = files.read("merged/model.safetensors")
    np.testing.assert_array_equal(merged[f"{TABLE}.weight"], base[f"{TABLE}.weight"])
    expected = base[f"{TABLE}.weight"] + delta
    np.testing.assert_allclose(merged[f"{HEAD}.weight"], expected, rtol=1e-6)
    written = config_of("merged")
    assert written["tie_word_embeddings"] is False
    assert written.get("text_config", {}).get("tie_word_embeddings", False) is False
    assert config_of("base") == config


def test_untied_head_leaves_the_config(shell, files):
    config = {"tie_word_embeddings": False}
    write(files, config, head=True)
    adapt(files)
    shell.succeed("merge adapter --base base --out merged")
    assert config_of("merged") == config


def test_new_head_is_in_the_index(shell, files):
    write(files, {"tie_word_embeddings": True}, head=False)
    base = pathlib.Path("base")
    (base / "model.safetensors").rename(base / "model-00001-of-00001.safetensors")
    weight_map = {f"{x}.weight": "model-00001-of-00001.safetensors" for x in (Q, TABLE)}
    index = {"metadata": {"total_size": 340}, "weight_map": weight_map}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    adapt(files)
    shell.succeed("merge adapter --base base --out merged", warning="tie_word_embeddings")
    index = json.loads(pathlib.Path("merged/model.safetensors.index.json").read_text())
    assert index["weight_map"] == weight_map | {
        f"{HEAD}.weight": "model-00001-of-00001.safetensors"
    }
    assert index["metadata"]["total_size"] == 340 + 11 * 5 * 4


@pytest.mark.parametrize("config", [None, {"tie_word_embeddings": False}], ids=["none", "untied"])
def test_base_without_a_head_raises(shell, files, config):
    write(files, config, head=False)
    adapt(files)
    message = shell.fail("merge adapter --base base --out merged")
    assert "its embedding as its head" in message


def test_tied_head_with_scaled_outputs_raises(shell, files):
    write(files, {"tie_word_embeddings": True, "model_type": "t5"}, head=False)
    adapt(files)
    assert "scales its outputs" in shell.fail("merge adapter --base base --out merged")
    assert not pathlib.Path("merged").exists()


@pytest.mark.parametrize("head", [True, False], ids=["both tensors", "one tensor"])
def test_adapted_embedding_of_a_tied_model_warns(shell, files, head):
    write(files, {"tie_word_embeddings": True}, head=head)
    adapt(files, TABLE)
    shell.succeed(
        "merge adapter --base base --out merged", warning="its head is tied to its embedding"
    )
    assert config_of("merged") == {"tie_word_embeddings": True}


# save_merged

NAMES = {"q": Linear(Q), "embed": Embedding(TABLE), "head": Linear(HEAD)}


def save(files, config, **heads):
    params = {"q": files.draw(5, 6), "embed": files.draw(11, 5), "head": files.draw(5, 11)}
    params |= heads
    a, b = files.draw(5, 2), files.draw(2, 6)
    save_merged("merged", params, {"q": lorax.LoraWeight(a, b, rank=2)}, NAMES, config=config)
    return safetensors.numpy.load_file("merged/model.safetensors")


@pytest.mark.parametrize("config", [{"tie_word_embeddings": True}, {"model_type": "x"}])
def test_save_merged_unties_a_separate_head(files, config):
    with pytest.warns(AdapterWarning, match="tie_word_embeddings = false"):
        tensors = save(files, config)
    assert {f"{HEAD}.weight", f"{TABLE}.weight"} < tensors.keys()
    assert config_of("merged") == config | {"tie_word_embeddings": False}


def test_save_merged_keeps_a_tied_head(files):
    table = files.draw(11, 5)
    save(files, {"tie_word_embeddings": True}, embed=table, head=table.T)
    assert config_of("merged") == {"tie_word_embeddings": True}


def test_save_merged_of_a_model_with_scaled_outputs_raises(files):
    with pytest.raises(UnsupportedAdapterError, match="scales its outputs"):
        save(files, {"tie_word_embeddings": True, "model_type": "mt5"})
    assert not pathlib.Path("merged").exists()
