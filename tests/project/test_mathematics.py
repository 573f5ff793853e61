"""Every equation stands in docs/mathematics.md, and code refers to it by its number."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCES = [path for path in sorted((ROOT / "src").rglob("*")) if path.suffix in (".py", ".h", ".cpp")]
NUMBER = re.compile(r"(?<![\w\])])\((\d+)\)")


def comments(path: Path) -> Iterator[str]:
    """Docstrings and comments."""
    text = path.read_text()
    if path.suffix == ".py":
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                yield ast.get_docstring(node) or ""
    yield from re.findall(r"(?:^|\s)#\s(.*)" if path.suffix == ".py" else r"//(.*)", text, re.MULTILINE)


def test_every_number_is_an_equation_and_its_page_is_named() -> None:
    page = (ROOT / "docs/mathematics.md").read_text()
    equations = [int(n) for n in re.findall(r"^ {4}\((\d+)\) ", page, re.MULTILINE)]
    assert equations == list(range(1, len(equations) + 1))
    named = {path: {int(n) for text in comments(path) for n in NUMBER.findall(text)} for path in SOURCES}
    assert set().union(*named.values()) <= set(equations)
    assert len(set().union(*named.values())) > 25
    assert not [path for path, numbers in named.items() if numbers and "docs/mathematics.md" not in path.read_text()]


def test_no_equation_stands_twice() -> None:
    """What is easily recognised: a recurrence."""
    others = [*SOURCES, *(p for p in (ROOT / "docs").glob("*.md") if p.name != "mathematics.md"), ROOT / "README.md"]
    assert not [str(path) for path in others if " ← " in path.read_text()]
