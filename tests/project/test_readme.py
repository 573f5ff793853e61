"""The README and the pages of docs/: their Python blocks run, their links lead somewhere, and the README is short."""

import re
from pathlib import Path

import pytest

from tools.documents import ROOT
from ttt4rec.cli import main

PAGES = ["README.md", "CONTRIBUTING.md", "benchmarks/README.md", "studies/README.md"] + [
    str(path.relative_to(ROOT)) for path in sorted((ROOT / "docs").glob("**/*.md"))
]
TOGETHER = [
    ["README.md"], ["docs/layer.md"], ["docs/recommender.md", "docs/online.md"], ["docs/data.md"],
    ["docs/recommending.md"], ["docs/metrics.md"], ["docs/runs.md"], ["docs/item-features.md"], ["docs/times.md"],
    pytest.param(["docs/huggingface.md"], marks=pytest.mark.slow),
    pytest.param(["docs/parallel.md"], marks=pytest.mark.slow),
]  # fmt: skip
"""Pages whose blocks run one after the other, each with the names of those before it."""
LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)(?:#([^)]+))?\)")


def python_blocks(text: str) -> list[tuple[int, str]]:
    """Line number and source of each block."""
    found = re.finditer(r"^```python\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    return [(text[: match.start(1)].count("\n"), match.group(1)) for match in found]


def anchors(text: str) -> set[str]:
    """What a page's headings are called in links."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("pages", TOGETHER, ids=" ".join)
def test_blocks_run(pages: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    theirs = {name for page in pages for name in re.findall(r"ttt4rec train (\S+\.\S+)", (ROOT / page).read_text())}
    for name in theirs:
        Path(name).write_text("the reader's own")
    run_blocks(pages)
    assert {name: Path(name).read_text() for name in theirs} == dict.fromkeys(theirs, "the reader's own")


def test_the_readmes_blocks_run_again_and_print_recommendations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    printed = []
    for _ in range(2):
        run_blocks(["README.md"])
        printed.append(capsys.readouterr().out.splitlines())
        assert [line.startswith("film") for line in printed[-1]] == [True, True, True, False, False]
        assert "[]" not in printed[-1]
    assert printed[0] == printed[1]


def test_the_commands_read_the_folder_that_the_page_writes_from_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    run_blocks(["docs/recommender.md"])
    for words in ("recommend runs/events --user user3", "similar runs/events film1"):
        capsys.readouterr()
        assert main(words.split()) == 0
        assert "film" in capsys.readouterr().out
    Path("new.csv").write_text(Path("made-up.csv").read_text())
    assert main(["train", "new.csv", "--warm-start", "runs/events", "--out", "runs/next", "--epochs", "1"]) == 0


def run_blocks(pages: list[str]) -> None:
    names: dict[str, object] = {"__name__": "readme"}
    for page in pages:
        blocks = python_blocks((ROOT / page).read_text())
        assert blocks
        for line, source in blocks:
            code = compile("\n" * line + source, page, "exec")  # a traceback then names the page's line
            exec(code, names)


@pytest.mark.parametrize("page", PAGES)
def test_relative_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text()
    for target, anchor in LINK.findall(text):
        path = (ROOT / page).parent / target if target else ROOT / page
        assert path.exists(), f"{page} links to {target}"
        if anchor and path.suffix == ".md":
            assert anchor in anchors(path.read_text()), f"{page} links to {target}#{anchor}"


def test_the_readme_is_short_and_begins_with_the_two_commands() -> None:
    text = (ROOT / "README.md").read_text()
    assert text.count("\n") <= 150
    before, commands, *_ = text.split("```")
    assert before.count("\n") < 10
    assert commands.startswith("bash\nbash scripts/quickstart.sh")
    assert "\nbash scripts/test.sh" in commands
