"""Every Python block of the README runs, in order, each with the names of those before it."""

import re
from pathlib import Path

import pytest

from tools.documents import ROOT

PAGES = [
    "README.md", "CONTRIBUTING.md", "docs/architecture.md", "docs/extending.md", "docs/serving.md", "docs/online.md",
    "docs/presets.md", "docs/benchmarks.md", "benchmarks/README.md", "studies/README.md",
]  # fmt: skip


def python_blocks(text: str) -> list[tuple[int, str]]:
    """Line number and source of each block."""
    found = re.finditer(r"^```python\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    return [(text[: match.start(1)].count("\n"), match.group(1)) for match in found]


def test_readme_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = python_blocks((ROOT / "README.md").read_text())
    assert len(blocks) >= 5
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "readme"}
    for line, source in blocks:
        code = compile("\n" * line + source, "README.md", "exec")  # a traceback then names the README's line
        exec(code, names)


@pytest.mark.parametrize("page", PAGES)
def test_relative_links_lead_somewhere(page: str) -> None:
    targets = re.findall(r"\]\((?!https?:|#)([^)#]+)", (ROOT / page).read_text())
    for target in targets:
        assert (ROOT / page).parent.joinpath(target).exists(), f"{page} links to {target}"
