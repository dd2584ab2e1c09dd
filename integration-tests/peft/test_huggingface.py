"""Flax models of transformers and their adapters in PyTorch, by the names of lorax_hf.

Every parameter goes to PyTorch by its name and back in the outputs: a name that PyTorch does not
have, or a kernel that is transposed, cannot hide.
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
TOLERANCE = 4e-5  # of the largest output


def make(name):
    with warnings.catch_warnings(), lorax_hf.clip_mended():
        warnings.simplefilter("ignore")
        model = tiny.make(name)
        # No parameter at zero or one, where a misplaced one would not show.
        params = testing.random_factors(model.params, jax.random.key(0))
        return model, jax.tree.map(lambda old, new: old + 0.2 * new, model.params, params)


def outputs(model, params, inputs):
    with lorax_hf.clip_mended():
        return first(model(**inputs, params=params))


def first(actual):
    """The first of the outputs; of a pair of encoders their embeddings, not how alike they are."""
    pair = [actual[name] for name in ("text_embeds", "image_embeds") if name in actual]
    return np.concatenate([np.asarray(x) for x in pair or [actual[0]]], axis=-1)


def in_torch(model, inputs):
    with torch.no_grad():
        return first(model(**{name: torch.tensor(np.asarray(x)) for name, x in inputs.items()}))


def close(theirs, ours):
    np.testing.assert_allclose(theirs, ours, rtol=0, atol=TOLERANCE * np.abs(ours).max())


# One key of the config for all modules: PEFT mends it for those of the other kind, and says so.
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to")
@pytest.mark.parametrize("kind", CLASSES)
def test_the_adapted_model_is_the_same_in_pytorch(kind, tmp_path):
    model, params = make(CLASSES[kind])
    inputs, names = tiny.inputs_of(model), lorax_hf.peft_names(model)
    nothing = jax.tree.map(lambda leaf: None, params)
    save_merged(tmp_path / "base", params, nothing, names, config=model.config.to_dict())
    pretrained = getattr(transformers, CLASSES[kind].removeprefix("Flax"))
    torch_model, loading = pretrained.from_pretrained(tmp_path / "base", output_loading_info=True)
    assert not loading["unexpected_keys"] and not loading["mismatched_keys"], loading
    torch_model.eval()
    close(in_torch(torch_model, inputs), outputs(model, params, inputs))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", lorax_hf.DefectWarning)
        targets = "default" if kind in ("resnet", "regnet") else "all-linear"
        spec = lorax_hf.spec(model, rank=2, alpha=3, targets=targets)
    frozen, tunable = lorax.init_lora(params, spec, jax.random.key(1))
    tunable = testing.random_factors(tunable, jax.random.key(2))
    save_peft(tmp_path / "adapter", tunable, names)
    adapted = PeftModel.from_pretrained(torch_model, tmp_path / "adapter")
    ours = outputs(model, lorax.merge_params(frozen, tunable), inputs)
    assert np.abs(ours - outputs(model, params, inputs)).max() > 1e-2 * np.abs(ours).max()
    close(in_torch(adapted, inputs), ours)
