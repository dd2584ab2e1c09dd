"""Adapters merged into GGUF files, which the `gguf` package writes from transformers weights."""

import json
import pathlib

import gguf
import jax.numpy as jnp
import numpy as np
import pytest

from lorax_io._bases import outputs

WIDTH, HIDDEN, TOKENS, HEADS, KV_HEADS, LAYERS = 64, 96, 40, 4, 2, 2
Q8_0 = gguf.GGMLQuantizationType.Q8_0
STATED = {"num_hidden_layers": LAYERS, "hidden_size": WIDTH, "num_attention_heads": HEADS}


def shapes(arch, head=True):
    """The weights of a transformers model, and their names in llama.cpp."""
    kv = WIDTH // HEADS * KV_HEADS
    weights = {
        "model.embed_tokens.weight": ("token_embd.weight", (TOKENS, WIDTH)),
        "model.norm.weight": ("output_norm.weight", (WIDTH,)),
    }
    if head:
        weights["lm_head.weight"] = ("output.weight", (TOKENS, WIDTH))
    for k in range(LAYERS):
        rows = {
            "input_layernorm.weight": ("attn_norm.weight", (WIDTH,)),
            "self_attn.q_proj.weight": ("attn_q.weight", (WIDTH, WIDTH)),
            "self_attn.k_proj.weight": ("attn_k.weight", (kv, WIDTH)),
            "self_attn.v_proj.weight": ("attn_v.weight", (kv, WIDTH)),
            "self_attn.o_proj.weight": ("attn_output.weight", (WIDTH, WIDTH)),
            "post_attention_layernorm.weight": ("ffn_norm.weight", (WIDTH,)),
            "mlp.gate_proj.weight": ("ffn_gate.weight", (HIDDEN, WIDTH)),
            "mlp.up_proj.weight": ("ffn_up.weight", (HIDDEN, WIDTH)),
            "mlp.down_proj.weight": ("ffn_down.weight", (WIDTH, HIDDEN)),
        }
        if arch in ("qwen2", "llama"):  # llama with attention_bias
            rows |= {
                "self_attn.q_proj.bias": ("attn_q.bias", (WIDTH,)),
                "self_attn.k_proj.bias": ("attn_k.bias", (kv,)),
                "self_attn.v_proj.bias": ("attn_v.bias", (kv,)),
            }
        if arch == "qwen3":
            rows |= {
                "self_attn.q_norm.weight": ("attn_q_norm.weight", (WIDTH // HEADS,)),
                "self_attn.k_norm.weight": ("attn_k_norm.weight", (WIDTH // HEADS,)),
            }
        weights |= {
            f"model.layers.{k}.{name}": (f"blk.{k}.{own}", shape)
            for name, (own, shape) in rows.items()
        }
    return weights


def permuted(weight, heads):
    """The rows of q and k in the order of llama.cpp's converter."""
    pairs = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return pairs.swapaxes(1, 2).reshape(weight.shape)


def write(
    files, arch="llama", kind=Q8_0, head=True, extra=None, fields=(), layers=LAYERS, lost=None
):
    """Writes a model; returns its decoded weights by transformers' names."""
    writer = gguf.GGUFWriter("model.gguf", arch)
    writer.add_block_count(layers)
    writer.add_embedding_length(WIDTH)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    for key, value in fields:
        writer.add_uint16(key, value) if isinstance(value, int) else writer.add_string(key, value)
    weights = {}
    for name, (own, shape) in shapes(arch, head).items():
        array = files.draw(*shape)
        # Rows are quantized independently, so their order does not matter.
        used = gguf.GGMLQuantizationType.F32 if len(shape) == 1 else kind
        weights[name] = gguf.dequantize(gguf.quantize(array, used), used)
        heads = {"q_proj": HEADS, "k_proj": KV_HEADS}.get(name.split(".")[-2])
        if arch == "llama" and heads:
            array = permuted(array, heads)
        if own != lost:
            writer.add_tensor(own, gguf.quantize(array, used), raw_dtype=used)
    for own, array in (extra or {}).items():
        writer.add_tensor(own, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


def adapter(files, *modules, folder="adapter"):
    """Writes LoRA for the modules with these last names in all layers."""
    known = shapes("llama")
    tensors, ends = {}, modules or ("q_proj", "k_proj", "down_proj")
    for name, (_, shape) in known.items():
        module = name.removesuffix(".weight")
        if len(shape) == 2 and module.endswith(ends):
            tensors |= files.pair(module, *shape)
    files.peft(tensors, folder, target_modules=list(ends))
    return tensors


def merged(weights, tensors):
    """The weights plus twice the product of their factors, since alpha is 4 and the rank 2."""
    result = dict(weights)
    for name in weights:
        module = name.removesuffix(".weight")
        if f"{module}.lora_A.weight" in tensors:
            a, b = (tensors[f"{module}.lora_{k}.weight"] for k in "AB")
            result[name] = weights[name] + 2 * (b @ a)
    return result


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
def test_merge_equals_merging_into_decoded_weights(shell, files, arch):
    weights = write(files, arch)
    tensors = adapter(files)
    assert "fits model.gguf" in shell.succeed("verify adapter --base model.gguf")
    printed = shell.succeed("merge adapter --base model.gguf --out m --dtype float32")
    assert "only the weights are written" in printed and "in float32" in printed
    actual, expected = files.read("m/model.safetensors"), merged(weights, tensors)
    assert actual.keys() == expected.keys()
    for name, array in expected.items():
        if array is weights[name]:
            np.testing.assert_array_equal(actual[name], array, err_msg=name)
        np.testing.assert_allclose(actual[name], array, rtol=1e-6, atol=1e-6, err_msg=name)
    # The same checkpoint, merged in transformers' format.
    files.base(weights)
    shell.succeed("merge adapter --base base --out merged")
    in_transformers = files.read("merged/model.safetensors")
    assert all(np.array_equal(actual[name], x) for name, x in in_transformers.items())


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("Q8_0", jnp.bfloat16), ("BF16", jnp.bfloat16), ("F16", np.float16), ("F32", np.float32)],
)
def test_dtype_follows_the_file(shell, files, kind, dtype):
    weights = write(files, kind=gguf.GGMLQuantizationType[kind])
    tensors = adapter(files)
    shell.succeed("merge adapter --base model.gguf --out m")
    merged_tensors = files.read("m/model.safetensors")
    assert {array.dtype for array in merged_tensors.values()} == {np.dtype(dtype)}
    # Merged in float32, and rounded once.
    for name, array in merged(weights, tensors).items():
        error = np.abs(merged_tensors[name].astype(np.float32) - array)
        assert (error <= 0.51 * np.spacing(np.abs(array).astype(dtype)).astype(np.float32)).all()


def test_several_files_with_config_and_tokenizer(shell, files, monkeypatch):
    monkeypatch.setattr(outputs, "SHARD_BYTES", 40_000)
    write(files, head=False)
    adapter(files, "lm_head", "q_proj")
    config = {"model_type": "llama", "tie_word_embeddings": True, **STATED}
    pathlib.Path("config.json").write_text(json.dumps(config))
    pathlib.Path("tokenizer.json").write_text("{}")
    pathlib.Path("model.safetensors.index.json").write_text("{}")
    printed = shell.succeed("merge adapter --base model.gguf --out m", "tie_word_embeddings")
    assert "only the weights" not in printed
    assert json.loads(pathlib.Path("m/config.json").read_text())["tie_word_embeddings"] is False
    assert pathlib.Path("m/tokenizer.json").exists()
    index = json.loads(pathlib.Path("m/model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == shapes("llama").keys()
    shards = sorted(set(index["weight_map"].values()))
    assert len(shards) > 2
    sizes = 0
    for shard in shards:
        tensors_of_shard = files.read(f"m/{shard}")
        assert tensors_of_shard.keys() == {
            n for n, file in index["weight_map"].items() if file == shard
        }
        sizes += sum(array.nbytes for array in tensors_of_shard.values())
    assert index["metadata"]["total_size"] == sizes


@pytest.mark.parametrize(
    "command", ["verify a --base model.gguf", "merge a --base model.gguf --out m"]
)
def test_adapter_of_missing_tensors_raises(shell, files, tmp_path, command):
    write(files, head=False)
    adapter(files, "lm_head", folder="a")
    assert "put a config.json next to it" in shell.fail(command)
    tensors = files.pair("model.layers.7.self_attn.q_proj", WIDTH, WIDTH)
    files.peft(tensors, "a", target_modules=["q_proj"])
    assert "model.layers.7.self_attn.q_proj" in shell.fail(command)
    assert {path.name for path in tmp_path.iterdir()} == {"a", "model.gguf"}


ODD = np.ones((2, 32), np.float32)


@pytest.mark.parametrize(
    ("made", "word"),
    [
        ({"arch": "gemma"}, "architecture 'gemma'"),
        ({"arch": "granite"}, "Hugging Face checkpoint"),
        ({"arch": "of-tomorrow"}, "'of-tomorrow', which the gguf package does not know"),
        ({"extra": {"blk.0.ffn_gate_exps.weight": ODD}}, "blk.0.ffn_gate_exps.weight"),
        ({"extra": {"rope_freqs.bias": ODD.astype(np.int32)}}, "rope_freqs.bias"),
        ({"extra": {"output_norm.bias": np.ones(64, np.int32)}}, "type I32"),
        ({"extra": {"output_norm.bias": np.full(64, np.nan, np.float32)}}, "NaN"),
        ({"layers": 2**31}, "block_count = 2147483648"),
        ({"layers": 1}, "blk.1."),
        ({"layers": 3}, "lacks `blk.2."),
        ({"lost": "blk.1.attn_v.weight"}, "lacks `blk.1.attn_v.weight`"),
        ({"lost": "output_norm.weight"}, "not a complete model"),
        ({"fields": [("split.count", 3)]}, "one of 3 parts"),
        ({"fields": [("general.type", "adapter")]}, "the type 'adapter'"),
    ],
)
def test_unsupported_gguf_files_raise(shell, files, tmp_path, made, word):
    write(files, **made)
    adapter(files)
    assert word in shell.fail("merge adapter --base model.gguf --out m")
    assert {path.name for path in tmp_path.iterdir()} == {"adapter", "model.gguf"}


@pytest.mark.parametrize("left", [0.02, 0.5, 0.999])
def test_truncated_gguf_raises(shell, files, tmp_path, left):
    write(files)
    adapter(files)
    file = pathlib.Path("model.gguf")
    file.write_bytes(file.read_bytes()[: int(left * file.stat().st_size)])
    assert "is not a readable GGUF file" in shell.fail("merge adapter --base model.gguf --out m")
    assert {path.name for path in tmp_path.iterdir()} == {"adapter", "model.gguf"}


@pytest.mark.parametrize(
    ("config", "word"),
    [
        ({"model_type": "qwen2"}, "of a qwen2 model"),
        ({"model_type": "llama", "num_hidden_layers": 3}, "num_hidden_layers = 3"),
        ({"model_type": "llama", "num_key_value_heads": 4}, "attention.head_count_kv = 2"),
        ({"model_type": ["llama"], "tie_word_embeddings": None}, "tie_word_embeddings = true"),
    ],
)
def test_mismatched_config_raises(shell, files, config, word):
    write(files, head=False)
    adapter(files)
    pathlib.Path("config.json").write_text(json.dumps(config))
    assert word in shell.fail("verify adapter --base model.gguf")


def test_incompatible_options_raise(shell, files):
    weights = write(files)
    adapter(files)
    files.base(weights)
    assert "--requantize" in shell.fail("merge adapter --base model.gguf --out m --requantize")
    assert "--dtype is only for" in shell.fail("merge adapter --base base --out m --dtype float32")
    pathlib.Path("folder").mkdir()
    pathlib.Path("model.gguf").rename("folder/model.gguf")
    assert "a file itself, such as model.gguf" in shell.fail("verify adapter --base folder")


def test_merge_beyond_float16_raises(shell, files, tmp_path):
    write(files, extra={"output_norm.bias": np.full(64, 1e6, np.float32)})
    adapter(files)
    assert "float16" in shell.fail("merge adapter --base model.gguf --out m --dtype float16")
    assert not (tmp_path / "m").exists()


def test_rope_factors_are_not_written(shell, files):
    write(files, extra={"rope_freqs.weight": np.ones(8, np.float32)})
    adapter(files)
    shell.succeed("merge adapter --base model.gguf --out m", "rope_freqs.weight")
    assert files.read("m/model.safetensors").keys() == shapes("llama").keys()
