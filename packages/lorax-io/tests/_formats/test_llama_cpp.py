"""Adapters for llama.cpp, read by its `gguf` package."""

import json
import pathlib
import sys

import gguf
import jax.numpy as jnp
import numpy as np
import pytest

from lorax import LoraWeight
from lorax_io import (
    AdapterError,
    AdapterMismatchError,
    Conv,
    Embedding,
    Linear,
    UnsupportedAdapterError,
    save_adapter,
    save_gguf,
)

HEADS, KV_HEADS, WIDTH = 4, 2, 32
CONFIG = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
}
MODULES = {
    "model.layers.0.self_attn.q_proj": "blk.0.attn_q",
    "model.layers.1.self_attn.k_proj": "blk.1.attn_k",
    "model.layers.1.self_attn.v_proj": "blk.1.attn_v",
    "model.layers.0.mlp.down_proj": "blk.0.ffn_down",
    "lm_head": "output",
}
NAMES = {module: Linear(module) for module in MODULES}


def make(files, rank=3, alpha=6.0, dtype=jnp.float32, **other):
    ranks = {module: rank for module in MODULES} | other
    draw = lambda *shape: jnp.asarray(files.draw(*shape), dtype)  # noqa: E731
    return {m: LoraWeight(draw(WIDTH, r), draw(r, 16), r, alpha) for m, r in ranks.items()}


def read(file):
    reader = gguf.GGUFReader(file)
    fields = {name: reader.fields[name].contents() for name in reader.fields}
    return fields, {tensor.name: np.array(tensor.data) for tensor in reader.tensors}


def unpermuted(rows, heads):
    """The inverse of the permutation of q and k rows in llama.cpp's converter."""
    out, rest = rows.shape
    return rows.reshape(heads, out // heads // 2, 2, rest).swapaxes(1, 2).reshape(out, rest)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_gguf_reads_names_and_factors(files, dtype):
    tunable = make(files, dtype=jnp.dtype(dtype))
    save_gguf("a.gguf", tunable, NAMES, config=CONFIG)
    fields, tensors = read("a.gguf")
    assert fields["general.type"] == "adapter" and fields["general.architecture"] == "llama"
    assert fields["adapter.type"] == "lora" and fields["adapter.lora.alpha"] == 6
    assert tensors.keys() == {f"{x}.weight.lora_{k}" for x in MODULES.values() for k in "ab"}
    for module, name in MODULES.items():
        a, b = (tensors[f"{name}.weight.lora_{k}"].astype(np.float32) for k in "ab")
        np.testing.assert_array_equal(a, tunable[module].a.T.astype(np.float32))
        if "attn_q" in name or "attn_k" in name:
            b = unpermuted(b, HEADS if "attn_q" in name else KV_HEADS)
        np.testing.assert_array_equal(b, tunable[module].b.T.astype(np.float32))


def test_zero_alpha_is_folded_into_b(files):
    """llama.cpp reads an alpha of 0 as a scale of 1."""
    save_gguf("a.gguf", make(files, alpha=0.0), NAMES, config=CONFIG)
    fields, tensors = read("a.gguf")
    assert fields["adapter.lora.alpha"] == 3
    assert not any(tensors[f"{name}.weight.lora_b"].any() for name in MODULES.values())


def test_nonfinite_factors_raise(files):
    tunable = make(files)
    tunable["lm_head"] = tunable["lm_head"].with_factors(
        {"a": jnp.full((WIDTH, 3), jnp.nan), "b": tunable["lm_head"].b}
    )
    with pytest.raises(AdapterError, match="`lm_head.lora_A.weight` holds NaN"):
        save_gguf("a.gguf", tunable, NAMES, config=CONFIG)
    assert not pathlib.Path("a.gguf").exists()


def test_rows_of_other_models_are_not_permuted(files):
    tunable = make(files)
    save_gguf("a.gguf", tunable, NAMES, config=CONFIG | {"model_type": "qwen2"})
    _, tensors = read("a.gguf")
    for module, name in MODULES.items():
        np.testing.assert_array_equal(tensors[f"{name}.weight.lora_b"], tunable[module].b.T)


def test_several_scales_are_folded(files):
    tunable = make(files, **{"lm_head": 2})
    save_gguf("a.gguf", tunable, NAMES, config=CONFIG)
    fields, tensors = read("a.gguf")
    for module, name in (("lm_head", "output"), ("model.layers.0.mlp.down_proj", "blk.0.ffn_down")):
        a, b = (tensors[f"{name}.weight.lora_{k}"] for k in "ab")
        scale = fields["adapter.lora.alpha"] / a.shape[0]  # in llama.cpp's layout
        row = tunable[module]
        np.testing.assert_allclose(scale * (b @ a), row.scale * (row.a @ row.b).T, rtol=1e-5)


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ({"model_type": "t5"}, UnsupportedAdapterError, "type 't5'"),
        ({"model_type": None}, UnsupportedAdapterError, "type None"),
        ({"num_hidden_layers": "2"}, AdapterMismatchError, "num_hidden_layers = '2'"),
        ({"num_hidden_layers": 10**9}, AdapterMismatchError, "not a count"),
        ({"num_attention_heads": 3}, AdapterMismatchError, "are not 3 heads"),
        ({"num_hidden_layers": 1}, AdapterMismatchError, "no tensor for `model.layers.1"),
    ],
)
def test_unsupported_configs_raise(files, tmp_path, config, error, message):
    with pytest.raises(error, match=message):
        save_gguf("a.gguf", make(files), NAMES, config=CONFIG | config)
    assert list(tmp_path.iterdir()) == []


def test_kinds_that_llama_cpp_cannot_store_raise(files, tmp_path):
    row = make(files)["lm_head"]
    for torch_name in (Linear("model.other"), Embedding("model.embed_tokens"), Conv("conv")):
        with pytest.raises((AdapterMismatchError, UnsupportedAdapterError)):
            save_gguf("a.gguf", {"x": row}, {"x": torch_name}, config=CONFIG)
    with pytest.raises(UnsupportedAdapterError):
        save_gguf("a.gguf", {"x": jnp.ones((3, 4))}, {"x": Linear("lm_head")}, config=CONFIG)
    assert list(tmp_path.iterdir()) == []


def test_command_writes_gguf(shell, files):
    save_adapter("a.safetensors", {"lm_head/kernel": make(files)["lm_head"]})
    assert "--model-config" in shell.fail("convert a.safetensors a.gguf --to gguf")
    pathlib.Path("config.json").write_text(json.dumps(CONFIG))
    shell.succeed("convert a.safetensors a.gguf --to gguf --model-config config.json")
    assert read("a.gguf")[1].keys() == {"output.weight.lora_a", "output.weight.lora_b"}
    assert "GGUF" in shell.fail("inspect a.gguf")


def test_missing_gguf_package_raises(files, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match=r"lorax-io\[gguf\]"):
        save_gguf("a.gguf", make(files), NAMES, config=CONFIG)
