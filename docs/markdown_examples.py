"""A pytest plugin, loaded by `nox -s docs`: runs the python blocks of each Markdown page.

The blocks of one page run in order and share their names, as a reader would type them.
"""

import importlib.util
from pathlib import Path

from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser

ROOT = Path(__file__).parents[1]
HF = ROOT / "packages" / "lorax-hf" / "src" / "lorax_hf"
# What needs PyTorch: the session `torch` runs it.
WITH_TORCH = [ROOT / "docs" / "frameworks" / "pytorch.md", HF / "_torch", HF / "_pytorch.py"]


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Leaves out tutorials, which run as the site is built, and PyTorch where it is missing."""
    if collection_path == ROOT / "docs" / "tutorials":
        return True
    missing = importlib.util.find_spec("torch") is None
    return True if missing and collection_path in WITH_TORCH else None


pytest_collect_file = Sybil(
    parsers=[PythonCodeBlockParser(), SkipParser()],
    path=str(ROOT),
    patterns=["*.md", "**/*.md"],
).pytest()
