"""diffusers and lorax-io read each other's files, including kohya's and Flux's names."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch
from diffusers import FluxTransformer2DModel, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.loaders import FluxLoraLoaderMixin, StableDiffusionLoraLoaderMixin
from peft import get_peft_model_state_dict

import lorax
from lorax import testing
from lorax_io import Linear, load_any, open_adapter, save_diffusers, save_kohya
from lorax_io._command import main


@pytest.fixture(scope="module")
def flux():
    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        axes_dims_rope=[4, 4, 8],
    )
    return model.eval()


def output(model):
    with torch.no_grad():
        return model(
            hidden_states=torch.sin(torch.arange(24.0)).reshape(1, 6, 4),
            encoder_hidden_states=torch.cos(torch.arange(24.0)).reshape(1, 3, 8),
            pooled_projections=torch.ones(1, 8),
            timestep=torch.tensor([0.3]),
            img_ids=torch.zeros(6, 3),
            txt_ids=torch.zeros(3, 3),
        ).sample.numpy()


@pytest.mark.parametrize("fold_scale", [False, True], ids=["header", "folded"])
def test_diffusers_equals_the_merged_model(flux, tmp_path, fold_scale):
    names = {
        f"{name}.weight": Linear(name, in_axes=(1,), out_axes=(0,))
        for name, module in flux.named_modules()
        if isinstance(module, torch.nn.Linear) and name.endswith(("to_q", "to_v", "to_out.0"))
    }
    params = {path: jnp.asarray(flux.get_parameter(path).detach().numpy()) for path in names}
    leaf = lorax.LoraSpec(3, alpha=11, in_axes=(1,), out_axes=(0,))
    spec = dict.fromkeys(params, leaf)
    spec[next(iter(spec))] = lorax.LoraSpec(2, alpha=5, in_axes=(1,), out_axes=(0,))
    frozen, tunable = lorax.init_lora(params, spec, jax.random.key(0))
    tunable = testing.random_factors(tunable, jax.random.key(1))
    save_diffusers(tmp_path, tunable, names, fold_scale=fold_scale)

    merged = copy.deepcopy(flux)
    for path, weight in lorax.merge_params(frozen, tunable).items():
        with torch.no_grad():
            merged.get_parameter(path).copy_(torch.tensor(np.asarray(weight)))
    expected, base = output(merged), output(flux)
    assert np.abs(expected - base).max() > 1e-2 * np.abs(base).max()
    adapted = copy.deepcopy(flux)
    adapted.load_lora_adapter(
        tmp_path, weight_name="pytorch_lora_weights.safetensors", prefix="transformer"
    )
    np.testing.assert_allclose(
        output(adapted), expected, rtol=0, atol=1e-5 * np.abs(expected).max()
    )


# kohya's names, and diffusers' reader of them


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=2,
    ).eval()


def noise(model):
    with torch.no_grad():
        sample = torch.sin(torch.arange(256.0)).reshape(1, 4, 8, 8)
        text = torch.cos(torch.arange(24.0)).reshape(1, 3, 8)
        return model(sample, torch.tensor(3), encoder_hidden_states=text).sample.numpy()


def make_adapter(unet):
    names = {
        f"{name}.weight": Linear(name, in_axes=(1,), out_axes=(0,))
        for name, module in unet.named_modules()
        if isinstance(module, torch.nn.Linear) and name.endswith(("to_q", "to_v", "to_out.0"))
    }
    params = {path: jnp.asarray(unet.get_parameter(path).detach().numpy()) for path in names}
    # One alpha for all, since diffusers 0.35 does not find those of single attention layers.
    spec = dict.fromkeys(params, lorax.LoraSpec(3, alpha=11, in_axes=(1,), out_axes=(0,)))
    pair = lorax.init_lora(params, spec, jax.random.key(0))
    tunable = testing.random_factors(pair.tunable, jax.random.key(1))
    return names, lorax.Pair(pair.frozen, tunable)


def with_weights(unet, weights):
    merged = copy.deepcopy(unet)
    for path, weight in weights.items():
        with torch.no_grad():
            merged.get_parameter(path).copy_(torch.tensor(np.asarray(weight)))
    return merged


def loaded_by_diffusers(unet, file):
    loader = StableDiffusionLoraLoaderMixin
    state, alphas = loader.lora_state_dict(str(file.parent), weight_name=file.name)
    adapted = copy.deepcopy(unet)
    loader.load_lora_into_unet(state, alphas, adapted)
    return adapted


def test_diffusers_loads_our_kohya_file(unet, tmp_path):
    names, pair = make_adapter(unet)
    save_kohya(tmp_path / "style.safetensors", pair.tunable, names)
    expected = noise(with_weights(unet, lorax.merge_params(pair)))
    assert np.abs(expected - noise(unet)).max() > 1e-2 * np.abs(expected).max()
    actual = noise(loaded_by_diffusers(unet, tmp_path / "style.safetensors"))
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_command_merges_kohya_file_into_diffusers_model(unet, tmp_path):
    names, pair = make_adapter(unet)
    file = tmp_path / "style.safetensors"
    save_kohya(file, pair.tunable, names)
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "model_index.json").write_text("{}")
    unet.save_pretrained(tmp_path / "pipeline" / "unet")
    base, out = str(tmp_path / "pipeline"), str(tmp_path / "merged")
    assert main(["merge", str(file), "--base", base, "--out", out]) == 0
    merged = UNet2DConditionModel.from_pretrained(tmp_path / "merged" / "unet").eval()
    expected = noise(loaded_by_diffusers(unet, file))
    np.testing.assert_allclose(noise(merged), expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_diffusers_files_are_loaded(unet, tmp_path):
    names, pair = make_adapter(unet)
    save_kohya(tmp_path / "style.safetensors", pair.tunable, names)
    adapted = loaded_by_diffusers(unet, tmp_path / "style.safetensors")
    adapted.save_lora_adapter(tmp_path / "bare", adapter_name="default_0")
    layers = get_peft_model_state_dict(adapted, adapter_name="default_0")
    StableDiffusionPipeline.save_lora_weights(tmp_path / "parts", unet_lora_layers=layers)
    params = {path: pair.frozen[path] for path in names}
    for folder, part in (("bare", ""), ("parts", "unet")):
        assert open_adapter(tmp_path / folder).part == part
    loaded = load_any(tmp_path / "bare", params, names)
    actual, expected = noise(with_weights(unet, lorax.merge_params(loaded))), noise(adapted)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


# Flux in its original names, and diffusers' table of them

D, MLP, RANK = 3072, 12288, 2
ORIGINAL = {  # outputs, inputs
    "double_blocks_0_img_attn_qkv": (3 * D, D),
    "double_blocks_0_txt_attn_qkv": (3 * D, D),
    "double_blocks_3_img_attn_proj": (D, D),
    "double_blocks_3_txt_attn_proj": (D, D),
    "double_blocks_3_img_mlp_0": (MLP, D),
    "double_blocks_3_img_mlp_2": (D, MLP),
    "double_blocks_3_txt_mlp_0": (MLP, D),
    "double_blocks_3_txt_mlp_2": (D, MLP),
    "double_blocks_18_img_mod_lin": (6 * D, D),
    "double_blocks_18_txt_mod_lin": (6 * D, D),
    "single_blocks_0_linear1": (3 * D + MLP, D),
    "single_blocks_7_linear2": (D, D + MLP),
    "single_blocks_37_modulation_lin": (3 * D, D),
    "img_in": (D, 64),
    "txt_in": (D, 4096),
    "time_in_in_layer": (D, 256),
    "time_in_out_layer": (D, D),
    "vector_in_in_layer": (D, 768),
    "vector_in_out_layer": (D, D),
    "guidance_in_in_layer": (D, 256),
    "guidance_in_out_layer": (D, D),
    "final_layer_linear": (64, D),
    "final_layer_adaLN_modulation_1": (2 * D, D),
}
# diffusers ignores alpha for these names.
NO_ALPHA = ("img_in", "txt_in", "time_in", "vector_in", "guidance_in", "final_layer")


def test_fused_flux_layers_are_split_as_in_diffusers(tmp_path):
    numbers = np.random.default_rng(0)
    draw = lambda *shape: numbers.normal(size=shape).astype(np.float32)  # noqa: E731
    tensors = {}
    for module, (fan_out, fan_in) in ORIGINAL.items():
        tensors[f"lora_unet_{module}.lora_down.weight"] = draw(RANK, fan_in)
        tensors[f"lora_unet_{module}.lora_up.weight"] = draw(fan_out, RANK)
        if not module.startswith(NO_ALPHA):
            tensors[f"lora_unet_{module}.alpha"] = np.asarray(5, np.float32)
    file = tmp_path / "style.safetensors"
    safetensors.numpy.save_file(tensors, file)
    state = FluxLoraLoaderMixin.lora_state_dict(str(tmp_path), weight_name=file.name)
    assert main(["convert", str(file), str(tmp_path / "out"), "--to", "diffusers"]) == 0
    opened = open_adapter(tmp_path / "out")
    assert opened.part == "transformer"
    modules = {torch_name.module: opened.rows[path] for path, torch_name in opened.names.items()}
    expected = {key.removeprefix("transformer.").partition(".lora_")[0] for key in state}
    assert modules.keys() == expected and len(expected) == len(ORIGINAL) + 2 + 2 + 3
    for module, row in modules.items():
        # diffusers omits the prefix from the names of some layers.
        prefix = next(p for p in ("transformer.", "") if f"{p}{module}.lora_A.weight" in state)
        a, b = (state[f"{prefix}{module}.lora_{x}.weight"].numpy() for x in "AB")
        if module == "norm_out.linear":
            a = a[::-1]  # diffusers also swaps the halves of this factor, along the rank
        left, right = np.asarray(row.a), row.scale * np.asarray(row.b)
        x = numbers.normal(size=(4, left.shape[0])).astype(np.float32)
        np.testing.assert_allclose(x @ left @ right, x @ a.T @ b.T, rtol=2e-3, atol=2e-3)


def test_flux_layers_are_fused_as_diffusers_splits_them(tmp_path):
    """Adapters of q, k and v are fused in Flux's names, and diffusers splits them again."""
    numbers = np.random.default_rng(1)
    draw = lambda *shape: numbers.normal(size=shape).astype(np.float32)  # noqa: E731
    double, single = "transformer_blocks.0.", "single_transformer_blocks.0."
    sizes = {
        **{f"{double}attn.to_{x}": D for x in "qkv"},
        **{f"{double}attn.add_{x}_proj": D for x in "qkv"},
        **{f"{double}attn.{x}": D for x in ("to_out.0", "to_add_out")},
        **{f"{single}attn.to_{x}": D for x in "qkv"},
        f"{single}proj_mlp": 4 * D,
    }
    tensors, expected = {}, {}
    for module, fan_out in sizes.items():
        a, b = draw(RANK, D), draw(fan_out, RANK)
        tensors |= {f"transformer.{module}.lora_A.weight": a}
        tensors |= {f"transformer.{module}.lora_B.weight": b}
        expected[module] = b @ a
    safetensors.numpy.save_file(tensors, tmp_path / "diffusers.safetensors")
    file = tmp_path / "style.safetensors"
    assert (
        main(["convert", str(tmp_path / "diffusers.safetensors"), str(file), "--to", "kohya"]) == 0
    )
    state = FluxLoraLoaderMixin.lora_state_dict(str(tmp_path), weight_name=file.name)
    modules = {key.removeprefix("transformer.").partition(".lora_")[0] for key in state}
    assert modules == expected.keys()
    for module, delta in expected.items():
        a, b = (state[f"transformer.{module}.lora_{x}.weight"].numpy() for x in "AB")
        np.testing.assert_allclose(b @ a, delta, rtol=2e-3, atol=2e-3)
