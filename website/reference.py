"""Checks the API reference: each public name is on one page, and its docstring is complete."""

import importlib
import inspect
import re
from collections.abc import Iterator, Mapping

MODULES = [
    *["lorax", "lorax.testing", "lorax.rules", "lorax.kinds", "lorax.bases"],
    *["lorax_hf", "lorax_io"],
]

# A directive of mkdocstrings, which renders the docstring of one name.
DIRECTIVE = re.compile(r"^::: (lorax\S*)$", re.MULTILINE)


def public_names() -> set[str]:
    """`lorax.lora` and all other names that a module lists in `__all__`."""
    return {
        f"{module}.{name}" for module in MODULES for name in importlib.import_module(module).__all__
    }


def documented(pages: Mapping[str, str]) -> dict[str, list[str]]:
    """The pages that render each name."""
    pages_of_name: dict[str, list[str]] = {}
    for path, markdown in pages.items():
        for name in DIRECTIVE.findall(markdown):
            pages_of_name.setdefault(name, []).append(path)
    return pages_of_name


def problems(documented: Mapping[str, list[str]]) -> list[str]:
    """The problems of the reference, one line for each name."""
    public = public_names()
    missing = [
        f"{name} is public and does not have a page: add `::: {name}` to one in docs/reference/, "
        "or to `names` in website/kinds.toml"
        for name in sorted(public - documented.keys())
    ]
    not_public = [
        f"{name}, in {', '.join(documented[name])}, is not a public name"
        for name in sorted(documented.keys() - public)
    ]
    duplicate = [
        f"{name} is rendered more than once: {', '.join(pages)}"
        for name, pages in sorted(documented.items())
        if len(pages) > 1
    ]
    return missing + not_public + duplicate


def incomplete() -> Iterator[str]:
    """Parts missing from docstrings of public functions, one line for each."""
    for name in sorted(public_names()):
        module, _, short = name.rpartition(".")
        value = getattr(importlib.import_module(module), short)
        if not inspect.isfunction(value):
            continue
        doc = inspect.getdoc(value) or ""
        signature = inspect.signature(value)
        for parameter in signature.parameters:
            if not re.search(rf"^ +(\*|\w+, )*{parameter}(, \w+)*:", doc, re.MULTILINE):
                yield f"{name} does not describe `{parameter}`"
        if signature.return_annotation not in (None, "None") and "\nReturns:" not in doc:
            yield f"{name} does not describe what it returns"
        if ">>>" not in doc:
            yield f"{name} does not have an example"
