"""Who does the job, and how long the programs are."""

import ast
import io
import tokenize
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
_NO_CODE = {
    tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENCODING,
    tokenize.ENDMARKER,
}  # fmt: skip


@dataclass(frozen=True)
class Side:
    """A library with one of its models.

    Attributes:
        label: of its rows.
        job: name of its program in this folder.
        options: what its ``train`` is told besides the epochs.
        peer: whether it runs in the environment of ``scripts/test_adapters.sh``, in place of the project's own.
    """

    label: str
    job: str
    options: dict[str, Any] = field(default_factory=dict, hash=False)
    peer: bool = True

    @property
    def path(self) -> Path:
        """Its program."""
        return FOLDER / self.job

    @property
    def lines(self) -> int:
        """How long that is."""
        return lines_of_code(self.path.read_text())


SIDES = (
    Side("ttt4rec, TTT-MLP", "job_ttt4rec.py", {"mixer": "ttt"}, peer=False),
    Side("ttt4rec, attention", "job_ttt4rec.py", {"mixer": "attention"}, peer=False),
    Side("RecTools, SASRec", "job_rectools.py"),
    Side("RecBole, SASRec", "job_recbole.py"),
)


def lines_of_code(source: str) -> int:
    """Lines of a program that are neither blank nor comments nor docstrings."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    lines = {line for token in tokens if token.type not in _NO_CODE for line in _lines(token.start[0], token.end[0])}
    return len(lines - _docstrings(source))


def _docstrings(source: str) -> set[int]:
    found = set[int]()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            text = node.body[0]
            found |= _lines(text.lineno, text.end_lineno or text.lineno)
    return found


def _lines(first: int, last: int) -> set[int]:
    return set(range(first, last + 1))
