import re
import subprocess
import sys

import numpy as np
import pytest
import transformers

import lorax_hf


@pytest.mark.parametrize("version", ["5.0.0", "5.0.0rc1", "11.2"])
def test_versions_without_flax_are_refused(version):
    with pytest.raises(ImportError, match=re.escape(version) + ".*holds no Flax models"):
        lorax_hf.check_transformers(version)


def test_message_gives_the_declared_range():
    with pytest.raises(ImportError, match=r'pip install "transformers.*<5.*"'):
        lorax_hf.check_transformers("5.0.0")


@pytest.mark.parametrize("version", ["4.57.0", "4.57.6"])
def test_versions_with_flax_are_accepted(version):
    lorax_hf.check_transformers(version)


def test_import_is_refused_beside_a_new_transformers():
    code = (
        "import importlib.metadata as m; real = m.version;"
        "m.version = lambda name: '5.1.0' if name == 'transformers' else real(name);"
        "import lorax_hf"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode != 0
    assert "transformers 5.1.0 holds no Flax models" in run.stderr


def test_installed_flax_models_run():
    # The declared ranges of flax and transformers promise this much; nothing is downloaded.
    config = transformers.GPT2Config(
        n_layer=1, n_embd=16, n_head=2, vocab_size=31, n_positions=16, use_cache=False
    )
    model = transformers.FlaxGPT2LMHeadModel(config)
    outputs = model(np.arange(5)[None], return_dict=False)
    assert outputs[0].shape == (1, 5, 31)
