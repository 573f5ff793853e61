"""Every Python block of the README and of other pages runs, in order, each with the names of those before it."""

import re
from pathlib import Path

import pytest

from tools.documents import ROOT

PAGES = [
    "README.md", "CONTRIBUTING.md", "docs/architecture.md", "docs/extending.md", "docs/serving.md", "docs/data.md",
    "docs/metrics.md", "docs/recommending.md", "docs/online.md", "benchmarks/README.md", "studies/README.md",
]  # fmt: skip


def python_blocks(text: str) -> list[tuple[int, str]]:
    """Line number and source of each block."""
    found = re.finditer(r"^```python\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    return [(text[: match.start(1)].count("\n"), match.group(1)) for match in found]


@pytest.mark.parametrize(
    ("page", "least"), {"README.md": 5, "docs/data.md": 3, "docs/recommending.md": 5, "docs/metrics.md": 1}.items()
)
def test_blocks_run(page: str, least: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = python_blocks((ROOT / page).read_text())
    assert len(blocks) >= least
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "readme"}
    for line, source in blocks:
        code = compile("\n" * line + source, page, "exec")  # a traceback then names the page's line
        exec(code, names)


@pytest.mark.parametrize("page", PAGES)
def test_relative_links_lead_somewhere(page: str) -> None:
    targets = re.findall(r"\]\((?!https?:|#)([^)#]+)", (ROOT / page).read_text())
    for target in targets:
        assert (ROOT / page).parent.joinpath(target).exists(), f"{page} links to {target}"
