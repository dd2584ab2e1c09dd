"""Files for diffusers."""

import json
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import lorax
from lorax_io import (
    AdapterMismatchError,
    Conv,
    Embedding,
    Linear,
    Tensor,
    UnsupportedAdapterError,
    save_diffusers,
)

NAMES = {
    "to_q": Linear("blocks.0.attn.to_q"),
    "to_k": Linear("blocks.0.attn.to_k"),
    "to_v": Linear("blocks.0.attn.to_v"),
    "conv": Conv("conv_in"),
    "embed": Embedding("token_embedding"),
    "norm": Tensor("norm", parameter="weight"),
}
CONV_AXES = {"in_axes": (0, 1, 2), "out_axes": (3,)}


def lora(a_shape, b_shape, **settings):
    draw = np.random.default_rng(len(a_shape)).normal
    rank = a_shape[-1]
    a, b = (draw(size=shape).astype(np.float32) for shape in (a_shape, b_shape))
    return lorax.LoraWeight(jnp.asarray(a), jnp.asarray(b), rank=rank, **settings)


def make_tunable(**more) -> dict[str, Any]:
    return {
        "to_q": lora((5, 2), (2, 3), alpha=4.0),
        "to_k": lora((5, 2), (2, 3), alpha=4.0),
        "to_v": lora((5, 3), (3, 3), alpha=9.0),
        "conv": lora((3, 2, 5, 2), (2, 7), alpha=4.0, **CONV_AXES),
        "frozen": None,
    } | more


def read(file):
    with safetensors.safe_open(file, "numpy") as opened:
        header = opened.metadata()
    return safetensors.numpy.load_file(file), header


MODULES = ["blocks.0.attn.to_k", "blocks.0.attn.to_q", "blocks.0.attn.to_v", "conv_in"]


@pytest.mark.parametrize("prefix", ["transformer", "unet", "text_encoder"])
def test_tensors_and_header_have_the_prefix_of_the_part(tmp_path, prefix):
    folder, tunable = tmp_path / "a" / "b", make_tunable()
    file = save_diffusers(folder, tunable, NAMES, prefix=prefix)
    assert file == folder / "pytorch_lora_weights.safetensors"
    assert list(folder.iterdir()) == [file]
    tensors, header = read(file)
    keys = ("lora_A.weight", "lora_B.weight")
    assert tensors.keys() == {f"{prefix}.{module}.{key}" for module in MODULES for key in keys}
    start = f"{prefix}.blocks.0.attn.to_v"
    np.testing.assert_array_equal(tensors[f"{start}.lora_A.weight"], tunable["to_v"].a.T)
    np.testing.assert_array_equal(tensors[f"{start}.lora_B.weight"], tunable["to_v"].b.T)
    conv = tensors[f"{prefix}.conv_in.lora_A.weight"]
    np.testing.assert_array_equal(conv, tunable["conv"].a.transpose(3, 2, 0, 1))
    assert tensors[f"{prefix}.conv_in.lora_B.weight"].shape == (7, 2, 1, 1)
    assert header.keys() == {"format", "lora_adapter_metadata", "lorax.version"}
    assert header["format"] == "pt"
    config = json.loads(header["lora_adapter_metadata"])
    assert all(key.startswith(f"{prefix}.") for key in config)
    settings = {key.removeprefix(f"{prefix}."): value for key, value in config.items()}
    assert (settings["r"], settings["lora_alpha"], settings["target_modules"]) == (2, 4, MODULES)
    assert settings["rank_pattern"] == {"blocks.0.attn.to_v": 3}
    assert settings["alpha_pattern"] == {"blocks.0.attn.to_v": 9}
    assert settings["peft_type"] == "LORA"


def test_patterns_are_in_the_header_even_if_empty(tmp_path):
    """diffusers reads them without checking that they exist."""
    tunable = {"to_q": make_tunable()["to_q"]}
    _, header = read(save_diffusers(tmp_path, tunable, NAMES))
    config = json.loads(header["lora_adapter_metadata"])
    assert config["transformer.rank_pattern"] == config["transformer.alpha_pattern"] == {}


def test_folded_scale_is_in_the_factors(tmp_path):
    tunable = make_tunable(to_k=lora((5, 2), (2, 3), alpha=3.0, scaling="rslora"))
    tensors, header = read(save_diffusers(tmp_path, tunable, NAMES, fold_scale=True))
    config = json.loads(header["lora_adapter_metadata"])
    assert config["transformer.lora_alpha"] == config["transformer.r"] == 2
    # The alpha of every module is its rank; otherwise the rest of the scale is in the factors.
    for path in ("to_q", "to_k", "to_v"):
        name = f"transformer.{NAMES[path].module}"
        module, weight = NAMES[path].module, tunable[path]
        rank = config["transformer.rank_pattern"].get(module, 2)
        alpha = config["transformer.alpha_pattern"].get(module, 2)
        a, b = tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"]
        expected = weight.scale * (weight.a @ weight.b)
        np.testing.assert_allclose(alpha / rank * (b @ a).T, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("row", "error", "message"),
    [
        ({"embed": lora((7, 2), (2, 5))}, UnsupportedAdapterError, "not `token_embedding.lora_e"),
        ({"norm": jnp.ones(5)}, UnsupportedAdapterError, "not `norm.weight`"),
        ({"other": lora((5, 2), (2, 3))}, AdapterMismatchError, "no module for `other`"),
        ({"to_q": jnp.array([[np.nan]])}, UnsupportedAdapterError, "not `blocks.0.attn.to_q.w"),
    ],
    ids=["embedding", "full", "no name", "full matrix"],
)
def test_kinds_that_diffusers_cannot_store_raise(tmp_path, row, error, message):
    with pytest.raises(error, match=message):
        save_diffusers(tmp_path / "out", make_tunable(**row), NAMES)
    assert not list(tmp_path.iterdir())


def test_adapter_without_factors_raises(tmp_path):
    with pytest.raises(UnsupportedAdapterError, match="no parameter has factors"):
        save_diffusers(tmp_path, {"norm": None}, NAMES)


# Reading


def config_for(**values):
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["to_q"]}
    return config | values


def write_file(tensors, header):
    metadata = {"format": "pt", "lora_adapter_metadata": json.dumps(header)}
    safetensors.numpy.save_file(tensors, "pytorch_lora_weights.safetensors", metadata)


PARTLESS = ["blocks.0.attn.to_q", "blocks.1.attn.to_q", "mid.to_q"]


@pytest.mark.parametrize("modules", [PARTLESS[:1], PARTLESS[:2], PARTLESS], ids=["1", "2", "3"])
def test_names_without_a_part_are_unchanged(shell, files, modules):
    """`model.save_lora_adapter` writes a part neither in tensor names nor in the header."""
    write_file({k: x for m in modules for k, x in files.pair(m, 6, 5).items()}, config_for())
    shell.succeed("convert pytorch_lora_weights.safetensors peft --to peft")
    tensors = files.read("peft/adapter_model.safetensors")
    names = {name.removeprefix("base_model.model.").rpartition(".lora_")[0] for name in tensors}
    assert names == set(modules)
    shell.succeed("convert pytorch_lora_weights.safetensors out --to diffusers")
    converted = files.read("out/pytorch_lora_weights.safetensors")
    assert converted.keys() == {f"{m}.lora_{x}.weight" for m in modules for x in "AB"}


@pytest.mark.parametrize("part", ["unet", "transformer", "text_encoder_2"])
def test_convert_keeps_the_part(shell, files, part):
    pair = files.pair(f"{part}.down.to_q", 6, 5)
    write_file(pair, {f"{part}.{k}": v for k, v in config_for().items()})
    line = "convert pytorch_lora_weights.safetensors out --to diffusers --fold-scale"
    shell.succeed(line)
    tensors = files.read("out/pytorch_lora_weights.safetensors")
    assert tensors.keys() == pair.keys()
    factor = f"{part}.down.to_q.lora_B.weight"
    np.testing.assert_array_equal(tensors[factor], 2 * pair[factor])
    shell.succeed(f"{line} --prefix other")
    assert all(k.startswith("other.") for k in files.read("out/pytorch_lora_weights.safetensors"))


def test_part_without_a_config_has_scale_1(shell, files):
    pairs = [files.pair(f"{part}.down.to_q", 6, 5) for part in ("unet", "text_encoder")]
    write_file(pairs[0] | pairs[1], {f"unet.{k}": v for k, v in config_for().items()})
    shell.succeed("convert pytorch_lora_weights.safetensors out --to diffusers --fold-scale")
    tensors = files.read("out/pytorch_lora_weights.safetensors")
    for pair, scale in zip(pairs, (2, 1), strict=True):
        factor = next(name for name in pair if "lora_B" in name)
        np.testing.assert_array_equal(tensors[factor], scale * pair[factor])
