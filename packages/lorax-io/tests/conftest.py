"""Fixtures: temporary folders, the command, and adapter files."""

import json
import pathlib
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, settings

from lorax_io._command import main
from lorax_io._disk.tensors import TensorFile

# The same examples in every run, without time limits, which a busy machine would exceed.
settings.register_profile(
    "lorax", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("lorax")

# For the helper modules in this folder.
sys.path.insert(0, str(pathlib.Path(__file__).parent))

PREFIX = "base_model.model."


class CommandResult(NamedTuple):
    """The output and exit code of a command."""

    code: int
    out: str
    err: str


class Shell:
    """Runs the command in the test's folder."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, line: str) -> CommandResult:
        code = main(line.split())
        printed: Any = self._capsys.readouterr()
        return CommandResult(code, printed.out, printed.err)

    def succeed(self, line: str, warning: str | None = None) -> str:
        """The output. There must be a warning with this text, or none by default."""
        code, out, err = self(line)
        assert code == 0, err
        assert err == "" if warning is None else warning in err
        return out

    def fail(self, line: str) -> str:
        """The error message, which must be the only output."""
        code, out, err = self(line)
        assert (code, out) == (2, "")
        assert err.startswith("lorax: ") and "Traceback" not in err
        return err


@pytest.fixture(autouse=True)
def _settings():
    """Restores the JAX settings that the command changes."""
    before = {name: getattr(jax.config, name) for name in ("jax_enable_x64", "jax_platforms")}
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture
def shell(tmp_path, monkeypatch, capsys):
    """The command in a temporary folder."""
    monkeypatch.chdir(tmp_path)
    return Shell(capsys)


@pytest.fixture
def file(tmp_path):
    """The path of an adapter file."""
    return tmp_path / "adapter.safetensors"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """One folder for all examples of a property test."""
    return tmp_path_factory.mktemp("fuzz")


@pytest.fixture
def place(tmp_path):
    """A valid native file and a valid PEFT folder."""
    from untrusted import Place

    return Place(tmp_path)


class Files:
    """Writes adapters and bases in the formats of other libraries."""

    def __init__(self) -> None:
        self._numbers = np.random.default_rng(7)

    def draw(self, *shape: int, dtype: Any = np.float32) -> np.ndarray[Any, Any]:
        """Random nonzero values."""
        return self._numbers.normal(0.5, 0.2, shape).astype(dtype)

    def pair(self, module: str, fan_out: int, fan_in: int, rank: int = 2) -> dict[str, Any]:
        """PEFT's factors of a linear module, without PEFT's prefix."""
        return {
            f"{module}.lora_A.weight": self.draw(rank, fan_in),
            f"{module}.lora_B.weight": self.draw(fan_out, rank),
        }

    def peft(self, tensors: Mapping[str, Any], folder: str = "adapter", **config: Any) -> None:
        """Writes a PEFT folder."""
        path = pathlib.Path(folder)
        path.mkdir(exist_ok=True)
        tensors = {PREFIX + name: tensor for name, tensor in tensors.items()}
        safetensors.numpy.save_file(tensors, path / "adapter_model.safetensors", {"format": "pt"})
        settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": [], **config}
        (path / "adapter_config.json").write_text(json.dumps(settings))

    def base(
        self,
        tensors: Mapping[str, Any],
        config: Mapping[str, Any] | None = None,
        folder: str = "base",
    ) -> None:
        """Writes a transformers folder, without a config if it is None."""
        path = pathlib.Path(folder)
        path.mkdir(exist_ok=True)
        safetensors.numpy.save_file(dict(tensors), path / "model.safetensors", {"format": "pt"})
        if config is not None:
            (path / "config.json").write_text(json.dumps(config))

    def read(self, file: str) -> dict[str, np.ndarray[Any, Any]]:
        """The tensors of a file, with any dtype."""
        with TensorFile(file) as opened:
            return {name: np.array(opened.view(name)) for name in opened.entries}


@pytest.fixture
def files(shell):
    return Files()
