"""Turns each tutorial, a Python file, into a page with outputs and a notebook.

The files are in jupytext's percent format. They run when the site is built, and an error fails the
build. Outputs are cached by the file's hash, so that `--serve` only runs changed files.
"""

import hashlib
import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

from website.versions import INSTALL

CACHE = Path(__file__).parents[1] / ".cache" / "tutorials"
COLAB = "https://colab.research.google.com"


def pages(folder: Path, repository: str) -> dict[str, str]:
    """The content of the page and of the notebook of each tutorial, by path in docs/."""
    content: dict[str, str] = {}
    for source in sorted(folder.glob("*.py")):
        notebook = run(source)
        name = f"{folder.name}/{source.stem}"
        content[f"{name}.md"] = page(notebook, name, repository)
        content[f"{name}.ipynb"] = nbformat.writes(without_outputs(notebook))
    return content


def run(source: Path) -> NotebookNode:
    """The notebook with the outputs of its cells."""
    text = source.read_text(encoding="utf-8")
    cached = CACHE / f"{hashlib.sha256(text.encode()).hexdigest()}.ipynb"
    if os.environ.get("SITE_KEEP_OUTPUTS") and cached.exists():
        return nbformat.read(cached, as_version=4)
    CACHE.mkdir(parents=True, exist_ok=True)
    notebook = jupytext.reads(text, fmt="py:percent")
    NotebookClient(notebook, timeout=300, kernel_name="python3").execute(cwd=str(CACHE))
    nbformat.write(notebook, cached)
    return notebook


def without_outputs(notebook: NotebookNode) -> NotebookNode:
    """The notebook for download: without outputs, and with a cell that installs the packages."""
    install = nbformat.v4.new_code_cell(
        f"%pip install --quiet optax flax matplotlib scikit-learn {INSTALL}"
    )
    cells = [
        nbformat.v4.new_code_cell(cell.source)
        if cell.cell_type == "code"
        else nbformat.v4.new_markdown_cell(cell.source)
        for cell in notebook.cells
    ]
    language = {"language_info": {"name": "python"}}
    return nbformat.v4.new_notebook(cells=[cells[0], install, *cells[1:]], metadata=language)


def page(notebook: NotebookNode, name: str, repository: str) -> str:
    """The page: links to the notebook, then text, code and outputs."""
    title, *cells = notebook.cells
    owner_and_name = repository.removeprefix("https://github.com/")
    colab = f"{COLAB}/github/{owner_and_name}/blob/gh-pages/{name}.ipynb"
    links = (
        f"[Open in Colab]({colab}){{ .md-button }} "
        f"[Notebook]({Path(name).name}.ipynb){{ .md-button download }}"
    )
    heading, _, rest = title.source.partition("\n")
    parts = [heading, links, rest.strip()]
    for cell in cells:
        if cell.cell_type == "code":
            parts += [f"```python\n{cell.source}\n```", *shown(cell.outputs)]
        else:
            parts.append(cell.source)
    return "\n\n".join(parts) + "\n"


def shown(outputs: list[NotebookNode]) -> Iterator[str]:
    """The outputs of a cell. Printed text is joined into one block."""
    for printed, group in itertools.groupby(outputs, lambda o: o.output_type == "stream"):
        if printed:
            yield fenced("".join(output.text for output in group))
            continue
        for output in group:
            if "image/svg+xml" in output.data:
                yield f'<div class="plot">\n{output.data["image/svg+xml"]}\n</div>'
            else:
                yield fenced(output.data["text/plain"])


def fenced(text: str) -> str:
    """A block of output, styled differently from code."""
    return f"```{{ .text .output }}\n{text.rstrip()}\n```"
