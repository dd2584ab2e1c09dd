"""Quantized bases: decoded and merged, or rejected by the format's name."""

import json
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from lorax import LoraWeight
from lorax.bases.nf4 import QUANTILES
from lorax_io import save_adapter

Q, V = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"
EXPERTS = "model.layers.0.mlp.experts"
OUT, IN = 128, 64

u8 = lambda *shape: np.ones(shape, np.uint8)  # noqa: E731
i8 = lambda *shape: np.ones(shape, np.int8)  # noqa: E731
u32 = lambda *shape: np.ones(shape, np.uint32)  # noqa: E731
i32 = lambda *shape: np.ones(shape, np.int32)  # noqa: E731
f32 = lambda *shape: np.ones(shape, np.float32)  # noqa: E731
fp8 = lambda *shape: np.ones(shape, jnp.float8_e4m3fn)  # noqa: E731
draw = lambda *shape: np.random.default_rng(sum(shape)).normal(size=shape)  # noqa: E731

# The tensors of a module with 64 outputs and 32 inputs in unsupported formats, and a word of the
# message.
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "ComfyUI": ({"weight": fp8(64, 32), "scale_weight": f32()}, "ComfyUI"),
    "HQQ": ({"W_q": u8(32, 32), "scale": f32(64, 1), "zero": f32(64, 1)}, "HQQ"),
    "quanto": ({"weight._data": u8(64, 32), "weight._scale": f32(64, 1)}, "quanto"),
    "MLX": ({"weight": u32(64, 4), "scales": f32(64, 1), "biases": f32(64, 1)}, "MLX"),
    "ModelOpt": (
        {"weight": u8(64, 16), "weight_scale": fp8(64, 2), "weight_scale_2": f32()}, "a scale",
    ),
    "EXL2": ({"q_weight": i32(4, 64), "q_invperm": i32(32), "q_scale": i32(1, 8)}, "EXL2"),
    "EXL3": ({"trellis": u8(4, 64), "suh": f32(32), "svh": f32(64)}, "EXL3"),
    "torchao": ({"_weight_qdata": i8(64, 32), "_weight_scale": f32(64, 1)}, "torchao"),
    "QuIP#": ({"Qidxs": i8(64, 4), "SU": f32(32), "SV": f32(64)}, "QuIP#"),
    "SpQR": ({"dense_weights": i8(64), "col_vals": i32(3)}, "SpQR"),
    "EETQ": ({"weight": i8(32, 64), "weight_scales": f32(64)}, "EETQ"),
    "sparse": ({"weight.compressed": f32(9), "weight.bitmask": u8(64, 4)}, "sparse"),
    "FP8 with `scale`": ({"weight": fp8(64, 32), "scale": f32(1)}, "FP8, with a scale"),
    "integers": ({"weight": i8(64, 32)}, "int8"),
    "GPTQ of 3 bits": (
        {"qweight": i32(3, 64), "qzeros": i32(1, 6), "scales": f32(1, 64)}, "codes of 3.0 bits",
    ),
    "AWQ with too few words": (
        {"qweight": i32(32, 7), "qzeros": i32(1, 8), "scales": f32(1, 64)}, r"(32, 8) would fit",
    ),
}  # fmt: skip


def write(files, module, tensors, config=None, prefix="", folder="base"):
    named = {f"{prefix}{module}.{name}": tensor for name, tensor in tensors.items()}
    files.base(named | {f"{prefix}{V}.weight": files.draw(64, 32)}, config, folder)


@pytest.mark.parametrize("form", REFUSED)
@pytest.mark.parametrize(
    "command", ["verify adapter --base base", "merge adapter --base base --out m"]
)
def test_codes_raise_by_name(shell, files, tmp_path, form, command):
    tensors, word = REFUSED[form]
    write(files, Q, tensors)
    files.peft(files.pair(Q, 64, 32), target_modules=["q_proj"])
    message = shell.fail(command)
    assert word in message
    assert "LORA_FREEZE" not in message
    assert not (tmp_path / "m").exists()


def test_codes_are_detected_under_another_prefix(shell, files):
    write(files, Q, REFUSED["HQQ"][0], prefix="language_model.")
    files.peft(files.pair(Q, 64, 32), target_modules=["q_proj"])
    assert "HQQ" in shell.fail("verify adapter --base base")


def test_config_names_the_method(shell, files):
    write(
        files, Q, {"weight": fp8(64, 32)}, {"quantization_config": {"quant_method": "fbgemm_fp8"}}
    )
    files.peft(files.pair(Q, 64, 32), target_modules=["q_proj"])
    assert "fbgemm_fp8" in shell.fail("merge adapter --base base --out m")


_GPTQ = {"qweight": i32(4, 64), "qzeros": i32(1, 8), "scales": f32(1, 64)}
_SCALED = {"weight": i8(64, 32), "weight_scale": f32(64, 1)}
# Settings that change the meaning of codes, and a word of the message.
SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "only the config": ({"blob": u8(9)}, {"quant_method": "later"}, "is stored as later"),
    "layout": (_GPTQ, {"quant_method": "gptq", "checkpoint_format": "marlin"}, "'marlin'"),
    "method": (_GPTQ, {"quant_method": "auto-round"}, "of auto-round"),
    "bits": (_GPTQ, {"quant_method": "gptq", "bits": 8}, "in 4 bits, and its config says 8"),
    "rotated": (_SCALED, {"transform_config": {"config_groups": {"u": {}}}}, "transform_config"),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_unsupported_settings_raise_by_name(shell, files, case):
    tensors, settings, word = SETTINGS[case]
    write(files, Q, tensors, {"quantization_config": settings})
    files.peft(files.pair(Q, 64, 32), target_modules=["q_proj"])
    assert word in shell.fail("merge adapter --base base --out m")


def test_8_bit_floats_without_scales_are_plain_floats(shell, files):
    write(files, Q, {"weight": fp8(64, 32)})
    files.peft(files.pair(Q, 64, 32), target_modules=["q_proj"])
    shell.succeed("merge adapter --base base --out merged")
    merged = files.read("merged/model.safetensors")[f"{Q}.weight"]
    assert merged.dtype == jnp.float8_e4m3fn


# Supported formats


def nf4() -> tuple[dict[str, Any], Any]:
    codes = np.random.default_rng(0).integers(0, 16, (OUT, IN))
    scales = np.abs(draw(OUT)).astype(np.float32)
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [OUT, IN]}
    table = np.asarray(QUANTILES, np.float32)
    flat = codes.reshape(-1, 2)
    return {
        "weight": (flat[:, 0] << 4 | flat[:, 1]).astype(np.uint8)[:, None],
        "weight.absmax": scales,
        "weight.quant_map": table,
        "weight.quant_state.bitsandbytes__nf4": np.frombuffer(
            json.dumps(state).encode(), np.uint8
        ).copy(),
    }, table[codes] * scales[:, None]


def words(codes: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Packs eight 4-bit codes into an int32 along the last axis, the first in the lowest bits."""
    eight = codes.reshape(*codes.shape[:-1], -1, 8).astype(np.int64) << np.arange(0, 32, 4)
    return eight.sum(-1).astype(np.uint32).view(np.int32)


def gptq() -> tuple[dict[str, Any], Any]:
    random = np.random.default_rng(0)
    codes, zeros = random.integers(0, 16, (OUT, IN)), random.integers(1, 16, (2, OUT))
    scales = np.abs(draw(2, OUT)).astype(np.float16)
    of = np.repeat(np.arange(2), IN // 2)
    weight = scales[of].T.astype(np.float32) * (codes - zeros[of].T)
    return {
        "qweight": np.ascontiguousarray(words(codes).T), "qzeros": words(zeros - 1),
        "scales": scales, "g_idx": of.astype(np.int32),
    }, weight  # fmt: skip


def packed() -> tuple[dict[str, Any], Any]:
    codes = np.random.default_rng(0).integers(-8, 8, (OUT, IN))
    scales = np.abs(draw(OUT, 2)).astype(jnp.bfloat16)
    weight = codes * np.repeat(scales.astype(np.float32), IN // 2, 1)
    return {
        "weight_packed": words(codes + 8), "weight_scale": scales,
        "weight_shape": np.array([OUT, IN], np.int64),
    }, weight  # fmt: skip


def floats_8(block: bool) -> tuple[dict[str, Any], Any]:
    codes = draw(OUT, IN).astype(jnp.float8_e4m3fn)
    shape = (1, 1) if block else (OUT, 1)
    scales = np.abs(draw(*shape)).astype(np.float32)
    end = "weight_scale_inv" if block else "weight_scale"
    return {"weight": codes, end: scales}, codes.astype(np.float32) * scales


def int_8() -> tuple[dict[str, Any], Any]:
    codes = np.random.default_rng(0).integers(-127, 128, (OUT, IN)).astype(np.int8)
    scales = np.abs(draw(OUT)).astype(np.float32)
    return {"weight": codes, "SCB": scales}, codes * scales[:, None] / 127


DECODED = {
    "bitsandbytes, 4 bits": nf4,
    "bitsandbytes, 8 bits": int_8,
    "GPTQ": gptq,
    "compressed-tensors": packed,
    "fp8 in blocks": lambda: floats_8(True),
    "fp8 with a scale": lambda: floats_8(False),
}


def config_of(form: str) -> dict[str, Any]:
    settings = {"quant_method": "gptq" if form == "GPTQ" else "x"}
    return {"quantization_config": settings, "model_type": "m"}


@pytest.fixture
def coded(files):
    """Writes a base with a quantized and a float weight; returns the quantized one's values."""

    def written(form, adapted=("q_proj",)):
        tensors, weight = DECODED[form]()
        write(files, Q, tensors, config_of(form))
        pairs = {"q_proj": files.pair(Q, OUT, IN), "v_proj": files.pair(V, 64, 32)}
        tensors = {name: x for module in adapted for name, x in pairs[module].items()}
        files.peft(tensors, target_modules=list(adapted))
        a, b = (pairs["q_proj"][f"{Q}.lora_{side}.weight"] for side in "AB")
        return weight, 2 * b @ a

    return written


@pytest.mark.parametrize("form", DECODED)
def test_codes_are_decoded_and_merged(shell, files, tmp_path, coded, form):
    weight, delta = coded(form)
    assert "fits base" in shell.succeed("verify adapter --base base")
    shell.succeed("merge adapter --base base --out m")
    tensors = files.read("m/model.safetensors")
    assert tensors.keys() == {f"{Q}.weight", f"{V}.weight"}
    merged = tensors[f"{Q}.weight"].astype(np.float32)
    digits = float(jnp.finfo(tensors[f"{Q}.weight"].dtype).eps)
    np.testing.assert_allclose(merged, weight + delta, rtol=digits, atol=4 * digits)
    assert np.abs(delta).max() > 0.5
    assert json.loads((tmp_path / "m/config.json").read_text()) == {"model_type": "m"}


@pytest.mark.parametrize("form", DECODED)
@pytest.mark.parametrize("which", ["base", "tuned"])
def test_extract_accepts_codes_on_either_side(shell, files, coded, form, which):
    """Either side of `extract` can be quantized; the other one is floats here."""
    weight, delta = coded(form)
    coded_tensors = files.read("base/model.safetensors")
    floats = {f"{Q}.weight": np.asarray(weight + delta, np.float32)}
    files.base(floats | {f"{V}.weight": coded_tensors[f"{V}.weight"]}, None, "floats")
    sides = ("base", "floats") if which == "base" else ("floats", "base")
    shell.succeed("extract --base {} --tuned {} --out x --rank 4 --to peft".format(*sides))
    tensors = files.read("x/adapter_model.safetensors")
    a, b = (tensors[f"base_model.model.{Q}.lora_{side}.weight"] for side in "AB")
    # The file has the dtype to which the weight is decoded.
    atol = 0.05 * np.abs(delta).max()
    np.testing.assert_allclose(b @ a, delta if which == "base" else -delta, rtol=0, atol=atol)


def test_extract_of_unreadable_codes_raises(shell, files):
    tensors, word = REFUSED["GPTQ of 3 bits"]
    write(files, Q, tensors)
    files.base({f"{Q}.weight": f32(64, 32), f"{V}.weight": f32(64, 32)}, None, "tuned")
    assert word in shell.fail("extract --base base --tuned tuned --out x --rank 4 --to peft")


@pytest.mark.parametrize("form", DECODED)
def test_codes_without_an_adapter_are_copied(shell, files, tmp_path, coded, form):
    coded(form, adapted=("v_proj",))
    shell.succeed("merge adapter --base base --out m")
    before, after = files.read("base/model.safetensors"), files.read("m/model.safetensors")
    assert before.keys() == after.keys()
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert changed == {f"{V}.weight"}
    assert json.loads((tmp_path / "m/config.json").read_text()) == config_of(form)


@pytest.mark.parametrize("form", ["fp8 with a scale"])
def test_requantize_keeps_the_format_of_codes(shell, files, tmp_path, coded, form):
    weight, delta = coded(form)
    shell.succeed("merge adapter --base base --out m --requantize", "quantized again")
    before, after = files.read("base/model.safetensors"), files.read("m/model.safetensors")
    assert {n: (x.shape, x.dtype) for n, x in after.items()} == {
        n: (x.shape, x.dtype) for n, x in before.items()
    }
    decoded = after[f"{Q}.weight"].astype(np.float32) * after[f"{Q}.weight_scale"]
    error = np.linalg.norm(decoded - weight - delta) / np.linalg.norm(weight + delta)
    assert 0.001 < error < 0.04
    assert json.loads((tmp_path / "m/config.json").read_text()) == config_of(form)


def test_requantize_fp8_in_blocks(shell, files):
    codes, scales = draw(256, 128).astype(jnp.float8_e4m3fn), np.abs(draw(2, 1)).astype(np.float32)
    write(files, Q, {"weight": codes, "weight_scale_inv": scales})
    pair = files.pair(Q, 256, 128)
    files.peft(pair, target_modules=["q_proj"])
    out = shell.succeed(
        "merge adapter --base base --out m --requantize", "1 merged weights were quantized again"
    )
    assert "1 of them adapted" in out
    tensors = files.read("m/model.safetensors")
    each = np.repeat(tensors[f"{Q}.weight_scale_inv"], 128, 0)
    decoded = tensors[f"{Q}.weight"].astype(np.float32) * each
    expected = codes.astype(np.float32) * np.repeat(scales, 128, 0)
    expected += 2 * pair[f"{Q}.lora_B.weight"] @ pair[f"{Q}.lora_A.weight"]
    assert 0.001 < np.linalg.norm(decoded - expected) / np.linalg.norm(expected) < 0.04


@pytest.mark.parametrize("form", ["bitsandbytes, 4 bits", "GPTQ", "compressed-tensors"])
def test_requantize_to_packed_codes_raises(shell, tmp_path, coded, form):
    coded(form)
    message = shell.fail("merge adapter --base base --out m --requantize")
    assert "can be read but not written" in message
    assert not (tmp_path / "m").exists()


def test_index_lists_the_decoded_floats(shell, files, tmp_path, coded):
    coded("GPTQ")
    base = tmp_path / "base"
    index = {"weight_map": dict.fromkeys(files.read("base/model.safetensors"), "part.safetensors")}
    (base / "model.safetensors").rename(base / "part.safetensors")
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    shell.succeed("merge adapter --base base --out m")
    index = json.loads((tmp_path / "m/model.safetensors.index.json").read_text())
    tensors = files.read("m/part.safetensors")
    assert index["weight_map"] == dict.fromkeys(tensors, "part.safetensors")
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in tensors.values())


def test_errors_of_decoding_name_the_weight(shell, files, tmp_path):
    tensors, _ = packed()
    tensors["weight_scale"] = np.full((OUT, 2), np.nan, jnp.bfloat16)
    write(files, Q, tensors, config_of("compressed-tensors"))
    files.peft(files.pair(Q, OUT, IN), target_modules=["q_proj"])
    message = shell.fail("merge adapter --base base --out m")
    assert f"`{Q}.weight/scales` holds NaN" in message and not (tmp_path / "m").exists()


def test_index_of_other_files_is_not_copied(shell, tmp_path, coded):
    """transformers reads a single file, if there is one, and not the index of an earlier save."""
    coded("GPTQ")
    index = tmp_path / "base/model.safetensors.index.json"
    index.write_text('{"weight_map": {"x": "gone.safetensors"}}')
    shell.succeed("merge adapter --base base --out m")
    assert {path.name for path in (tmp_path / "m").iterdir()} == {
        "config.json", "model.safetensors"
    }  # fmt: skip


@pytest.mark.parametrize("name", ["quantize_config.json", "quant_config.json"])
def test_settings_of_codes_are_not_copied_with_floats(shell, tmp_path, coded, name):
    coded("GPTQ")
    (tmp_path / "base" / name).write_text('{"bits": 4}')
    shell.succeed("merge adapter --base base --out m")
    assert {path.name for path in (tmp_path / "m").iterdir()} == {
        "config.json", "model.safetensors"
    }  # fmt: skip


def test_merge_raises_if_other_codes_cannot_be_read(shell, files, tmp_path, coded):
    """The config of floats would leave the other codes without a meaning."""
    coded("GPTQ")
    refused, _ = REFUSED["GPTQ of 3 bits"]
    tensors = files.read("base/model.safetensors")
    tensors |= {f"{V[:-6]}k_proj.{name}": x for name, x in refused.items()}
    files.base(tensors, config_of("GPTQ"))
    message = shell.fail("merge adapter --base base --out m")
    assert "k_proj" in message and not (tmp_path / "m").exists()


def test_fully_trained_module_replaces_codes(shell, files, coded):
    coded("fp8 in blocks")
    full = files.draw(OUT, IN)
    files.peft(
        files.pair(V, 64, 32) | {f"{Q}.weight": full},
        target_modules=["v_proj"],
        modules_to_save=["q_proj"],
    )
    shell.succeed("merge adapter --base base --out m")
    tensors = files.read("m/model.safetensors")[f"{Q}.weight"]
    np.testing.assert_array_equal(tensors, full.astype(tensors.dtype))


def test_experts_in_mxfp4(shell, files):
    random = np.random.default_rng(0)
    files.base(
        {
            f"{EXPERTS}.down_proj_blocks": random.integers(0, 256, (2, 4, 1, 16), dtype=np.uint8),
            f"{EXPERTS}.down_proj_scales": random.integers(120, 130, (2, 4, 1), dtype=np.uint8),
        }
    )
    tensors = {f"{EXPERTS}.lora_A.weight": f32(4, 32), f"{EXPERTS}.lora_B.weight": f32(4, 4)}
    files.peft(tensors, target_modules=[], target_parameters=["mlp.experts.down_proj"])
    shell.succeed("merge adapter --base base --out m")
    merged = files.read("m/model.safetensors")
    assert {n: (x.shape, str(x.dtype)) for n, x in merged.items()} == {
        f"{EXPERTS}.down_proj": ((2, 32, 4), "bfloat16")
    }


def test_native_adapters_are_merged_into_codes(shell, files, coded):
    weight, _ = coded("fp8 in blocks")
    a, b = jnp.full((OUT, 2), 0.5), jnp.ones((2, IN))
    save_adapter("a.safetensors", {f"{Q}.weight": LoraWeight(a, b, rank=2)})
    shell.succeed("merge a.safetensors --base base/model.safetensors --out m")
    merged = files.read("m/model.safetensors")[f"{Q}.weight"].astype(np.float32)
    np.testing.assert_allclose(merged, weight + 2 * 0.5, rtol=0.01, atol=0.02)
