"""Files with torchtune's names: detected by their keys, and read with a given alpha."""

import json

import numpy as np
import pytest
import safetensors.numpy

from lorax_io import AdapterError, AdapterWarning, Linear, load_any, open_adapter

MODULES = {"layers.0.attn.output_proj": (6, 4), "layers.0.mlp.w1": (5, 4)}
NAMES = {name: Linear(name) for name in MODULES}


def tensors(files, modules=MODULES):
    return {
        f"{name}.lora_{side}.weight": files.draw(*shape)
        for name, (fan_out, fan_in) in modules.items()
        for side, shape in (("a", (2, fan_in)), ("b", (fan_out, 2)))
    }


def save(file, arrays, config=None):
    safetensors.numpy.save_file(arrays, file)
    if config is not None:
        file.with_name("adapter_config.json").write_text(json.dumps(config))


def test_factors_are_read_with_the_given_alpha(tmp_path, shell, files):
    arrays = tensors(files)
    save(tmp_path / "a.safetensors", arrays)
    params = {name: np.zeros(shape[::-1], np.float32) for name, shape in MODULES.items()}
    pair = load_any(tmp_path / "a.safetensors", params, NAMES, alpha=3)
    for name, row in pair.tunable.items():
        assert (row.rank, row.scale) == (2, 1.5)
        a, b = (arrays[f"{name}.lora_{side}.weight"] for side in "ab")
        np.testing.assert_array_equal(row.a, a.T)
        np.testing.assert_array_equal(row.b, b.T)
    text = shell.succeed("inspect a.safetensors --alpha 3")
    assert "format: torchtune" in text and "scale: 1.5" in text
    assert "`alpha=` in Python, `--alpha`" in shell.fail("inspect a.safetensors")


def test_alpha_is_read_from_the_config(tmp_path, files):
    file = tmp_path / "adapter_model.safetensors"
    save(file, tensors(files), {"r": 2, "lora_alpha": 5, "target_modules": ["o_proj"]})
    for path in (tmp_path, file):
        opened = open_adapter(path)
        assert opened.format == "torchtune"
        assert {row.scale for row in opened.rows.values()} == {2.5}
    save(file, tensors(files), {"r": 2})
    with pytest.raises(AdapterError, match="no number `lora_alpha`"):
        open_adapter(tmp_path)


def test_rotated_modules_warn(tmp_path, files):
    save(tmp_path / "a.safetensors", tensors(files, {"layers.0.attn.q_proj": (6, 4)}))
    with pytest.warns(AdapterWarning, match="PEFT folder that torchtune also writes"):
        open_adapter(tmp_path / "a.safetensors", alpha=2)


SPOILED = {
    "another tensor": ({"layers.0.norm.scale": (4,)}, "is not a factor of torchtune"),
    "another rank": ({"layers.0.mlp.w1.lora_a.weight": (3, 4)}, "w1"),
    "one factor": ({"layers.0.mlp.w2.lora_a.weight": (2, 4)}, "w2"),
    "a vector": ({"layers.0.mlp.w1.lora_a.weight": (4,)}, "w1"),
}


@pytest.mark.parametrize("case", SPOILED)
def test_damaged_files_raise(tmp_path, files, case):
    changed, message = SPOILED[case]
    arrays = tensors(files) | {name: files.draw(*shape) for name, shape in changed.items()}
    save(tmp_path / "a.safetensors", arrays)
    with pytest.raises(AdapterError, match=message):
        open_adapter(tmp_path / "a.safetensors", alpha=2)
