"""examples/huggingface_gpt2.py, with a tiny random model."""

import importlib.util
import json
import pathlib

import jax
import pytest

PROGRAM = pathlib.Path(__file__).parents[1] / "examples" / "huggingface_gpt2.py"


@pytest.fixture
def no_weights_as_constants():
    """JAX warns, which is an error here, if a program has its weights as constants."""
    previous = jax.config.jax_captured_constants_warn_bytes  # pyright: ignore[reportAttributeAccessIssue]
    jax.config.update("jax_captured_constants_warn_bytes", 20_000)
    yield
    jax.config.update("jax_captured_constants_warn_bytes", previous)


@pytest.mark.usefixtures("no_weights_as_constants")
def test_example_trains_and_saves(tmp_path):
    spec = importlib.util.spec_from_file_location("huggingface_gpt2", PROGRAM)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    losses, difference = module.main(["--steps", "12", "--out", str(tmp_path)])
    assert losses[-1] < 0.95 * losses[0]
    assert difference == 0
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["fan_in_fan_out"]) == (8, 16, True)
