"""Makes the pages of adapter kinds from kinds.toml, docstrings, and the tables in docs/."""

import inspect
import re
import tomllib
from pathlib import Path
from typing import NamedTuple

import lorax

ROOT = Path(__file__).parents[1]


class KindPage(NamedTuple):
    """The page of one kind, from a table of kinds.toml."""

    slug: str
    title: str
    names: list[str]
    picture: str
    about: str
    when: str
    costs: list[str] = []

    @property
    def path(self) -> str:
        """The path of the page in docs/."""
        return f"kinds/{self.slug}.md"

    def markdown(self) -> str:
        """The text of the page."""
        # The other members of these classes are internal, or for authors of new kinds.
        without_members = "\n    options:\n      heading_level: 3\n      members: false"
        objects = "\n\n".join(f"::: lorax.{name}{without_members}" for name in self.names)
        return f"""# {self.title}

{self.about}

<!-- picture: {self.picture} -->

```text
{formula(self.names[1])}
```

## When to use it

{self.when.strip()}

## What it costs

{costs(self.costs)}

## Files

{files(self.names[0])}

## Reference

{objects}
"""


def formula(name: str) -> str:
    """The first indented block of a docstring."""
    doc = inspect.getdoc(getattr(lorax, name)) or ""
    block = re.search(r"(?:^    .+\n?|^\n(?=    ))+", doc, re.MULTILINE)
    assert block, f"the docstring of lorax.{name} has no indented formula"
    return inspect.cleandoc("\n" + block[0])


def costs(kinds: list[str]) -> str:
    """The rows of some kinds in the tables of docs/kinds.md, which `nox -s kinds` prints."""
    if not kinds:
        table = "[the table](../kinds.md#what-each-costs)"
        return f"Not measured: the models in {table} have no convolution and no new tokens."
    text = (ROOT / "docs" / "kinds.md").read_text(encoding="utf-8")
    section = text.partition("## What each costs")[2].partition("\n## ")[0]
    rows: list[str] = []
    for model in ("GPT", "GPT, scan + remat"):
        table = section.partition(f"\n{model}:\n\n")[2].partition("\n\n")[0]
        lines = [line for line in table.splitlines() if line.split("|")[1].strip() in kinds]
        assert len(lines) == len(kinds), f"docs/kinds.md has only {lines} of {kinds} for {model}"
        rows += [f"| {model} {line}" for line in lines]
    return "\n".join(
        [
            "A training step, relative to LoRA ([columns](../kinds.md#what-each-costs)):",
            "",
            "| model | kind | trained | FLOPs | temporary bytes | kept bytes | step | step in PEFT "
            "| ours / PEFT |",
            "|---|---|---:|---:|---:|---:|---:|---:|---:|",
            *rows,
            "",
            "`nox -s kinds` prints these numbers for all kinds.",
        ]
    )


def files(spec: str) -> str:
    """The files that can store a kind, from the table of PEFT types in docs/adapters.md."""
    native = "[Native files](../adapters.md#a-native-file) store it with all settings."
    text = (ROOT / "docs" / "adapters.md").read_text(encoding="utf-8")
    table = re.findall(r"^\| (`[A-Z].+?) \| (`\w+Spec`.*?) \| (.+?) \|$", text, re.MULTILINE)
    assert table, "docs/adapters.md does not have a table of PEFT types"
    # Specs after "beside" or "with" are combined with the first one, and have their own rows.
    types = [
        (kind, names)
        for kind, specs, names in table
        if f"`{spec}`" in re.split(r" beside | with ", specs)[0]
    ]
    if not types:
        return f"{native} PEFT folders do not support it."
    named = " or ".join(f"{kind} (names: {names})" for kind, names in types)
    return f"{native} [PEFT folders](../adapters.md#pefts-folder) store it as {named}."


PAGES = [
    KindPage(slug, **table)
    for slug, table in tomllib.loads(
        Path(__file__).with_name("kinds.toml").read_text(encoding="utf-8")
    ).items()
]
