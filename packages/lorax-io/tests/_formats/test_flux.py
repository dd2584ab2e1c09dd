"""Flux adapters of fused layers are split for a base with separate layers."""

import jax.numpy as jnp
import numpy as np
import pytest
from formats_of_files import ALPHA, IN, KOHYA, OUT, PEFT, QKV, RANK, save

import lorax
from lorax_io import (
    Linear,
    load_any,
    open_adapter,
)


def flux_file(files, prefix, ends):
    """Adapters of a fused layer of q, k and v, and of one that also has the MLP."""
    tensors, deltas = {}, {}
    dot = "_" if prefix.endswith("_") else "."
    for module, outputs in {QKV: 3 * IN, "single_blocks.1.linear1": 3 * IN + OUT}.items():
        a, b = files.draw(RANK, IN), files.draw(outputs, RANK)
        name = prefix + module.replace(".", dot)
        tensors |= {name + ends[0]: a, name + ends[1]: b, f"{name}.alpha": ALPHA}
        deltas[module] = float(ALPHA) / RANK * b @ a
    save(tensors)
    return deltas


@pytest.mark.parametrize(
    ("prefix", "ends"), [("diffusion_model.", PEFT), ("lora_unet_", KOHYA)], ids=["dots", "kohya"]
)
def test_fused_layers_are_split_for_a_base_with_separate_layers(shell, files, prefix, ends):
    deltas = flux_file(files, prefix, ends)
    one, two = "transformer_blocks.0.attn.", "single_transformer_blocks.1."
    parts = {f"{one}to_{x}": IN for x in "qkv"} | {f"{two}attn.to_{x}": IN for x in "qkv"}
    parts[f"{two}proj_mlp"] = OUT
    base = {f"{name}.weight": files.draw(size, IN) for name, size in parts.items()}
    save(base, "base.safetensors")
    shell.succeed("merge a.safetensors --base base.safetensors --out merged")
    merged = files.read("merged/base.safetensors")
    changes = {name: merged[f"{name}.weight"] - base[f"{name}.weight"] for name in parts}
    for module, begin in {QKV: one, "single_blocks.1.linear1": two}.items():
        fused = np.concatenate([x for name, x in changes.items() if name.startswith(begin)])
        np.testing.assert_allclose(fused, deltas[module], rtol=1e-4, atol=1e-5)
    names = {name: Linear(name, in_axes=(1,), out_axes=(0,)) for name in parts}
    params = {name: jnp.asarray(base[f"{name}.weight"]) for name in parts}
    pair = load_any("a.safetensors", params, names)
    for name, weight in lorax.merge_params(pair).items():
        np.testing.assert_allclose(weight, merged[f"{name}.weight"], rtol=1e-5, atol=1e-6)
    shell.succeed("convert a.safetensors out --to diffusers")
    assert {x.module for x in open_adapter("out").names.values()} == parts.keys()


@pytest.mark.parametrize(
    ("prefix", "ends"), [("diffusion_model.", PEFT), ("lora_unet_", KOHYA)], ids=["dots", "kohya"]
)
def test_fused_layers_are_kept_for_a_base_that_has_them(shell, files, prefix, ends):
    deltas = flux_file(files, prefix, ends)
    base = {f"{name}.weight": files.draw(*delta.shape) for name, delta in deltas.items()}
    save(base, "base.safetensors")
    shell.succeed("merge a.safetensors --base base.safetensors --out merged")
    merged = files.read("merged/base.safetensors")
    for name, delta in deltas.items():
        expected = base[f"{name}.weight"] + delta
        np.testing.assert_allclose(merged[f"{name}.weight"], expected, rtol=1e-5)


@pytest.mark.parametrize("case", ["no thirds", "no rest", "lokr", "no module of diffusers"])
def test_unsplittable_flux_modules_raise(shell, files, case):
    flux_file(files, "diffusion_model.", PEFT)
    tensors = files.read("a.safetensors")
    name = f"diffusion_model.{QKV}"
    if case == "no thirds":
        tensors[f"{name}.lora_B.weight"] = files.draw(3 * IN + 1, RANK)
    elif case == "no rest":
        tensors["diffusion_model.single_blocks.1.linear1.lora_B.weight"] = files.draw(IN, RANK)
    elif case == "lokr":
        tensors = {f"{name}.lokr_w1": files.draw(3, 2), f"{name}.lokr_w2": files.draw(IN, IN // 2)}
    else:
        tensors |= {f"diffusion_model.x.lora_{x}.weight": files.draw(RANK, RANK) for x in "AB"}
    save(tensors)
    message = shell.fail("convert a.safetensors out --to diffusers")
    assert (
        "outputs for a product" in message or "cannot be split" in message or "no module" in message
    )
