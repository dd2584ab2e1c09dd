"""The table of formats agrees with the documentation and the command."""

import pathlib
import re

import pytest

import lorax_io
from lorax_io._command.convert import WRITERS
from lorax_io._formats.table import FORMATS

DOCS = pathlib.Path(__file__).parents[4] / "docs" / "adapters.md"
ONLY_WRITTEN = {"gguf": ("a GGUF file for llama.cpp", "save_gguf")}


def rows():
    """The rows of the table in the docs."""
    for name, row in FORMATS.items():
        [loads] = re.findall(r"lorax_io\.(\w+)\(", row.loads)
        yield name if row.saved else None, row.description, loads, row.saved
    for name, (description, saved) in ONLY_WRITTEN.items():
        yield name, description, None, saved


@pytest.mark.skipif(not DOCS.exists(), reason="the documentation is not in the sdist")
def test_docs_have_the_table_of_formats():
    code = lambda text: f"`{text}`" if text else ""  # noqa: E731
    lines = [
        f"| {description} | {code(name)} | {code(loads)} | {code(saved)} |"
        for name, description, loads, saved in rows()
    ]
    text = DOCS.read_text()
    table = text[text.index("| format |") :].partition("\n\n")[0].splitlines()[2:]
    assert table == lines


def test_command_offers_every_writable_format():
    assert WRITERS.keys() == {name for name, *_ in rows() if name}
    for _, _, *functions in rows():
        assert all(hasattr(lorax_io, name) for name in functions if name)
