"""Hooks of MkDocs: the README and other files of the repository as pages, links among them, formulas, the filter.

Documents link to each other and to files as they lie in the repository, so that GitHub can follow the links. On the
site the README is the start page, and a file outside ``docs/`` that some page links to is under ``repository/``.
"""

from __future__ import annotations

import csv
import os
import posixpath
import re
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tools.documents import ROOT
from tools.site.formulas import typeset
from tools.site.notebooks import NOTEBOOK, page_of
from ttt4rec.cli import make_parser

if TYPE_CHECKING:  # the tests of this file need no MkDocs
    from mkdocs.structure.files import File, Files
    from mkdocs.structure.pages import Page

LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)\s#]*)(#[^)\s]*)?(?=\))")
FENCED = re.compile(r"(^```.*?^```)", re.MULTILINE | re.DOTALL)
TEXT = {".py": "python", ".sh": "bash", ".cpp": "cpp", ".h": "cpp", ".toml": "toml", "": "text"}
"""Files that are shown as code, by suffix, and the language of which."""
HELP = re.compile(r"<!-- help: ([\w-]+) -->")
RESOURCES = '<div id="resources"></div>'


def on_files(files: Files, config: Any) -> Files:
    """Add the files outside of ``docs/`` that are pages of the site."""
    for path in outside():
        files.append(_file(path, config))
    return files


def outside() -> list[Path]:
    """The README, the changes, and what pages link to outside of ``docs/``, and what these link to."""
    waiting = [*sorted(ROOT.glob("docs/**/*.md")), ROOT / "README.md", ROOT / "CHANGELOG.md"]
    for path in waiting:  # which grows
        if path.suffix in (".md", NOTEBOOK):
            new = dict.fromkeys(target for target in _targets(path) if target.is_file())
            waiting += [target for target in new if target not in waiting]
    return [path for path in waiting if not path.is_relative_to(ROOT / "docs")]


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Point links to pages of the site; typeset the mathematics, and fill in the table of resources."""
    source = _source(page.file.src_uri)
    if source.suffix in (".md", NOTEBOOK):
        markdown = "".join(
            part if part.startswith("```") else LINK.sub(lambda found: _link(found, source, page), part)
            for part in FENCED.split(markdown)
        )
    if page.file.src_uri == "mathematics.md":
        return typeset(markdown)
    if page.file.src_uri == "reference/commands.md":
        return HELP.sub(lambda found: f"```text\n{help_of(found[1])}```", markdown)
    return markdown.replace(RESOURCES, table((ROOT / "docs" / "resources.csv").read_text()))


def help_of(command: str) -> str:
    """What ``ttt4rec COMMAND --help`` prints on a terminal of some width."""
    commands = next(action.choices for action in make_parser()._actions if isinstance(action.choices, dict))
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "88"
    try:
        return str(commands[command].format_help())
    finally:
        del os.environ["COLUMNS"]
        if before is not None:
            os.environ["COLUMNS"] = before


def table(text: str) -> str:
    """A table of a CSV file, with a filter above each column that ``assets/filter.js`` brings to life."""
    head, *rows = csv.reader(text.splitlines())
    cells = "".join(f"<th>{escape(name)}</th>" for name in head)
    body = "\n".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<table class="filtered"><thead><tr>{cells}</tr></thead><tbody>\n{body}\n</tbody></table>'


def site_path(path: Path) -> str:
    """Where a file of the repository is among the sources of the site."""
    if path == ROOT / "README.md":
        return "index.md"
    if path.is_relative_to(ROOT / "docs"):
        return path.relative_to(ROOT / "docs").as_posix()
    inside = f"repository/{path.relative_to(ROOT).as_posix()}"
    return f"{inside}.md" if path.suffix in (*TEXT, NOTEBOOK) else inside


def _source(src_uri: str) -> Path:
    """The file of the repository that a source of the site is."""
    if src_uri == "index.md":
        return ROOT / "README.md"
    if not src_uri.startswith("repository/"):
        return ROOT / "docs" / src_uri
    path = ROOT / src_uri.removeprefix("repository/")
    return path if path.exists() else path.with_suffix("")


def _file(path: Path, config: Any) -> File:
    from mkdocs.structure.files import File

    if path.suffix == NOTEBOOK:
        return File.generated(config, site_path(path), content=page_of(path.read_text()))
    if path.suffix not in TEXT:
        return File.generated(config, site_path(path), abs_src_path=str(path))
    shown = f"# {path.relative_to(ROOT).as_posix()}\n\n````{TEXT[path.suffix]}\n{path.read_text()}\n````\n"
    return File.generated(config, site_path(path), content=shown)


def _targets(path: Path) -> list[Path]:
    """What a document links to, a folder's README in the folder's place."""
    text = path.read_text() if path.suffix == ".md" else page_of(path.read_text())
    found = [_resolved(path, link) for link, _ in LINK.findall(FENCED.sub("", text)) if link]
    return [target for target in found if target.is_relative_to(ROOT)]


def _resolved(path: Path, link: str) -> Path:
    target = (path.parent / link).resolve()
    return target / "README.md" if target.is_dir() else target


def _link(found: re.Match[str], source: Path, page: Page) -> str:
    target = _resolved(source, found[1]) if found[1] else source
    if not found[1] or not target.is_file() or not target.is_relative_to(ROOT):
        return found[0]  # MkDocs says that it leads nowhere
    start = posixpath.dirname(page.file.src_uri)
    return posixpath.relpath(site_path(target), start or ".") + (found[2] or "")
