"""The number of the version stands in two places, and the package has all its files."""

import fnmatch
import re

from tools.documents import ROOT

PACKAGE = ROOT / "src" / "ttt4rec"


def test_the_version_is_the_same_everywhere() -> None:
    package, changes = (
        re.search(pattern, path.read_text(), re.MULTILINE)[1]
        for path, pattern in (
            (PACKAGE / "__init__.py", r'^__version__ = "(.*)"$'),
            (ROOT / "CHANGELOG.md", r"^## \[(.*)\] - "),
        )
    )
    assert package.removesuffix(".dev0") == changes


def test_the_changelog_has_every_version_once_the_newest_first() -> None:
    text = (ROOT / "CHANGELOG.md").read_text()
    found = re.findall(r"^## \[(\d+)\.(\d+)\.(\d+)\] - (\d{4}-\d\d-\d\d|unreleased)$", text, re.MULTILINE)
    assert len(found) == len(re.findall("^## ", text, re.MULTILINE))
    numbers = [tuple(map(int, parts[:3])) for parts in found]
    assert numbers == sorted(set(numbers), reverse=True)
    assert "unreleased" not in [date for *_, date in found[1:]]
    for part in re.split("^## ", text, flags=re.MULTILINE)[1:]:
        assert re.search("^### (Added|Changed|Deprecated|Removed|Fixed|Security)$", part, re.MULTILINE)


def test_the_package_has_all_its_files() -> None:
    (packed,) = re.findall(r"^ttt4rec = (\[[^]]*\])$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    patterns = re.findall('"([^"]*)"', packed)
    data = [path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*") if path.is_file()]
    data = [name for name in data if not name.endswith((".py", ".pyc"))]
    assert len(data) > 10
    assert [name for name in data if not any(fnmatch.fnmatch(name, pattern) for pattern in patterns)] == []
    modules = {path.parent for path in PACKAGE.rglob("*.py")}
    assert [folder for folder in modules if not (folder / "__init__.py").is_file()] == []
