"""Flax models of transformers and their adapters have the same outputs in PyTorch.

All parameters are loaded into PyTorch by the names of lorax_hf, so a wrong name or a transposed
kernel changes the outputs.
"""

import os
import pathlib
import sys
import warnings

os.environ["HF_HUB_OFFLINE"] = "1"

import jax
import numpy as np
import pytest
import torch
import transformers
from peft import PeftModel

import lorax
import lorax_hf
from lorax import testing
from lorax_io import save_merged, save_peft

ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "packages" / "lorax-hf" / "tests" / "flax_models"))
import tiny  # noqa: E402

torch.set_num_threads(1)
jax.config.update("jax_disable_most_optimizations", True)

CLASSES = {kind: name for name, kind in tiny.classes().items()}
TOLERANCE = 4e-5  # relative to the largest output


def make(name):
    with warnings.catch_warnings(), lorax_hf.clip_mended():
        warnings.simplefilter("ignore")
        model = tiny.make(name)
        # Parameters of zero or one would hide misplaced values.
        params = testing.random_factors(model.params, jax.random.key(0))
        return model, jax.tree.map(lambda x, noise: x + 0.2 * noise, model.params, params)


def outputs(model, params, inputs):
    with lorax_hf.clip_mended():
        return main_output(model(**inputs, params=params))


def main_output(result):
    """The first output, or for a pair of encoders their embeddings instead of similarities."""
    pair = [result[name] for name in ("text_embeds", "image_embeds") if name in result]
    return np.concatenate([np.asarray(x) for x in pair or [result[0]]], axis=-1)


def in_torch(model, inputs):
    with torch.no_grad():
        return main_output(
            model(**{name: torch.tensor(np.asarray(x)) for name, x in inputs.items()})
        )


def assert_close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=TOLERANCE * np.abs(expected).max())


# The config has one key for all modules. PEFT corrects it for the other kind, with a warning.
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to")
@pytest.mark.parametrize("kind", CLASSES)
def test_adapted_model_has_the_same_outputs_in_pytorch(kind, tmp_path):
    model, params = make(CLASSES[kind])
    inputs, names = tiny.inputs_of(model), lorax_hf.peft_names(model)
    no_adapter = jax.tree.map(lambda leaf: None, params)
    save_merged(tmp_path / "base", params, no_adapter, names, config=model.config.to_dict())
    pretrained = getattr(transformers, CLASSES[kind].removeprefix("Flax"))
    torch_model, loading = pretrained.from_pretrained(tmp_path / "base", output_loading_info=True)
    assert not loading["unexpected_keys"] and not loading["mismatched_keys"], loading
    torch_model.eval()
    assert_close(in_torch(torch_model, inputs), outputs(model, params, inputs))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", lorax_hf.DefectWarning)
        targets = "default" if kind in ("resnet", "regnet") else "all-linear"
        spec = lorax_hf.spec(model, rank=2, alpha=3, targets=targets)
    frozen, tunable = lorax.init_lora(params, spec, jax.random.key(1))
    tunable = testing.random_factors(tunable, jax.random.key(2))
    save_peft(tmp_path / "adapter", tunable, names)
    adapted = PeftModel.from_pretrained(torch_model, tmp_path / "adapter")
    expected = outputs(model, lorax.merge_params(frozen, tunable), inputs)
    assert np.abs(expected - outputs(model, params, inputs)).max() > 1e-2 * np.abs(expected).max()
    assert_close(in_torch(adapted, inputs), expected)
