"""Checks that torchtune's adapters have torchtune's outputs when read."""

import json
import tempfile
import warnings
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import safetensors.torch
import torch
from torchtune.models.convert_weights import (
    tune_to_hf,
    tune_to_peft_adapter_config,
    tune_to_peft_adapter_weights,
)
from torchtune.models.llama2 import lora_llama2
from torchtune.modules.peft import get_adapter_params

import lorax
from lorax_io import AdapterWarning, Linear, load_any, load_peft

RANK, ALPHA = 3, 7.0
SIZES = {"num_heads": 4, "num_kv_heads": 2, "embed_dim": 16}
HEADS = {"num_heads": 4, "num_kv_heads": 2, "dim": 16}


def make_model(dora):
    torch.manual_seed(0)
    targets = ["q_proj", "k_proj", "v_proj", "output_proj"]
    model = lora_llama2(
        targets,
        apply_lora_to_mlp=True,
        vocab_size=32,
        num_layers=2,
        max_seq_len=8,
        intermediate_dim=24,
        lora_rank=RANK,
        lora_alpha=ALPHA,
        use_dora=dora,
        **SIZES,
    )
    for name, x in model.named_parameters():
        if name.endswith("magnitude"):
            x.data = torch.rand_like(x) + 0.5
        else:
            x.data = torch.randn_like(x) * 0.2
    return model.eval()


def outputs(model):
    with torch.no_grad():
        return model(torch.tensor([[1, 5, 9, 2, 7]])).numpy()


def merged(model, pair):
    """A copy of the model with merged weights and without factors."""
    state = {name: x.clone() for name, x in model.state_dict().items()}
    for name, x in lorax.merge_params(pair).items():
        state[f"{name}.weight"] = torch.tensor(np.asarray(x))
    plain = make_model(False)
    plain.load_state_dict({k: v for k, v in state.items() if not k.endswith("magnitude")})
    for name, x in plain.named_parameters():
        if name.endswith("lora_b.weight"):
            x.data.zero_()
    return plain


def check(home, dora):
    model = make_model(dora)
    adapter = {k: v.detach().clone() for k, v in get_adapter_params(model).items()}
    base = {k: v for k, v in model.state_dict().items() if k not in adapter}
    axes = {"in_axes": (1,), "out_axes": (0,)}
    modules = sorted({name.partition(".lora_")[0] for name in adapter if ".lora_" in name})
    params = {name: jnp.asarray(base[f"{name}.weight"].numpy()) for name in modules}
    names = {name: Linear(name, **axes) for name in modules}
    file = home / f"own {dora}.safetensors"
    safetensors.torch.save_file(adapter, file)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AdapterWarning)
        pair = load_any(file, params, names, alpha=ALPHA)
    expected = outputs(model)
    actual = outputs(merged(model, pair))
    error = np.abs(actual - expected).max() / np.abs(expected).max()
    assert error < 1e-5, error
    print(f"torchtune's names, DoRA {dora}: error {error:.1e}")
    return adapter, base, pair


def check_peft(home, adapter, base, pair):
    """Checks that torchtune's PEFT folder of the same adapter gives the same weights."""
    folder = home / "peft"
    folder.mkdir()
    weights = tune_to_peft_adapter_weights(dict(adapter), **HEADS)
    safetensors.torch.save_file(
        {k: v.contiguous() for k, v in weights.items()}, folder / "adapter_model.safetensors"
    )
    targets = ["q_proj", "k_proj", "v_proj", "output_proj", "w1", "w2", "w3"]
    config = {"r": RANK, "lora_alpha": ALPHA, "target_modules": targets, "peft_type": "LORA"}
    (folder / "adapter_config.json").write_text(json.dumps(tune_to_peft_adapter_config(config)))
    in_hf = {k: v.numpy() for k, v in tune_to_hf(dict(base), **HEADS).items()}
    modules = [key.rpartition(".lora_A")[0][len("base_model.model.") :] for key in weights]
    modules = sorted({name for name in modules if name})
    params = {name: jnp.asarray(in_hf[f"{name}.weight"]) for name in modules}
    names = {name: Linear(name, in_axes=(1,), out_axes=(0,)) for name in modules}
    from_peft = lorax.merge_params(load_peft(folder, params, names))
    ours = {
        f"{name}.weight": torch.tensor(np.asarray(x))
        for name, x in lorax.merge_params(pair).items()
    }
    expected = tune_to_hf(ours, **HEADS)
    for name in modules:
        np.testing.assert_allclose(from_peft[name], expected[f"{name}.weight"].numpy(), atol=1e-6)
    print(f"{len(modules)} modules of torchtune's PEFT folder are equal")


with tempfile.TemporaryDirectory() as temporary:
    home = Path(temporary)
    check_peft(home, *check(home, False))
    check(home, True)
