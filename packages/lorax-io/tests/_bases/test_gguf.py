"""`load_base` of GGUF files: blocks, memory, and what llama.cpp's converter changes."""

import tracemalloc

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorax import Int8, QuantizedWeight, dequantize
from lorax_io import AdapterError, AdapterFileError, AdapterWarning, Linear, Tensor, load_base


# JAX 0.8 frees host memory that it has borrowed some time after the array is gone.
@pytest.mark.skipif(jax.__version_info__ < (0, 10), reason="JAX 0.8 holds two weights at times")
def test_memory_is_limited_by_the_largest_weight(tmp_path):
    """4-bit codes that are stored in another order."""
    file, side = tmp_path / "model.gguf", 4096
    bytes_of = side * side // 32 * 18
    data = np.random.default_rng(0).integers(0, 100, (side, side // 32 * 18), dtype=np.uint8)
    write_gguf(file, {"blk.0.attn_q.weight": (data, "Q4_0"), "blk.0.attn_k.weight": (data, "Q4_0")})
    names = {side: Linear(f"model.layers.0.self_attn.{side}_proj") for side in "qk"}
    load_base(file, names)  # what is imported and traced stays
    tracemalloc.start()
    loaded = load_base(file, names)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert loaded["q"].bits == 4.5
    assert peak <= 1.1 * bytes_of, peak / bytes_of


def write_gguf(path, tensors, arch="llama"):
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(1)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    for name, (data, kind) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_gguf_of_another_byte_order_raises(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "f", "llama", endianess=gguf.GGUFEndian.BIG)
    writer.add_block_count(1)
    writer.add_tensor("output.weight", np.ones((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(AdapterFileError, match="is of another byte order than this machine"):
        load_base(tmp_path / "f", {"head": Linear("output")})


def blocks(kind, out=32, inputs=512):
    """Blocks of random bytes in which every float16 is finite."""
    entries, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    random = np.random.default_rng(0)
    data = random.integers(0, 256, (out, inputs // entries * size), dtype=np.uint8)
    return data & 0xBB  # no exponent is all ones


KINDS = ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K"]


@pytest.mark.parametrize("kind", KINDS)
def test_gguf_blocks_are_decoded_like_llama_cpp(tmp_path, kind):
    data = blocks(kind)
    file = write_gguf(tmp_path / "f.gguf", {"blk.0.ffn_up.weight": (data, kind)})
    loaded = load_base(file, {"up": Linear("model.layers.0.mlp.up_proj")})["up"]
    expected = gguf.dequantize(data, gguf.GGMLQuantizationType[kind])
    assert np.isfinite(expected).all() and isinstance(loaded, QuantizedWeight)
    np.testing.assert_array_equal(np.asarray(dequantize(loaded)).T, expected)


def test_heads_that_groups_do_not_divide(tmp_path):
    data = blocks("Q4_K")
    file = write_gguf(tmp_path / "f.gguf", {"blk.0.attn_output.weight": (data, "Q4_K")})
    params = {"o": jnp.ones((8, 64, 32))}
    names = {"o": Linear("model.layers.0.self_attn.o_proj", in_axes=[0, 1])}
    with pytest.warns(AdapterWarning, match=r"shorter .*`o` \(5\.\d\d bits a weight\)"):
        loaded = load_base(file, names, params=params)["o"]
    expected = gguf.dequantize(data, gguf.GGMLQuantizationType.Q4_K)
    np.testing.assert_array_equal(dequantize(loaded).reshape(512, 32).T, expected)


def test_unsupported_gguf_types_raise(tmp_path):
    data = blocks("Q2_K")
    file = write_gguf(tmp_path / "f.gguf", {"blk.0.ffn_up.weight": (data, "Q2_K")})
    names = {"up": Linear("model.layers.0.mlp.up_proj")}
    with pytest.raises(
        AdapterError, match='`up` that cannot be kept: blocks of Q2_K.*requantize="nf4"'
    ):
        load_base(file, names)
    expected = gguf.dequantize(data, gguf.GGMLQuantizationType.Q2_K).T
    with pytest.warns(
        AdapterWarning, match=r"codes are not kept: `up` as int8, 0\.00\d+ from the file's"
    ):
        loaded = load_base(file, names, requantize=Int8(32))["up"]
    error = np.linalg.norm(dequantize(loaded) - expected) / np.linalg.norm(expected)
    assert 0 < error < 0.01
    with pytest.warns(
        AdapterWarning, match=r"codes are not kept: `up` \(as floats: blocks of Q2_K"
    ):
        np.testing.assert_array_equal(load_base(file, names, requantize="float")["up"], expected)


def test_changes_of_llama_cpp_converter_are_undone(tmp_path):
    norm = np.random.default_rng(0).normal(size=8).astype(np.float32)
    tensors = {"blk.0.attn_norm.weight": (norm, "F32")}
    names = {"norm": Tensor("model.layers.0.input_layernorm", parameter="weight")}
    file = tmp_path / "f.gguf"
    for arch in ("gemma2", "qwen2"):
        loaded = load_base(write_gguf(file, tensors, arch), names)["norm"]
        np.testing.assert_array_equal(loaded, norm - 1 if arch == "gemma2" else norm)
    with pytest.warns(AdapterWarning, match="architecture 'orion'. llama.cpp's converter may have"):
        load_base(write_gguf(file, tensors, "orion"), names)


@pytest.mark.parametrize("size", [4, 100, 2000])
def test_truncated_gguf_raises(tmp_path, size):
    file = write_gguf(tmp_path / "f.gguf", {"blk.0.ffn_up.weight": (blocks("Q8_0"), "Q8_0")})
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(AdapterFileError, match="is not a readable GGUF file"):
        load_base(file, {"up": Linear("model.layers.0.mlp.up_proj")})
