"""Quantized bases that other libraries write are decoded bit for bit as by these libraries.

bitsandbytes, compressed-tensors, GPTQ (auto-gptq), AWQ (compressed-tensors' converter), MXFP4 of
transformers, and llama.cpp's `gguf` each write a weight and decode it.
"""

import importlib.util
import json
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import bitsandbytes as bnb
import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.torch
import torch
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.entrypoints.convert.converters.autoawq import AutoAWQConverter
from compressed_tensors.entrypoints.convert.converters.fp8block_dequantizer import (
    FP8BlockDequantizer,
)
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from transformers.integrations.mxfp4 import convert_moe_packed_tensors
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor

from lorax import QuantizedWeight, dequantize
from lorax_io import AdapterError, AdapterWarning, Experts, Linear, load_base

OUT, IN = 96, 256
MODULE = "model.layers.0.mlp.up_proj"


@pytest.fixture(autouse=True)
def optimized():
    """Enables optimizations, as for users: fused products must round like separate ones."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


def draw(*shape: int, dtype: Any = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator).to(dtype)


class Encoded(NamedTuple):
    """The tensors of a module, and the weight that their library decodes."""

    tensors: dict[str, torch.Tensor]
    weight: torch.Tensor
    config: dict[str, Any] = {}


# bitsandbytes. Its CPU kernel is wrong for a matrix with blocks that cross rows, but not for a
# vector.


def nf4(
    double: bool,
    dtype: torch.dtype,
    shape: tuple[int, int] = (OUT, IN),
    block: int = 64,
    storage: torch.dtype = torch.uint8,
):
    def write() -> Encoded:
        layer = bnb.nn.Linear4bit(
            *shape[::-1], bias=False, compute_dtype=dtype, compress_statistics=double,
            quant_type="nf4",
        )  # fmt: skip
        layer.weight = bnb.nn.Params4bit(
            draw(*shape, dtype=dtype), requires_grad=False, compress_statistics=double,
            quant_type="nf4", blocksize=block, quant_storage=storage,
        )  # fmt: skip
        layer.to("cpu")
        tensors = layer.state_dict()
        state = layer.weight.quant_state
        state.shape = torch.Size([shape[0] * shape[1]])
        weight = bnb.functional.dequantize_4bit(layer.weight.data, state)
        return Encoded(tensors, weight.reshape(shape))

    return write


def llm_int8() -> Encoded:
    layer = bnb.nn.Linear8bitLt(IN, OUT, bias=False, has_fp16_weights=False)
    layer.weight = bnb.nn.Int8Params(
        draw(OUT, IN, dtype=torch.float16), requires_grad=False, has_fp16_weights=False
    )
    layer.to("cpu")
    tensors = layer.state_dict()
    weight = bnb.functional.int8_vectorwise_dequant(tensors["weight"], tensors["SCB"])
    return Encoded(tensors, weight, {"dtype": "float32"})


# compressed-tensors.


def compressed(form: str, args: dict[str, Any], dtype: Any = torch.bfloat16):
    def write() -> Encoded:
        weight_args = QuantizationArgs(**args)
        scheme = QuantizationScheme(targets=["Linear"], weights=weight_args)
        weight = draw(OUT, IN, dtype=dtype)
        state = {"weight": weight, **scales_of(weight, weight_args)}
        compressor = BaseCompressor.get_value_from_registry(form)
        tensors = compressor.compress(state, scheme)
        decoded = compressor.decompress(dict(tensors), scheme)["weight"]
        group = {"targets": ["Linear"], "weights": json.loads(weight_args.model_dump_json())}
        settings = {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}}
        return Encoded(dict(tensors), decoded, {"quantization_config": settings})

    return write


def scales_of(weight: torch.Tensor, args: QuantizationArgs) -> dict[str, torch.Tensor]:
    """The scales of a weight by the minimum and maximum of each group."""
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    if args.strategy == "tensor":
        blocks = weight.reshape(1, -1)
        low, high = blocks.amin(1), blocks.amax(1)
    elif args.strategy == "channel":
        low, high = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    elif args.strategy == "block":
        out, into = args.block_structure
        filled = torch.nn.functional.pad(weight, (0, -IN % into, 0, -OUT % out))
        blocks = filled.reshape(-(-OUT // out), out, -(-IN // into), into)
        low, high = blocks.amin((1, 3)), blocks.amax((1, 3))
    else:
        blocks = weight.reshape(OUT, IN // args.group_size, args.group_size)
        low, high = blocks.amin(2), blocks.amax(2)
    extra = {}
    if args.strategy == "tensor_group":
        extra["weight_global_scale"] = generate_gparam(weight.amin(), weight.amax()).reshape(1)
    scale, zero = calculate_qparams(low, high, args, extra.get("weight_global_scale"))
    if not args.symmetric:
        extra["weight_zero_point"] = zero
    return {"weight_scale": scale, **extra}


GROUP: dict[str, Any] = {"strategy": "group", "group_size": 32, "symmetric": True}
FLOAT: dict[str, Any] = {"num_bits": 8, "type": "float", "symmetric": True}


# GPTQ, AWQ, FP8 in blocks.


def gptq(bits: int, group: int):
    def write() -> Encoded:
        layer = gptq_layer()(bits, group, IN, OUT, False, weight_dtype=torch.float16)
        weight = draw(OUT, IN, dtype=torch.float16)
        low, high = (f(weight.float().reshape(OUT, -1, group), 2) for f in (torch.amin, torch.amax))
        scales = (high - low) / (2**bits - 1)
        zeros = torch.round(-low / scales).clip(1, 2**bits - 1)
        group_of_input = torch.arange(IN) // group
        module = torch.nn.Linear(IN, OUT, bias=False)
        module.weight.data = weight
        layer.pack(module, scales.half(), zeros.half(), group_of_input.to(torch.int32))
        decoded = layer(torch.eye(IN, dtype=torch.float16))  # [in, out]
        tensors = {n: t for n, t in layer.state_dict().items() if n != "bias"} | {
            "g_idx": group_of_input.to(torch.int32)
        }
        return Encoded(tensors, decoded.T, {"quantization_config": {"quant_method": "gptq"}})

    return write


def gptq_layer() -> Any:
    """The layer of auto-gptq without a kernel, imported without the package's dependencies."""
    spec = importlib.util.find_spec("auto_gptq")
    assert spec is not None and spec.submodule_search_locations is not None
    file = Path(spec.submodule_search_locations[0], "nn_modules/qlinear/qlinear_cuda_old.py")
    layer_spec = importlib.util.spec_from_file_location("qlinear_cuda_old", file)
    assert layer_spec is not None and layer_spec.loader is not None
    module = importlib.util.module_from_spec(layer_spec)
    logging.disable(logging.WARNING)  # about the missing CUDA extension
    layer_spec.loader.exec_module(module)
    logging.disable(logging.NOTSET)
    return module.QuantLinear


def awq() -> Encoded:
    generator = torch.Generator().manual_seed(0)
    words = lambda *shape: torch.randint(  # noqa: E731
        -(2**31), 2**31, shape, dtype=torch.int32, generator=generator
    )
    tensors = {
        "qweight": words(IN, OUT // 8),
        "qzeros": words(IN // 64, OUT // 8),
        "scales": draw(IN // 64, OUT, dtype=torch.float16).abs() / 8,
    }
    converter = AutoAWQConverter(group_size=64, targets=["re:.*"])
    converted = converter.process({f"m.{name}": tensor for name, tensor in tensors.items()})
    args = QuantizationArgs(num_bits=4, strategy="group", group_size=64, symmetric=False)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    local = {name.removeprefix("m."): tensor for name, tensor in converted.items()}
    weight = compressor.decompress(local, scheme)["weight"]
    return Encoded(tensors, weight, {"quantization_config": {"quant_method": "awq", "bits": 4}})


def fp8_blocks(out: int, inputs: int):
    def write() -> Encoded:
        codes = draw(out, inputs).to(torch.float8_e4m3fn)
        scales = draw(-(-out // 128), -(-inputs // 128)).abs()
        converter = FP8BlockDequantizer(targets=["re:.*"], weight_block_size=(128, 128))
        weight = converter._create_dequantized_weight(codes, scales)
        return Encoded({"weight": codes, "weight_scale_inv": scales}, weight)

    return write


CASES: dict[str, Callable[[], Encoded]] = {
    "bitsandbytes NF4, bfloat16": nf4(False, torch.bfloat16),
    "bitsandbytes NF4, float16, blocks of 128": nf4(False, torch.float16, block=128),
    "bitsandbytes NF4, double": nf4(True, torch.bfloat16),
    "bitsandbytes NF4, double, float32": nf4(True, torch.float32),
    "bitsandbytes NF4, stored as bfloat16": nf4(
        True, torch.bfloat16, storage=torch.bfloat16
    ),
    "bitsandbytes LLM.int8": llm_int8,
    "pack-quantized, 4 bits in groups": compressed("pack-quantized", {"num_bits": 4, **GROUP}),
    "pack-quantized, zero points": compressed(
        "pack-quantized", {"num_bits": 4, **GROUP, "symmetric": False}, torch.float16
    ),
    "pack-quantized, 8 bits per channel": compressed(
        "pack-quantized", {"num_bits": 8, "strategy": "channel", "symmetric": True}
    ),
    "int-quantized": compressed(
        "int-quantized", {"num_bits": 8, "strategy": "channel", "symmetric": True}
    ),
    "int-quantized, zero points": compressed(
        "int-quantized", {"num_bits": 8, "strategy": "channel", "symmetric": False}, torch.float32
    ),
    "float-quantized, one scale": compressed("float-quantized", {**FLOAT, "strategy": "tensor"}),
    "float-quantized, per channel": compressed("float-quantized", {**FLOAT, "strategy": "channel"}),
    "float-quantized, blocks": compressed(
        "float-quantized", {**FLOAT, "strategy": "block", "block_structure": [32, 32]}
    ),
    "float-quantized, blocks of the config, partial blocks": compressed(
        "float-quantized", {**FLOAT, "strategy": "block", "block_structure": [64, 96]}
    ),
    "pack-quantized, one zero point": compressed(
        "pack-quantized", {"num_bits": 4, "strategy": "tensor", "symmetric": False}
    ),
    "MXFP8": compressed(
        "mxfp8-quantized",
        {**FLOAT, "strategy": "group", "group_size": 32, "scale_dtype": torch.uint8},
    ),
    "NVFP4": compressed(
        "nvfp4-pack-quantized",
        {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16,
         "scale_dtype": torch.float8_e4m3fn},
    ),
    "MXFP4": compressed(
        "mxfp4-pack-quantized",
        {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32,
         "scale_dtype": torch.uint8},
    ),
    "GPTQ, 4 bits": gptq(4, 64),
    "GPTQ, 8 bits": gptq(8, 128),
    "AWQ": awq,
    "FP8 with weight_scale_inv": fp8_blocks(384, 256),
    "FP8 with weight_scale_inv, partial blocks": fp8_blocks(192, 320),
}  # fmt: skip


def save(folder: Path, encoded: Encoded, module: str = MODULE) -> None:
    tensors = {f"{module}.{name}": t.contiguous() for name, t in encoded.tensors.items()}
    safetensors.torch.save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(encoded.config))


def bits(array: Any) -> np.ndarray[Any, Any]:
    return np.asarray(array).view(f"u{np.asarray(array).dtype.itemsize}")


def assert_same(actual: Any, expected: torch.Tensor) -> None:
    """Asserts the same bits in the same dtype."""
    wide = np.asarray(actual.astype(jnp.float32))
    assert str(actual.dtype) == str(expected.dtype).removeprefix("torch.")
    np.testing.assert_array_equal(bits(wide + 0), bits(expected.float().numpy() + 0))


@pytest.mark.parametrize("case", CASES)
def test_decoded_weight_equals_that_of_its_library(tmp_path, case):
    encoded = CASES[case]()
    save(tmp_path, encoded)
    warns = pytest.warns(AdapterWarning, match="blocks in memory are shorter")
    with warns if case.endswith("partial blocks") else warnings.catch_warnings():
        frozen = load_base(tmp_path, {"up": Linear(MODULE)})
    assert isinstance(frozen["up"], QuantizedWeight)
    assert_same(dequantize(frozen)["up"].T, encoded.weight)


@pytest.mark.parametrize("case", ["bitsandbytes NF4, double", "GPTQ, 4 bits", "NVFP4"])
def test_stacked_layers_with_heads_smaller_than_blocks(tmp_path, case):
    """A stack of two layers whose heads have 8 features, fewer than a block."""
    encoded, module = CASES[case](), "layers.{}.attn.{}_proj"
    tensors = {
        f"{module.format(layer, side)}.{name}": t.clone().contiguous()
        for layer in range(2)
        for side in "qo"
        for name, t in encoded.tensors.items()
    }
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
    names = {
        "q": Linear(module.replace(".{}_", ".q_"), shared_axes=[0], in_axes=[1]),
        "o": Linear(module.replace(".{}_", ".o_"), shared_axes=[0], in_axes=[1, 2]),
    }
    shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.float32)  # noqa: E731
    params = {"q": shape(2, IN, OUT // 8, 8), "o": shape(2, IN // 8, 8, OUT)}
    with pytest.warns(AdapterWarning, match="shorter and scales are repeated: `o`"):
        floats = dequantize(load_base(tmp_path, names, params=params))
    for layer in range(2):
        assert_same(floats["q"][layer].reshape(IN, OUT).T, encoded.weight)
        assert_same(floats["o"][layer].reshape(IN, OUT).T, encoded.weight)


@pytest.mark.parametrize("shape", [(96, 160), (7, 80)])
def test_bitsandbytes_blocks_that_cross_rows(tmp_path, shape):
    encoded = nf4(True, torch.bfloat16, shape)()
    save(tmp_path, encoded)
    with pytest.warns(AdapterWarning, match=r"shorter .*`up` \(\d\.\d\d bits a weight\)"):
        frozen = load_base(tmp_path, {"up": Linear(MODULE)})
    assert_same(dequantize(frozen)["up"].T, encoded.weight)


def test_reordered_gptq_groups_are_requantized(tmp_path):
    encoded = gptq(4, 64)()
    order = torch.randperm(IN, generator=torch.Generator().manual_seed(0))
    groups = encoded.tensors["g_idx"][order]
    save(tmp_path, Encoded({**encoded.tensors, "g_idx": groups}, encoded.weight, encoded.config))
    with pytest.raises(AdapterError, match="`up` that cannot be kept: its groups are not neigh"):
        load_base(tmp_path, {"up": Linear(MODULE)})
    with pytest.warns(
        AdapterWarning, match=r"codes are not kept: `up` as int8, 0\.0\d+ from the file's"
    ):
        requantized = load_base(tmp_path, {"up": Linear(MODULE)}, requantize="int8")
    assert requantized["up"].format == "int8"
    with pytest.warns(AdapterWarning, match="codes are not kept: `up` .as floats"):
        floats = load_base(tmp_path, {"up": Linear(MODULE)}, requantize="float")
    layer = gptq_layer()(4, 64, IN, OUT, False, weight_dtype=torch.float16)
    layer.load_state_dict({**encoded.tensors, "g_idx": groups}, strict=False)
    scale, zero = layer.scales[groups.long()], _zeros(layer.qzeros)[groups.long()]
    codes = (layer.qweight[:, None] >> torch.arange(0, 32, 4)[None, :, None] & 15).reshape(IN, OUT)
    expected = scale * (codes - zero).half()
    assert_same(floats["up"], expected)


def _zeros(packed: torch.Tensor) -> torch.Tensor:
    nibbles = packed[:, :, None] >> torch.arange(0, 32, 4) & 15
    return (nibbles.reshape(packed.shape[0], OUT) + 1) & 15


def test_mxfp4_experts_equal_transformers(tmp_path):
    generator = torch.Generator().manual_seed(0)
    byte = lambda low, high, *shape: torch.randint(  # noqa: E731
        low, high, shape, dtype=torch.uint8, generator=generator
    )
    blocks, scales = byte(0, 256, 3, 40, 4, 16), byte(110, 140, 3, 40, 4)
    tensors = {"mlp.experts.down_proj_blocks": blocks, "mlp.experts.down_proj_scales": scales}
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
    torch_name = Experts("mlp.experts", parameter="down_proj", shared_axes=[0])
    loaded = load_base(tmp_path, {"down": torch_name})
    assert loaded["down"].bits == 4.25
    expected = convert_moe_packed_tensors(blocks, scales)
    shape = (3, 128, 40)
    expected = expected if expected.shape == shape else expected.transpose(1, 2)
    assert_same(dequantize(loaded)["down"], expected)


# llama.cpp.

HEADS, KV_HEADS = 4, 2
TYPES = {"Q8_0": 8.5, "Q4_0": 4.5, "Q4_1": 5.0, "Q5_0": 8.5, "Q5_1": 9.0, "Q4_K": 4.625,
         "Q5_K": 8.625, "Q6_K": 8.5625}  # fmt: skip


def random_blocks(kind: Any, out: int, inputs: int, seed: int) -> np.ndarray[Any, Any]:
    """Blocks of random bytes with finite float16 scales."""
    entries, size = gguf.GGML_QUANT_SIZES[kind]
    random = np.random.default_rng(seed)
    data = random.integers(0, 256, (out, inputs // entries, size), dtype=np.uint8)
    scales = random.normal(size=(out, inputs // entries, 2)).astype(np.float16).view(np.uint8)
    if kind.name == "Q6_K":
        data[..., -2:] = scales[..., :2]
    else:
        data[..., :4] = scales
    return data.reshape(out, -1)


@pytest.mark.parametrize("arch", ["gemma2", "gemma3", "nemotron", "qwen3", "llama"])
def test_norms_of_llama_cpp(tmp_path, arch):
    """Transformers reads GGUF files, too, and undoes the same changes of llama.cpp's converter."""
    file, norm = tmp_path / "model.gguf", draw(40).numpy()
    writer = gguf.GGUFWriter(file, arch)
    writer.add_block_count(1)
    writer.add_tensor("output_norm.weight", norm)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    processor = TENSOR_PROCESSORS.get(arch, TensorProcessor)(config={})
    expected = processor.process(norm, "output_norm.weight").weights
    names = {"norm": {"type": "Tensor", "module": "model.norm", "parameter": "weight"}}
    np.testing.assert_array_equal(load_base(file, names)["norm"], expected)


@pytest.mark.parametrize("kind", TYPES)
def test_gguf_blocks_equal_llama_cpp(tmp_path, kind):
    file, number = tmp_path / "model.gguf", gguf.GGMLQuantizationType[kind]
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(1)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    expected: dict[str, Any] = {}
    for k, (name, out) in enumerate({"attn_q": 256, "attn_k": 128, "ffn_down": 40}.items()):
        data = random_blocks(number, out, 512, k)
        writer.add_tensor(f"blk.0.{name}.weight", data, raw_dtype=number)
        weight = gguf.dequantize(data, number)
        heads = {"attn_q": HEADS, "attn_k": KV_HEADS}.get(name)
        if heads is not None:  # the inverse of the permutation of llama.cpp's converter
            weight = (
                weight.reshape(heads, out // heads // 2, 2, 512).swapaxes(1, 2).reshape(out, 512)
            )
        expected[name] = weight
    norm = np.arange(40, dtype=np.float32)
    writer.add_tensor("output_norm.weight", norm)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    names: dict[str, Any] = {
        "attn_q": Linear("model.layers.0.self_attn.q_proj"),
        "attn_k": Linear("model.layers.0.self_attn.k_proj"),
        "ffn_down": Linear("model.layers.0.mlp.down_proj"),
        "norm": {"type": "Tensor", "module": "model.norm", "parameter": "weight"},
    }
    frozen = load_base(file, names)
    np.testing.assert_array_equal(frozen["norm"], norm)
    for name, weight in expected.items():
        assert frozen[name].bits == TYPES[kind]
        floats = np.asarray(dequantize(frozen[name])).T
        assert np.isfinite(weight).all()
        np.testing.assert_array_equal(bits(floats + 0), bits(weight + 0))
