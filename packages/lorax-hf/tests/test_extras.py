"""Extras: the package can be imported without either, and errors name the missing one."""

import importlib.metadata
import importlib.util
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import lorax_hf
from lorax_hf import _extras

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"


@pytest.mark.parametrize("version", ["5.0.0", "5.0.0rc1", "11.2"])
def test_versions_without_flax_raise(version):
    message = re.escape(version) + r" has no Flax models.*lorax-hf\[flax\].*lorax-hf\[torch\]"
    with pytest.raises(ImportError, match=message):
        _extras.refuse_transformers_5(version)


@pytest.mark.parametrize("version", ["4.57.0", "4.57.6"])
def test_versions_with_flax_are_accepted(version):
    _extras.refuse_transformers_5(version)


def test_package_imports_without_either_part():
    code = (
        "import sys, importlib.abc\n"
        "class Refuses(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] in ('flax', 'transformers', 'torch', 'torchax'):\n"
        "            raise AssertionError(f'imports {name}')\n"
        "sys.meta_path.insert(0, Refuses())\n"
        "import lorax_hf\n"
        "[getattr(lorax_hf, name) for name in lorax_hf.__all__]\n"
        "with lorax_hf.clip_mended(): pass\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("missing", "extra"),
    [("flax", "flax"), ("transformers", "flax"), ("torch", "torch"), ("torchax", "torch")],
)
def test_missing_package_raises_with_its_extra(monkeypatch, missing, extra):
    find_spec = importlib.util.find_spec

    def without(name, *rest):
        return (
            None
            if name == missing
            else find_spec("json")
            if name in _PARTS
            else find_spec(name, *rest)
        )

    monkeypatch.setattr(importlib.util, "find_spec", without)
    with pytest.raises(ImportError, match=rf"needs {missing} for .*lorax-hf\[{extra}\]"):
        _extras.need(extra)


_PARTS = {name for _, names in _extras.EXTRAS.values() for name in names}


def test_newer_transformers_without_flax_raises(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: object())
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "5.1.0")
    with pytest.raises(ImportError, match="transformers 5.1.0 has no Flax models"):
        _extras.need("flax")


def test_each_part_is_an_extra():
    project = tomllib.loads(PYPROJECT.read_text())["project"]
    assert project["optional-dependencies"].keys() == _extras.EXTRAS.keys()
    for extra, (_, modules) in _extras.EXTRAS.items():
        assert set(modules) <= _names(project["optional-dependencies"][extra])
    assert _names(project["dependencies"]) == {"lorax-core"}


def _names(requirements):
    return {re.split(r"[^\w-]", requirement)[0] for requirement in requirements}


@pytest.mark.parametrize("call", [lorax_hf.spec, lorax_hf.peft_names, lorax_hf.lora])
def test_non_model_raises(call):
    with pytest.raises(TypeError, match="PyTorch module.*Flax model.*not int"):
        call(3)
