"""Tests of examples/finetune/finetune_torch.py and benchmarks/torch_step.py."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest
import tiny_gguf
import torch

import finetune
import finetune_torch
import job
import lorax
import lorax_io
import torch_step
from lorax import testing

ARGS = SimpleNamespace(rank=3, alpha=5)
# PEFT 0.21 uses an attribute that transformers 5.24 has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


def test_own_and_transformers_llama_agree_on_the_same_file(tmp_path):
    path = tiny_gguf.write(tmp_path / "tiny.gguf")
    module = finetune_torch.read(path)
    assert all(parameter.dtype == torch.float32 for parameter in module.parameters())
    own, hf = finetune.load(path, ARGS)[1], finetune_torch.subject_of(module, ARGS)
    batch = np.array([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]], np.int32), np.array([4, 2], np.int32)
    logits = own.model(own.params, *batch)
    assert logits.shape == (2, 11)
    np.testing.assert_allclose(hf.model(hf.params, *batch), logits, rtol=2e-4, atol=2e-4)

    pair = lorax.init_lora(hf.params, hf.spec, jax.random.key(0))
    tunable = testing.random_factors(pair.tunable, jax.random.key(1))
    folder = tmp_path / "adapter"
    lorax_io.save_peft(folder, tunable, hf.names, task_type="CAUSAL_LM")
    adapted = lorax.lora(hf.model)((pair.frozen, tunable), *batch)
    largest = np.abs(adapted).max()
    assert np.abs(adapted - logits).max() > 0.1 * largest
    in_peft = finetune_torch.peft_logits(module, SimpleNamespace(folder=folder, batch=batch))
    np.testing.assert_allclose(in_peft, adapted, atol=1e-4 * largest)
    own_pair = lorax_io.load_peft(folder, own.params, own.names)
    in_own = lorax.lora(own.model)(own_pair, *batch)
    np.testing.assert_allclose(in_own, adapted, atol=1e-4 * largest)


def test_adapter_forms_agree_on_a_quantized_base(tmp_path):
    module = finetune_torch.read(tiny_gguf.write(tmp_path / "tiny.gguf"))
    in_floats = finetune_torch.subject_of(module, ARGS)
    subject = finetune_torch.quantized(in_floats, "int8")
    batch = np.array([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]], np.int32), np.array([4, 2], np.int32)
    frozen, tunable = lorax.init_lora(subject.params, subject.spec, jax.random.key(0))
    tunable = testing.random_factors(tunable, jax.random.key(1))
    folder = tmp_path / "adapter"
    lorax_io.save_peft(folder, tunable, subject.names, task_type="CAUSAL_LM")
    logits, reloaded, merged, base = job.forms_of(subject, (frozen, tunable), folder, batch)
    assert max(reloaded, merged) < 1e-4 < 0.1 < base

    floats = lorax.dequantize(subject.params)
    changed = {name for name in floats if (floats[name] != in_floats.params[name]).any()}
    assert changed == {name for name in floats if "_proj" in name}
    finetune_torch.set_parameters(module, floats)
    in_peft = finetune_torch.peft_logits(module, SimpleNamespace(folder=folder, batch=batch))
    np.testing.assert_allclose(in_peft, logits, atol=1e-4 * np.abs(logits).max())


def test_torch_step_compares_equal_losses():
    rows = torch_step.main(["--layers", "2", "--vocabulary", "64", "--rounds", "1"])
    assert rows[torch_step.OURS]["flops"] <= 1.01 * rows[torch_step.HAND_WRITTEN]["flops"]
    assert torch_step.PEFT in rows
