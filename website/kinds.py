"""Pages of the kinds of adapters, from kinds.toml, the docstrings, and the tables of docs/."""

import inspect
import re
import tomllib
from pathlib import Path
from typing import NamedTuple

import lorax

ROOT = Path(__file__).parents[1]


class KindPage(NamedTuple):
    """A table of kinds.toml."""

    slug: str
    title: str
    names: list[str]
    picture: str
    about: str
    when: str
    costs: list[str] = []

    @property
    def path(self) -> str:
        """Of the page, in docs/."""
        return f"kinds/{self.slug}.md"

    def markdown(self) -> str:
        """The page."""
        # What else these classes have is for the library, and for those who add a kind.
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
    """Its rows in the tables of docs/kinds.md, which `nox -s kinds` prints."""
    if not kinds:
        table = "[the table](../kinds.md#what-each-costs)"
        return f"It is not in {table}: its models have no convolution and no new tokens."
    text = (ROOT / "docs" / "kinds.md").read_text(encoding="utf-8")
    section = text.partition("## What each costs")[2].partition("\n## ")[0]
    rows: list[str] = []
    for model in ("GPT", "GPT, scan + remat"):
        table = section.partition(f"\n{model}:\n\n")[2].partition("\n\n")[0]
        lines = [line for line in table.splitlines() if line.split("|")[1].strip() in kinds]
        assert len(lines) == len(kinds), f"docs/kinds.md has {lines} of {kinds} for {model}"
        rows += [f"| {model} {line}" for line in lines]
    return "\n".join(
        [
            "A training step, with LoRA's as 1:",
            "",
            "| model | kind | trained | FLOPs | temporary bytes | kept bytes | step | step in PEFT "
            "| ours / PEFT |",
            "|---|---|---:|---:|---:|---:|---:|---:|---:|",
            *rows,
            "",
            "`nox -s kinds` prints this; [all kinds](../kinds.md#what-each-costs) in one table.",
        ]
    )


def files(spec: str) -> str:
    """What docs/adapters.md says of PEFT's types."""
    native = "[Native files](../adapters.md#a-native-file) hold it with all of its settings."
    text = (ROOT / "docs" / "adapters.md").read_text(encoding="utf-8")
    types = re.findall(rf"^\| (.+?) \| `{spec}` \| (.+?) \|$", text, re.MULTILINE)
    if not types:
        return f"{native} PEFT's folders are not written for it."
    named = "; ".join(f"{kind} (layouts: {layouts})" for kind, layouts in types)
    return f"{native} [PEFT's folders](../adapters.md#pefts-folder) as {named}."


PAGES = [
    KindPage(slug, **table)
    for slug, table in tomllib.loads(
        Path(__file__).with_name("kinds.toml").read_text(encoding="utf-8")
    ).items()
]
