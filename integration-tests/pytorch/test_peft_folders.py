"""Adapters of PyTorch modules, trained form in JAX, in PEFT on PyTorch: equal outputs.

A sample of the types that `nox -s sweep-torch` runs, by the same code.
"""

import peft
import pytest
from peft.utils import constants
from sweep.trial import try_model

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
def test_types(title):
    finding = try_model(title)
    assert not finding.fault
    assert finding.forward <= 1e-5
    assert finding.weights == finding.factored >= SAMPLE[title]
    assert not finding.unlike
    assert finding.merged <= 1e-5
    assert finding.peft is not None and finding.peft <= 1e-4


def test_the_default_targets_are_those_of_peft():
    table = constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    ours = {k: v if isinstance(v, str) else list(v) for k, v in DEFAULT_TARGETS.items()}
    assert ours.items() <= table.items()
    # What is left out is in no module of transformers.
    gone = {"RefinedWeb", "RefinedWebModel", "btlm", "rwkv7"}
    assert table.keys() - ours.keys() == gone, peft.__version__
