"""Adapters of PyTorch modules have the same outputs in JAX and in PEFT on PyTorch.

Runs a sample of the types of `nox -s sweep-torch`, with the same code.
"""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import safetensors.numpy
import torch
import transformers
from peft.utils import constants
from sweep.trial import try_model

import lorax
import lorax_hf
import lorax_io
from lorax import testing
from lorax_hf._torch._targets import DEFAULT_TARGETS

SAMPLE = {
    "causal: llama": 16,
    "causal: gpt2": 10,
    "causal: mixtral": 16,
    "causal: gpt_oss": 16,
    "masked: deberta-v2": 14,
    "seq2seq: t5": 25,
    "image: vit": 14,
    "diffusers: DiTTransformer2DModel": 20,
}


@pytest.mark.parametrize("title", SAMPLE)
def test_sampled_type_agrees_with_peft(title):
    finding = try_model(title)
    assert not finding.fault
    assert finding.forward <= 1e-5
    assert finding.weights == finding.factored >= SAMPLE[title]
    assert not finding.axes_differ and not finding.left_out
    assert finding.merged <= 1e-5
    assert finding.peft is not None and finding.peft <= 1e-4


# PEFT 0.21 uses an attribute that transformers 5.24 has renamed.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize("saved_by_us", [True, False], ids=["we write", "PEFT writes"])
def test_router_roundtrip_with_peft(saved_by_us, tmp_path):
    """A router, whose module class PEFT does not support, in `target_parameters`."""
    config = transformers.MixtralConfig(
        vocab_size=61,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=3,
    )
    folder = tmp_path / "adapter"
    torch.manual_seed(0)
    module = transformers.MixtralForCausalLM(config).eval()
    fn, params = lorax_hf.from_torch(module)
    names = lorax_hf.peft_names(module)
    if saved_by_us:
        ids = jnp.arange(8).reshape(2, 4)
        spec = lorax_hf.spec(fn, rank=2, targets=["mlp.gate"], inputs=(ids,))
        pair = lorax.init_lora(params, spec, jax.random.key(0))
        tunable = testing.random_factors(pair.tunable, jax.random.key(1))
        lorax_io.save_peft(folder, tunable, names, task_type="CAUSAL_LM")
    else:
        options = peft.LoraConfig(
            r=2, lora_alpha=3, target_modules=[], target_parameters=["mlp.gate.weight"]
        )
        peft_model = peft.get_peft_model(module, options)
        with torch.no_grad():
            for name, parameter in peft_model.named_parameters():
                if "lora_" in name:
                    parameter.normal_()
        peft_model.save_pretrained(folder)
        module = peft_model.unload()
    pair = lorax_io.load_peft(folder, params, names)
    assert sum(leaf is not None for leaf in jax.tree.leaves(pair.tunable)) == 4
    merged = lorax.merge_params(*pair)
    base = {name: tensor.numpy() for name, tensor in module.state_dict().items()}
    safetensors.numpy.save_file(base, tmp_path / "base.safetensors")
    expected = peft.PeftModel.from_pretrained(module, folder).merge_and_unload().state_dict()
    for name, array in merged.items():
        np.testing.assert_allclose(array, expected[name].numpy(), atol=1e-5, err_msg=name)
    # The command gets the names from the base file.
    command = [sys.executable, "-m", "lorax_io._cli", "merge", "adapter"]
    subprocess.run(
        [*command, "--base", "base.safetensors", "--out", "merged"], cwd=tmp_path, check=True
    )
    from_command = safetensors.numpy.load_file(tmp_path / "merged" / "base.safetensors")
    for name, array in from_command.items():
        np.testing.assert_allclose(array, expected[name].numpy(), atol=1e-5, err_msg=name)
    gate = "model.layers.1.mlp.gate.weight"
    assert jnp.abs(merged[gate] - params[gate]).max() > 0.1


def test_default_targets_are_those_of_peft():
    table = constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    targets = {k: v if isinstance(v, str) else list(v) for k, v in DEFAULT_TARGETS.items()}
    assert targets.items() <= table.items()
    # transformers no longer has these model types.
    removed = {"RefinedWeb", "RefinedWebModel", "btlm", "rwkv7"}
    assert table.keys() - targets.keys() == removed, peft.__version__
