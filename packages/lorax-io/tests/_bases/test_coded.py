"""Bases whose weights are codes: refused by the format's name, and what is plain in them merged."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

Q, V = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"
EXPERTS = "model.layers.0.mlp.experts"

u8 = lambda *shape: np.ones(shape, np.uint8)  # noqa: E731
i8 = lambda *shape: np.ones(shape, np.int8)  # noqa: E731
u32 = lambda *shape: np.ones(shape, np.uint32)  # noqa: E731
i32 = lambda *shape: np.ones(shape, np.int32)  # noqa: E731
f32 = lambda *shape: np.ones(shape, np.float32)  # noqa: E731
fp8 = lambda *shape: np.ones(shape, jnp.float8_e4m3fn)  # noqa: E731

# The tensors of a module of 64 outputs and 32 inputs in each format, and a word of the message.
FORMATS: dict[str, tuple[dict[str, Any], str]] = {
    "fp8 in blocks": ({"weight": fp8(64, 32), "weight_scale_inv": f32(1, 1)}, "FP8"),
    "fp8 with a scale": ({"weight": fp8(64, 32), "weight_scale": f32(64, 1)}, "FP8"),
    "int8 with a scale": ({"weight": i8(64, 32), "weight_scale": f32(64, 1)}, "compressed-tensors"),
    "ComfyUI": ({"weight": fp8(64, 32), "scale_weight": f32()}, "ComfyUI"),
    "bitsandbytes, 4 bits": (
        {
            "weight": u8(1024, 1),
            "weight.absmax": f32(32),
            "weight.quant_map": f32(16),
            "weight.quant_state.bitsandbytes__nf4": u8(80),
        },
        "bitsandbytes",
    ),
    "bitsandbytes, 8 bits": ({"weight": i8(64, 32), "SCB": f32(64)}, "bitsandbytes"),
    "GPTQ": (
        {"qweight": i32(4, 64), "qzeros": i32(1, 8), "scales": f32(1, 64), "g_idx": i32(32)},
        "GPTQ",
    ),
    "AWQ": ({"qweight": i32(32, 8), "qzeros": i32(1, 8), "scales": f32(1, 64)}, "AWQ"),
    "compressed-tensors": (
        {"weight_packed": i32(64, 4), "weight_scale": f32(64, 1), "weight_shape": i32(2)},
        "compressed-tensors",
    ),
    "HQQ": ({"W_q": u8(32, 32), "scale": f32(64, 1), "zero": f32(64, 1)}, "HQQ"),
    "quanto": ({"weight._data": u8(64, 32), "weight._scale": f32(64, 1)}, "quanto"),
    "MLX": ({"weight": u32(64, 4), "scales": f32(64, 1), "biases": f32(64, 1)}, "MLX"),
    "integers": ({"weight": i8(64, 32)}, "int8"),
}


def write(files, module, tensors, config=None, prefix=""):
    named = {f"{prefix}{module}.{name}": tensor for name, tensor in tensors.items()}
    files.base(named | {f"{prefix}{V}.weight": files.draw(64, 32)}, config)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(
    "command", ["verify adapter --base base", "merge adapter --base base --out m"]
)
def test_codes_are_refused_by_name(shell, files, tmp_path, form, command):
    tensors, word = FORMATS[form]
    write(files, Q, tensors)
    files.peft(files.pair(Q, 64, 32), target_modules=["q_proj"])
    message = shell.fail(command)
    assert "quantized" in message and word in message
    assert "LORA_FREEZE" not in message
    assert not (tmp_path / "m").exists()


def test_codes_are_told_under_another_prefix(shell, files):
    write(files, Q, FORMATS["GPTQ"][0], prefix="language_model.")
    files.peft(files.pair(Q, 64, 32), target_modules=["q_proj"])
    assert "GPTQ" in shell.fail("verify adapter --base base")


def test_config_names_the_method(shell, files):
    write(
        files, Q, {"weight": fp8(64, 32)}, {"quantization_config": {"quant_method": "fbgemm_fp8"}}
    )
    files.peft(files.pair(Q, 64, 32), target_modules=["q_proj"])
    assert "fbgemm_fp8" in shell.fail("merge adapter --base base --out m")


@pytest.mark.parametrize("form", ["fp8 in blocks", "GPTQ", "bitsandbytes, 4 bits"])
def test_plain_weights_beside_codes_are_merged(shell, files, form):
    write(files, Q, FORMATS[form][0], {"quantization_config": {"quant_method": "x"}})
    files.peft(files.pair(V, 64, 32), target_modules=["v_proj"])
    shell.succeed("merge adapter --base base --out merged")
    before, after = files.read("base/model.safetensors"), files.read("merged/model.safetensors")
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert changed == {f"{V}.weight"}


def test_a_whole_module_does_not_replace_codes(shell, files):
    write(files, Q, FORMATS["fp8 in blocks"][0])
    files.peft(
        files.pair(V, 64, 32) | {f"{Q}.weight": files.draw(64, 32)},
        target_modules=["v_proj"],
        modules_to_save=["q_proj"],
    )
    assert "FP8" in shell.fail("merge adapter --base base --out m")


def test_experts_in_mxfp4_are_refused(shell, files):
    files.base(
        {f"{EXPERTS}.down_proj_blocks": u8(2, 4, 1, 16), f"{EXPERTS}.down_proj_scales": u8(2, 4, 1)}
    )
    tensors = {f"{EXPERTS}.lora_A.weight": f32(4, 32), f"{EXPERTS}.lora_B.weight": f32(4, 4)}
    files.peft(tensors, target_modules=[], target_parameters=["mlp.experts.down_proj"])
    assert "MXFP4" in shell.fail("merge adapter --base base --out m")


def test_8_bit_floats_without_a_scale_are_numbers(shell, files):
    write(files, Q, {"weight": fp8(64, 32)})
    files.peft(files.pair(Q, 64, 32), target_modules=["q_proj"])
    shell.succeed("merge adapter --base base --out merged")
    merged = files.read("merged/model.safetensors")[f"{Q}.weight"]
    assert merged.dtype == jnp.float8_e4m3fn


def test_native_adapters_are_held_to_the_same(shell, files):
    from lorax import LoraWeight
    from lorax_io import save_adapter

    save_adapter(
        "a.safetensors",
        {f"{Q}.weight": LoraWeight(jnp.ones((64, 2)), jnp.ones((2, 32)), rank=2)},
    )
    write(files, Q, FORMATS["fp8 in blocks"][0])
    assert "FP8" in shell.fail("merge a.safetensors --base base/model.safetensors --out m")
