"""A pytest plugin, loaded by `nox -s docs`: runs the python blocks of each Markdown page.

The blocks of one page run in order and share their names, as a reader would type them.
"""

from pathlib import Path

from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser

pytest_collect_file = Sybil(
    parsers=[PythonCodeBlockParser(), SkipParser()],
    path=str(Path(__file__).parents[1]),
    patterns=["*.md", "**/*.md"],
).pytest()
