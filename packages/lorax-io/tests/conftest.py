"""What tests of the command share: a separate folder, the command, and adapters as files."""

import json
import pathlib
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
import safetensors.numpy

from lorax_io._command import main
from lorax_io._disk.tensors import TensorFile

# What test files share is in modules beside this one.
sys.path.insert(0, str(pathlib.Path(__file__).parent))

PREFIX = "base_model.model."


class Ran(NamedTuple):
    """What a command printed, and its exit code."""

    code: int
    out: str
    err: str


class Shell:
    """The command, in a folder of the test's own."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, line: str) -> Ran:
        code = main(line.split())
        printed: Any = self._capsys.readouterr()
        return Ran(code, printed.out, printed.err)

    def succeed(self, line: str, warning: str | None = None) -> str:
        """Its output; there is a warning with this text, or none at all."""
        code, out, err = self(line)
        assert code == 0, err
        assert err == "" if warning is None else warning in err
        return out

    def fail(self, line: str) -> str:
        """Its message, which is all that it prints."""
        code, out, err = self(line)
        assert (code, out) == (2, "")
        assert err.startswith("lorax: ") and "Traceback" not in err
        return err


@pytest.fixture(autouse=True)
def _settings():
    """The settings of JAX that the command changes are restored after the test."""
    before = {name: getattr(jax.config, name) for name in ("jax_enable_x64", "jax_platforms")}
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture
def shell(tmp_path, monkeypatch, capsys):
    """The command in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    return Shell(capsys)


@pytest.fixture
def file(tmp_path):
    """Where an adapter is to be."""
    return tmp_path / "adapter.safetensors"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """One folder for all examples of a test of random files."""
    return tmp_path_factory.mktemp("fuzz")


@pytest.fixture
def place(tmp_path):
    """A sound native file and folder of PEFT."""
    from untrusted import Place

    return Place(tmp_path)


class Files:
    """Hand-written adapters and bases in the forms of other libraries."""

    def __init__(self) -> None:
        self._numbers = np.random.default_rng(7)

    def draw(self, *shape: int, dtype: Any = np.float32) -> np.ndarray[Any, Any]:
        """Random numbers, none of them zero."""
        return self._numbers.normal(0.5, 0.2, shape).astype(dtype)

    def pair(self, module: str, fan_out: int, fan_in: int, rank: int = 2) -> dict[str, Any]:
        """PEFT's two factors of a linear module, without PEFT's prefix."""
        return {
            f"{module}.lora_A.weight": self.draw(rank, fan_in),
            f"{module}.lora_B.weight": self.draw(fan_out, rank),
        }

    def peft(self, tensors: Mapping[str, Any], folder: str = "adapter", **config: Any) -> None:
        """A folder of PEFT."""
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
        """A folder of transformers; without config where it is None."""
        path = pathlib.Path(folder)
        path.mkdir(exist_ok=True)
        safetensors.numpy.save_file(dict(tensors), path / "model.safetensors", {"format": "pt"})
        if config is not None:
            (path / "config.json").write_text(json.dumps(config))

    def read(self, file: str) -> dict[str, np.ndarray[Any, Any]]:
        """The tensors of a file, of any type."""
        with TensorFile(file) as opened:
            return {name: np.array(opened.view(name)) for name in opened.entries}


@pytest.fixture
def files(shell):
    return Files()
