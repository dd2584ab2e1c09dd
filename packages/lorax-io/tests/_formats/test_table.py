"""The table of formats: what the documentation, the command and the functions say of each."""

import pathlib
import re

import pytest

import lorax_io
from lorax_io._command.convert import WRITERS
from lorax_io._formats.table import FORMATS

DOCS = pathlib.Path(__file__).parents[4] / "docs" / "adapters.md"
ONLY_WRITTEN = {"gguf": ("a GGUF file for llama.cpp", "save_gguf")}


def rows():
    """The table of the page, a row for each format."""
    for name, row in FORMATS.items():
        [loads] = re.findall(r"lorax_io\.(\w+)\(", row.loads)
        yield name if row.saved else None, row.description, loads, row.saved
    for name, (description, saved) in ONLY_WRITTEN.items():
        yield name, description, None, saved


@pytest.mark.skipif(not DOCS.exists(), reason="the documentation is not in the sdist")
def test_the_page_has_the_table_of_the_code():
    code = lambda text: f"`{text}`" if text else ""  # noqa: E731
    lines = [
        f"| {description} | {code(name)} | {code(loads)} | {code(saved)} |"
        for name, description, loads, saved in rows()
    ]
    text = DOCS.read_text()
    table = text[text.index("| format |") :].partition("\n\n")[0].splitlines()[2:]
    assert table == lines


def test_every_format_that_is_written_is_a_choice_of_the_command():
    assert WRITERS.keys() == {name for name, *_ in rows() if name}
    for _, _, *functions in rows():
        assert all(hasattr(lorax_io, name) for name in functions if name)
