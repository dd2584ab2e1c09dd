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


def one_page_for_each_name():
    return {name: ["page.md"] for name in reference.public_names()}


def test_one_page_for_each_name_passes():
    assert reference.problems(one_page_for_each_name()) == []


def test_reference_is_complete():
    docs = versions.ROOT / "docs"
    pages = {str(path): path.read_text(encoding="utf-8") for path in docs.rglob("*.md")}
    pages |= {page.path: page.markdown() for page in kinds.PAGES}
    assert reference.problems(reference.documented(pages)) == []


def test_public_name_without_a_page_is_reported():
    documented = one_page_for_each_name()
    del documented["lorax.lora"]
    (problem,) = reference.problems(documented)
    assert problem.startswith("lorax.lora is public and does not have a page")


def test_unknown_and_duplicate_names_are_reported():
    documented = one_page_for_each_name() | {"lorax.gone": ["a.md"], "lorax.lora": ["a.md", "b.md"]}
    assert reference.problems(documented) == [
        "lorax.gone, in a.md, is not a public name",
        "lorax.lora is rendered more than once: a.md, b.md",
    ]


def test_docstrings_of_functions_have_all_parts():
    assert list(reference.incomplete()) == []


def test_incomplete_docstring_is_reported(monkeypatch: pytest.MonkeyPatch):
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
        "lorax_io.half does not describe `other`",
        "lorax_io.half does not describe what it returns",
        "lorax_io.half does not have an example",
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
def test_valid_links_pass(site: Path, link: str):
    (site / "index.html").write_text(f"<a id='x' href='{link}'>")
    assert links.broken_links(site) == []


@pytest.mark.parametrize("link", ["c/", "b/#bottom", "b.png", "#y"])
def test_broken_links_are_reported(site: Path, link: str):
    (site / "index.html").write_text(f"<a id='x' href='{link}'>")
    assert links.broken_links(site) == [f"index.html links to {link}"]


def test_picture_has_a_box_for_each_array():
    drawn = pictures.svg("W[in,out] + s · a[in,r]* b[r,out]*")
    assert drawn.count('class="frozen"') == 2  # a box, and the legend
    assert drawn.count('class="trained"') == 3
    assert ">s</text>" in drawn


def test_picture_labels_axes():
    drawn = pictures.svg("W[in,out|i,o] + a[in,r|i,r]* b[r,out]*")
    assert drawn.count('class="label"') == 4
    assert drawn.count(">i</text>") == 2


@pytest.mark.parametrize("box", ["W[in]", "W[in,out|i]", "a[in,r]{stars", "a*"])
def test_invalid_box_raises(box: str):
    with pytest.raises(ValueError, match="is not a box"):
        pictures.svg(f"x + {box}")


def test_each_kind_has_a_page_and_a_formula():
    names = {name for page in kinds.PAGES for name in page.names}
    specs = {name.removeprefix("lorax.") for name in reference.public_names()}
    specs = {name for name in specs if name.endswith("Spec") and name != "AdapterSpec"}
    assert specs <= names
    assert kinds.formula("IA3Weight")


def test_kind_without_rows_in_the_table_raises():
    with pytest.raises(AssertionError, match="docs/kinds.md"):
        kinds.costs(["no such kind"])


@pytest.mark.parametrize("spec", ["LoraSpec", "LoraFASpec", "DoraSpec", "TokensSpec"])
def test_kinds_in_the_table_of_peft_types_can_be_stored_in_peft_folders(spec: str):
    assert "store it as `LORA`" in kinds.files(spec)


def test_kinds_not_in_the_table_cannot_be_stored_in_peft_folders():
    assert kinds.files("LoconSpec").endswith("PEFT folders do not support it.")


def test_release_faults_are_only_those_of_an_unknown_tag():
    version = versions.VERSION
    assert list(check.faults(None, offline=True)) == []
    address = versions.PROJECTS["lorax-core"]["urls"]["Source"]
    assert list(check.faults("v0.0.7", offline=True)) == [
        f"{address} still has the placeholder OWNER for the account",
        f"the tag is v0.0.7, but the version is {version}",
        f"CHANGELOG.md has no section [{version}]: rename [Unreleased]",
    ]


def test_names_of_other_libraries_become_links():
    address = "https://docs.jax.dev/en/latest/_autosummary/jax.jit.html"
    code = "<code>jax.jit</code>"
    assert names.link_names(f"<p>{code}</p>") == f'<p><a href="{address}">{code}</a></p>'
    for unchanged in (f'<a href="x">{code}</a>', f"<pre>{code}</pre>", "<code>jax.no_such</code>"):
        assert names.link_names(unchanged) == unchanged


def test_unambiguous_public_names_become_links():
    linked = names.link_names("<p><code>merge_params</code> <code>lorax.lora</code></p>")
    assert 'identifier="lorax.merge_params"' in linked and 'identifier="lorax.lora"' in linked
    for unchanged in ("<code>spec</code>", "<code>Linear</code>", "<code>lora</code>"):
        assert names.link_names(unchanged) == unchanged


# Built-in errors that Python's protocols require, that are caught in the same file, or that pass on
# the error of another library.
BUILTIN = {
    "lorax_hf/_flax/_adapted.py": {"AttributeError"},
    "lorax_hf/_torch/_adapted.py": {"AttributeError"},
    "lorax_hf/_torch/_blame.py": {"ValueError"},
    "lorax_io/__init__.py": {"AttributeError"},
    "lorax_io/_formats/peft/patterns.py": {"TimeoutError"},
}


def builtin_errors(source: str) -> set[str]:
    """The built-in errors that a source creates, except `raise NotImplementedError` in a method."""
    created = {
        node.func.id
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    raised = {
        node.exc.id
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Name)
    }
    names = created | (raised - {"NotImplementedError"})
    errors = vars(builtins).items()
    return names & {n for n, v in errors if isinstance(v, type) and issubclass(v, BaseException)}


def test_packages_raise_only_their_own_errors():
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
def test_builtin_errors_are_detected(source: str, errors: set[str]):
    assert builtin_errors(source) == errors


SECTION = re.compile(r"^### (\w+)$", re.MULTILINE)


def test_troubleshooting_has_exactly_one_section_for_each_warning_and_error():
    page = (versions.ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    documented = []
    for name in reference.public_names():
        module, _, short = name.rpartition(".")
        value = getattr(importlib.import_module(module), short)
        if isinstance(value, type) and issubclass(value, lorax.LoraxError | lorax.LoraxWarning):
            assert remedies(value).endswith(f"/troubleshooting/#{short.lower()}")
            documented.append(short)
    assert sorted(SECTION.findall(page)) == sorted(documented)


@pytest.mark.parametrize("page", sorted(Path("docs").rglob("*.md")), ids=str)
def test_front_matter_of_a_page_ends(page):
    first, *lines = page.read_text(encoding="utf-8").splitlines()
    if first == "---":
        # Without its last line, MkDocs shows the front matter as text.
        assert "---" in lines[: lines.index("")]
