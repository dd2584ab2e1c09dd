"""The file for diffusers: its loader takes the scale that is in the header."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import FluxTransformer2DModel

import lorax
from lorax import testing
from lorax_io import Linear, save_diffusers


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
def test_diffusers_gives_the_output_of_the_merged_model(flux, tmp_path, fold_scale):
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
    ours, base = output(merged), output(flux)
    assert np.abs(ours - base).max() > 1e-2 * np.abs(base).max()
    adapted = copy.deepcopy(flux)
    adapted.load_lora_adapter(
        tmp_path, weight_name="pytorch_lora_weights.safetensors", prefix="transformer"
    )
    np.testing.assert_allclose(output(adapted), ours, rtol=0, atol=1e-5 * np.abs(ours).max())
