"""MkDocs hooks: generated pages, links to files outside docs/, and the check of the reference."""

import os
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.plugins import event_priority, get_plugin_logger
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from website import kinds, names, pictures, reference, tutorials, versions  # noqa: E402

log = get_plugin_logger("lorax")

LINK = re.compile(
    r"(?<!!)\[(?P<text>[^\]\n]*(?:\n[^\]\n]+)?)\]\((?P<target>[^)#\s]+)(?P<rest>#[^)\s]*)?\)"
)
PICTURE = re.compile(r"^<!-- picture: (?P<notation>.+) -->$", re.MULTILINE)
CODE = re.compile(r"^ *```.*?^ *```", re.MULTILINE | re.DOTALL)


@event_priority(100)  # before mkdocstrings reads the inventories
def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Adds the version to the site's name, and the pages of the kinds to the navigation."""
    if os.environ.get("SITE_ONLINE"):
        handlers = config.plugins["mkdocstrings"].config["handlers"]
        handlers["python"]["inventories"] = names.UPSTREAM["inventories"]
    config.site_name = f"{config.site_name} {versions.VERSION}"
    for section in config.nav or []:
        if "Kinds" in section:
            section["Kinds"] += [page.path for page in kinds.PAGES]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the generated pages, and fails if a public name does not have a page."""
    generated = {page.path: page.markdown() for page in kinds.PAGES}
    generated |= tutorials.pages(Path(config.docs_dir, "tutorials"), config.repo_url or "")
    for path, content in generated.items():
        files.append(File.generated(config, path, content=content))
    documented = reference.documented(
        {f.src_uri: f.content_string for f in files.documentation_pages()}
    )
    if problems := reference.problems(documented):
        raise PluginError("\n".join(["The API reference does not match the packages.", *problems]))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Draws pictures, and turns links to files outside docs/ into links to the repository."""
    markdown = PICTURE.sub(lambda match: pictures.svg(match["notation"]), markdown)
    folder = Path(config.docs_dir, page.file.src_uri).parent

    def outside(match: re.Match[str]) -> str:
        target = (folder / match["target"]).resolve()
        if "://" in match["target"] or not target.is_relative_to(ROOT):
            return match[0]
        if target.is_relative_to(config.docs_dir):
            return match[0]
        if not target.exists():
            log.warning("%s links to %s, which does not exist", page.file.src_uri, match["target"])
        kind = "tree" if target.is_dir() else "blob"
        url = f"{config.repo_url}/{kind}/main/{target.relative_to(ROOT)}{match['rest'] or ''}"
        return f"[{match['text']}]({url})"

    return outside_code(markdown, lambda text: LINK.sub(outside, text))


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links names in code."""
    return names.link_names(html)


def outside_code(markdown: str, change: Any) -> str:
    """Applies a change outside fenced code blocks."""
    parts: list[str] = []
    end = 0
    for block in CODE.finditer(markdown):
        parts += [change(markdown[end : block.start()]), block[0]]
        end = block.end()
    return "".join([*parts, change(markdown[end:])])
