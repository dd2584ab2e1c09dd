"""A pytest plugin, loaded by `nox -s docs`: runs the python blocks of each Markdown page.

The blocks of one page run in order and share their names, as a reader would type them.
"""

import importlib.util
import inspect
from pathlib import Path

import pytest
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser

ROOT = Path(__file__).parents[1]
HF = ROOT / "packages" / "lorax-hf" / "src" / "lorax_hf"
# What needs PyTorch: the session `torch` runs it.
HAS_TORCH = importlib.util.find_spec("torch") is not None
WITH_TORCH = [ROOT / "docs" / "frameworks" / "pytorch.md", HF / "_torch", HF / "_pytorch.py"]


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Leaves out tutorials, which run as the site is built, and PyTorch where it is missing."""
    if collection_path == ROOT / "docs" / "tutorials":
        return True
    return True if not HAS_TORCH and collection_path in WITH_TORCH else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leaves out examples of lorax_hf for the part that is not installed.

    Public names have the module `lorax_hf`, and so have their examples, wherever the code is.
    """
    items[:] = [item for item in items if not _is_of_missing_part(item)]


def _is_of_missing_part(item: pytest.Item) -> bool:
    if not isinstance(item, pytest.DoctestItem) or item.path != HF / "__init__.py":
        return False
    value = getattr(importlib.import_module("lorax_hf"), item.name.rpartition(".")[2], None)
    file = inspect.getsourcefile(value) if inspect.isfunction(value) else None
    return file is not None and (Path(file) in WITH_TORCH) != HAS_TORCH


pytest_collect_file = Sybil(
    parsers=[PythonCodeBlockParser(), SkipParser()],
    path=str(ROOT),
    patterns=["*.md", "**/*.md"],
).pytest()
