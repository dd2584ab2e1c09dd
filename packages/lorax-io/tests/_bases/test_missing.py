"""Incomplete adapters are rejected."""

import json
import pathlib

import numpy as np
import pytest

Q = "model.layers.{}.self_attn.q_proj"
UP = "model.layers.{}.mlp.up_proj"
HEAD, TABLE, SCORE = "lm_head", "model.embed_tokens", "score"


@pytest.fixture
def base(files):
    """Two layers, an embedding, a head, and weights that no adapter targets."""
    tensors = {f"{Q.format(k)}.weight": files.draw(6, 5) for k in range(2)}
    tensors |= {f"{UP.format(k)}.weight": files.draw(7, 5) for k in range(2)}
    tensors |= {f"{TABLE}.weight": files.draw(11, 5), f"{HEAD}.weight": files.draw(11, 5)}
    tensors |= {f"{SCORE}.weight": files.draw(3, 5), f"{SCORE}.bias": files.draw(3)}
    tensors |= {"model.norm.weight": files.draw(5)}
    files.base(tensors)
    return tensors


def q(files, *layers):
    return {k: x for layer in layers for k, x in files.pair(Q.format(layer), 6, 5).items()}


def up(files, *layers):
    return {k: x for layer in layers for k, x in files.pair(UP.format(layer), 7, 5).items()}


WHOLE = {
    "all layers": lambda files: (q(files, 0, 1), {"target_modules": ["q_proj"]}),
    "one layer": lambda files: (
        q(files, 1),
        {"target_modules": ["q_proj"], "layers_to_transform": [1]},
    ),
    "one excluded": lambda files: (
        q(files, 0),
        {"target_modules": ["q_proj"], "exclude_modules": ["layers.1.self_attn.q_proj"]},
    ),
    "full names": lambda files: (q(files, 1), {"target_modules": [Q.format(1)]}),
    "pattern": lambda files: (
        q(files, 1) | up(files, 0),
        {"target_modules": r".*(1\.self_attn\.q|0\.mlp\.up)_proj"},
    ),
    "all linear": lambda files: (q(files, 0, 1), {"target_modules": "all-linear"}),
    "by model type": lambda files: (q(files, 0, 1), {"target_modules": None}),
    "full head": lambda files: (
        q(files, 0, 1) | {f"{SCORE}.weight": files.draw(3, 5), f"{SCORE}.bias": files.draw(3)},
        {"target_modules": ["q_proj"], "modules_to_save": ["score"]},
    ),
    "head of the task": lambda files: (
        q(files, 0, 1) | {f"{SCORE}.weight": files.draw(3, 5), f"{SCORE}.bias": files.draw(3)},
        {"target_modules": ["q_proj"], "task_type": "SEQ_CLS"},
    ),
}


@pytest.mark.parametrize("case", WHOLE)
def test_complete_adapter_passes(shell, files, base, case):
    tensors, config = WHOLE[case](files)
    files.peft(tensors, **config)
    assert "OK, fits base" in shell.succeed("verify adapter --base base")
    shell.succeed("merge adapter --base base --out merged")


LACKING = {
    "a layer": lambda files: (q(files, 0), {"target_modules": ["q_proj"]}, Q.format(1)),
    "the first layer": lambda files: (q(files, 1), {"target_modules": ["q_proj"]}, Q.format(0)),
    "all modules of one name": lambda files: (
        q(files, 0, 1),
        {"target_modules": ["q_proj", "up_proj"]},
        UP.format(0),
    ),
    "by pattern": lambda files: (
        q(files, 0),
        {"target_modules": r"model\.layers\.\d\.self_attn\.q_proj"},
        Q.format(1),
    ),
    "from all linear": lambda files: (q(files, 0), {"target_modules": "all-linear"}, Q.format(1)),
    "by model type": lambda files: (q(files, 0), {"target_modules": None}, Q.format(1)),
    "a full module": lambda files: (
        q(files, 0, 1),
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        HEAD,
    ),
    "part of a full module": lambda files: (
        q(files, 0, 1) | {f"{SCORE}.weight": files.draw(3, 5)},
        {"target_modules": ["q_proj"], "modules_to_save": ["score"]},
        f"{SCORE}.bias",
    ),
    "the head of the task": lambda files: (
        q(files, 0, 1),
        {"target_modules": ["q_proj"], "task_type": "TOKEN_CLS"},
        SCORE,
    ),
    "an embedding": lambda files: (
        q(files, 0, 1),
        {"target_modules": ["q_proj", "embed_tokens"]},
        TABLE,
    ),
}


@pytest.mark.parametrize("case", LACKING)
@pytest.mark.parametrize(
    "command", ["verify adapter --base base", "merge adapter --base base --out m"]
)
def test_missing_tensors_are_named(shell, files, base, tmp_path, case, command):
    tensors, config, missing = LACKING[case](files)
    files.peft(tensors, **config)
    message = shell.fail(command)
    assert f"lacks the tensors of `{missing}" in message
    assert not (tmp_path / "m").exists()


def test_missing_tensors_can_be_allowed(shell, files, base):
    files.peft(q(files, 0), target_modules=["q_proj"])
    warning = f"lacks the tensors of `{Q.format(1)}.weight` of base"
    shell.succeed("verify adapter --base base --allow-missing", warning=warning)
    shell.succeed("merge adapter --base base --out merged --allow-missing", warning=warning)
    merged = files.read("merged/model.safetensors")
    same = {
        k: np.array_equal(merged[f"{Q.format(k)}.weight"], base[f"{Q.format(k)}.weight"])
        for k in (0, 1)
    }
    assert same == {0: False, 1: True}


def test_missing_tensors_with_another_prefix_are_reported(shell, files, base):
    bare = {name.removeprefix("model."): x for name, x in q(files, 0).items()}
    files.peft(bare, target_modules=r"layers\.\d\.self_attn\.q_proj")
    assert f"`{Q.format(1)}.weight`" in shell.fail("verify adapter --base base")


def test_missing_layers_are_listed_in_numerical_order(shell, files):
    files.base({f"{Q.format(k)}.weight": files.draw(6, 5) for k in range(12)})
    files.peft(q(files, 0), target_modules=["q_proj"])
    message = shell.fail("verify adapter --base base")
    assert f"`{Q.format(1)}.weight` of base, and 10 more" in message


EMPTY = {
    "no tensors": lambda files: {},
    "without layer numbers": lambda files: {name: np.zeros(0, np.float32) for name in q(files, 0)},
    "some without layer numbers": lambda files: (
        q(files, 0) | {f"{Q.format(1)}.lora_A.weight": files.draw(0, 5)}
    ),
}


@pytest.mark.parametrize("case", EMPTY)
@pytest.mark.parametrize("command", ["inspect", "verify", "convert --to native {} out", "diff {}"])
def test_empty_adapter_raises(shell, files, case, command):
    files.peft(EMPTY[case](files), target_modules=["q_proj"])
    words = command.format("adapter") if "{}" in command else f"{command} adapter"
    assert "ZeRO-3" in shell.fail(f"{words} adapter" if words.startswith("diff") else words)


def test_empty_native_adapter_raises(shell, files):
    from lorax_io import save_adapter

    save_adapter("a.safetensors", {})
    assert "has no tensors" in shell.fail("verify a.safetensors")


# Tensors that PEFT saves although `modules_to_save` does not contain them.


def test_resized_vocabulary_is_read_with_a_warning(shell, files, base):
    tables = {f"{TABLE}.weight": files.draw(11, 5), f"{HEAD}.weight": files.draw(11, 5)}
    files.peft(q(files, 0, 1) | tables, target_modules=["q_proj"])
    warning = f"has the whole of `{HEAD}.weight`"
    shell.succeed("merge adapter --base base --out merged", warning=warning)
    merged = files.read("merged/model.safetensors")
    for name, table in tables.items():
        np.testing.assert_array_equal(merged[name], table)


def test_mismatched_vocabulary_raises_with_explanation(shell, files, base):
    files.peft(q(files, 0, 1) | {f"{TABLE}.weight": files.draw(13, 5)}, target_modules=["q_proj"])
    assert "its vocabulary was resized" in shell.fail("verify adapter --base base")


@pytest.mark.parametrize("name", ["model.norm.weight", f"{UP.format(0)}.weight", f"{SCORE}.bias"])
def test_copies_of_base_weights_raise(shell, files, base, name):
    files.peft(q(files, 0, 1) | {name: files.draw(*base[name].shape)}, target_modules=["q_proj"])
    assert "would replace a base weight" in shell.fail("verify adapter --base base")


def test_all_biases_together_with_a_head(shell, files, base):
    bias = files.draw(3)
    head = {f"{SCORE}.weight": files.draw(3, 5), f"{SCORE}.bias": bias}
    copies = {f"{SCORE}.modules_to_save.bias": bias, f"{SCORE}.original_module.bias": files.draw(3)}
    settings = {"target_modules": ["q_proj"], "task_type": "SEQ_CLS", "bias": "all"}
    files.peft(q(files, 0, 1) | head | copies, **settings)
    shell.succeed("verify adapter --base base")
    shell.succeed("convert adapter out.safetensors --to native")
    tensors = files.read("out.safetensors")
    assert sorted(name for name in tensors if "score" in name) == ["score/bias", "score/weight"]
    np.testing.assert_array_equal(tensors["score/bias"], bias)
    settings["bias"] = "none"
    files.peft(q(files, 0, 1) | head | copies, **settings)
    shell.fail("verify adapter --base base")


SHAPES = [(), (2,), (2, 5, 1, 1, 1, 1)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    "key", ["lora_A.weight", "lora_B.weight", "lora_embedding_A", "lora_embedding_B"]
)
@pytest.mark.parametrize("command", ["inspect adapter", "verify adapter --base base"])
def test_malformed_factors_raise(shell, files, base, key, shape, command):
    tensors = q(files, 0, 1)
    if "embedding" in key:
        tensors |= {f"{TABLE}.lora_embedding_A": files.draw(2, 11)}
        tensors |= {
            f"{TABLE}.lora_embedding_B": files.draw(5, 2),
            f"{TABLE}.{key}": files.draw(*shape),
        }
    else:
        tensors |= {f"{Q.format(1)}.{key}": files.draw(*shape)}
    files.peft(tensors, target_modules=["q_proj", "embed_tokens"])
    shell.fail(command)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_malformed_bases_raise(shell, files, shape):
    files.base({f"{Q.format(0)}.weight": files.draw(*shape)})
    files.peft(q(files, 0), target_modules=["q_proj"])
    shell.fail("verify adapter --base base")


def test_config_of_the_base_must_be_an_object(shell, files, base):
    files.peft(q(files, 0, 1), target_modules=["q_proj"])
    pathlib.Path("base/config.json").write_text(json.dumps([1]))
    assert "config.json" in shell.fail("verify adapter --base base")
