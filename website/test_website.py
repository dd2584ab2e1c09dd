"""Tests of the site's checks, pictures and generated pages."""

import ast
import builtins
import importlib
import re
from pathlib import Path

import pytest
from release import check

import lorax
import lorax_io
from lorax._errors import remedies
from website import kinds, links, names, pictures, reference, versions


def complete():
    return {name: ["page.md"] for name in reference.public_names()}


def test_one_page_for_each_name_passes():
    assert reference.problems(complete()) == []


def test_the_reference_is_complete():
    docs = versions.ROOT / "docs"
    pages = {str(path): path.read_text(encoding="utf-8") for path in docs.rglob("*.md")}
    pages |= {page.path: page.markdown() for page in kinds.PAGES}
    assert reference.problems(reference.documented(pages)) == []


def test_a_public_name_without_a_page_is_named():
    documented = complete()
    del documented["lorax.lora"]
    (problem,) = reference.problems(documented)
    assert problem.startswith("lorax.lora is public and has no page")


def test_names_that_are_gone_or_twice_are_named():
    documented = complete() | {"lorax.gone": ["a.md"], "lorax.lora": ["a.md", "b.md"]}
    assert reference.problems(documented) == [
        "lorax.gone, in a.md, is not a public name",
        "lorax.lora is rendered more than once: a.md, b.md",
    ]


def test_docstrings_of_functions_have_all_parts():
    assert list(reference.incomplete()) == []


def test_a_docstring_without_a_part_is_named(monkeypatch: pytest.MonkeyPatch):
    def half(path: str, other: int) -> int:
        """Half.

        Args:
            path: a file.
        """
        return len(path) // other

    monkeypatch.setattr(lorax_io, "half", half, raising=False)
    monkeypatch.setattr(lorax_io, "__all__", ["half"])
    monkeypatch.setattr(reference, "MODULES", ["lorax_io"])
    assert list(reference.incomplete()) == [
        "lorax_io.half does not say what `other` is",
        "lorax_io.half does not say what it returns",
        "lorax_io.half has no example",
    ]


def test_directives_are_read_from_pages():
    pages = {
        "a.md": "# A\n\n::: lorax.lora\n    options:\n      members: false\n\n::: lorax_io.Conv"
    }
    assert reference.documented(pages) == {"lorax.lora": ["a.md"], "lorax_io.Conv": ["a.md"]}


@pytest.fixture
def site(tmp_path: Path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "index.html").write_text("<h1 id='top'>B</h1>")
    return tmp_path


@pytest.mark.parametrize(
    "link", ["b/", "b/#top", "b/index.html#top", "https://example.org/no", "#x"]
)
def test_links_that_lead_somewhere(site: Path, link: str):
    (site / "index.html").write_text(f"<a id='x' href='{link}'>")
    assert links.broken(site) == []


@pytest.mark.parametrize("link", ["c/", "b/#bottom", "b.png", "#y"])
def test_links_that_lead_nowhere_are_named(site: Path, link: str):
    (site / "index.html").write_text(f"<a id='x' href='{link}'>")
    assert links.broken(site) == [f"index.html links to {link}"]


def test_a_picture_has_a_box_for_each_array():
    drawn = pictures.svg("W[in,out] + s · a[in,r]* b[r,out]*")
    assert drawn.count('class="frozen"') == 2  # a box, and the legend
    assert drawn.count('class="trained"') == 3
    assert ">s</text>" in drawn


def test_a_picture_can_label_axes():
    drawn = pictures.svg("W[in,out|i,o] + a[in,r|i,r]* b[r,out]*")
    assert drawn.count('class="label"') == 4
    assert drawn.count(">i</text>") == 2


@pytest.mark.parametrize("box", ["W[in]", "W[in,out|i]", "a[in,r]{stars", "a*"])
def test_a_picture_of_what_is_not_a_box_is_an_error(box: str):
    with pytest.raises(ValueError, match="is not a box"):
        pictures.svg(f"x + {box}")


def test_each_kind_has_a_page_and_a_formula():
    names = {name for page in kinds.PAGES for name in page.names}
    specs = {name.removeprefix("lorax.") for name in reference.public_names()}
    specs = {name for name in specs if name.endswith("Spec") and name != "AdapterSpec"}
    assert specs <= names
    assert kinds.formula("IA3Weight")


def test_a_kind_without_its_rows_in_the_table_raises():
    with pytest.raises(AssertionError, match="docs/kinds.md"):
        kinds.costs(["no such kind"])


@pytest.mark.parametrize("spec", ["LoraSpec", "LoraFASpec", "DoraSpec", "TokensSpec"])
def test_kinds_with_a_row_in_the_table_of_peft_types_are_in_peft_folders(spec: str):
    assert "store it as `LORA`" in kinds.files(spec)


def test_kinds_without_a_row_are_not_in_peft_folders():
    assert kinds.files("LoconSpec").endswith("PEFT folders do not support it.")


def test_this_repository_can_be_released_but_for_a_tag():
    version = versions.VERSION
    assert list(check.faults(None, offline=True)) == []
    address = versions.PROJECTS["lorax-core"]["urls"]["Source"]
    assert list(check.faults("v0.0.7", offline=True)) == [
        f"{address} does not say which account hosts the repository",
        f"the tag is v0.0.7, and the version {version}",
        f"CHANGELOG.md has no section [{version}]: rename [Unreleased]",
    ]


def test_names_of_others_are_links_where_they_are_not_links_already():
    address = "https://docs.jax.dev/en/latest/_autosummary/jax.jit.html"
    code = "<code>jax.jit</code>"
    assert names.linked(f"<p>{code}</p>") == f'<p><a href="{address}">{code}</a></p>'
    for kept in (f'<a href="x">{code}</a>', f"<pre>{code}</pre>", "<code>jax.no_such</code>"):
        assert names.linked(kept) == kept


def test_unambiguous_public_names_are_links():
    linked = names.linked("<p><code>merge_params</code> <code>lorax.lora</code></p>")
    assert 'identifier="lorax.merge_params"' in linked and 'identifier="lorax.lora"' in linked
    for kept in ("<code>spec</code>", "<code>Linear</code>", "<code>lora</code>"):
        assert names.linked(kept) == kept


# Built-in errors that Python's protocols ask for, that never leave the file they are raised in, or
# that pass on the error of another library.
BUILTIN = {
    "lorax_hf/_flax/_adapted.py": {"AttributeError"},
    "lorax_hf/_torch/_adapted.py": {"AttributeError"},
    "lorax_hf/_torch/_blame.py": {"ValueError"},
    "lorax_io/__init__.py": {"AttributeError"},
    "lorax_io/_formats/peft/patterns.py": {"TimeoutError"},
}


def builtin_errors(source: str) -> set[str]:
    """Built-in errors that a source makes, other than `raise NotImplementedError` of a method."""
    made = {
        node.func.id
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    raised = {
        node.exc.id
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Name)
    }
    names = made | (raised - {"NotImplementedError"})
    errors = vars(builtins).items()
    return names & {n for n, v in errors if isinstance(v, type) and issubclass(v, BaseException)}


def test_all_errors_are_our_own_and_so_end_with_their_address():
    found = {
        path.relative_to(root).as_posix(): errors
        for root in versions.ROOT.glob("packages/*/src")
        for path in root.rglob("*.py")
        if (errors := builtin_errors(path.read_text(encoding="utf-8")))
    }
    assert found == BUILTIN


@pytest.mark.parametrize(
    ("source", "errors"),
    [
        ("raise ValueError('no')", {"ValueError"}),
        ("def refuse(): return OSError('no')", {"OSError"}),
        ("raise KeyError", {"KeyError"}),
        ("assert x, 'no'\nraise SpecError('no')\nraise NotImplementedError", set()),
        ("raise NotImplementedError('no such case')", {"NotImplementedError"}),
    ],
)
def test_builtin_errors_are_found(source: str, errors: set[str]):
    assert builtin_errors(source) == errors


SECTION = re.compile(r"^### (\w+)$", re.MULTILINE)


def test_troubleshooting_has_exactly_one_section_for_each_warning_and_error():
    page = (versions.ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    ours = []
    for name in reference.public_names():
        module, _, short = name.rpartition(".")
        value = getattr(importlib.import_module(module), short)
        if isinstance(value, type) and issubclass(value, lorax.LoraxError | lorax.LoraxWarning):
            assert remedies(value).endswith(f"/troubleshooting/#{short.lower()}")
            ours.append(short)
    assert sorted(SECTION.findall(page)) == sorted(ours)
