"""Our own rules for English that is read once: ``python -m tools.prose [FILE...]``.

A sentence has at most ``LONGEST`` words, at most ``MOST_RELATIVES`` relative pronouns, and nothing of ``AVOID``. Code,
tables, formulas and generated parts are passed over. Of Python files docstrings and messages are read: every text of
at least ``FEWEST`` words. Without files, all documents and the package's sources are looked at.
"""

import argparse
import ast
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from .documents import ROOT

LONGEST = 36
MOST_RELATIVES = 1
AVOID = {
    r"such(?! as)": "say which",
    r"so (?:many|much) (?!as)": "give the number",
    r"(?:that|those) of": "repeat the noun",
    r"beside": "next to, with, compared with",
    r"to be had": "available",
    r"but for": "except",
    r"not but": "only",
    r"(?:\. Nor|so (?:is|are|has|have|does|do))": "subject, verb, object",
    r"anew": "again",
    r"for ever": "always",
    r"by way of": "through",
    r"in the place of": "instead of",
    r"(?:there|here|where)(?:by|in|of|upon|with)": "by it, in it",
    r"(?:thus|hence|whence|thence)": "so, from there",
    r"(?:in order to|utili[sz]e|obviously|simply|note that)": "leave it out",
}
"""Patterns of words, and what to write instead."""
FEWEST = 4
"""Words of what is prose in a program: shorter texts are names, keys and parts of messages."""
FOLDERS = ("", "docs", "benchmarks", "studies")


class Finding(NamedTuple):
    """Where a rule is broken."""

    line: int
    message: str


def documents() -> list[Path]:
    """The documents that are held to the rules."""
    found = [path for folder in FOLDERS for path in sorted((ROOT / folder).glob("*.md"))]
    return [path for path in found if path.name != "CHANGELOG.md"]


def sources() -> list[Path]:
    """The package's files, which are held to the rules too."""
    return sorted((ROOT / "src").rglob("*.py"))


def texts(source: str) -> Iterator[tuple[int, str]]:
    """Where each docstring and message of a program begins, and its words as Markdown; what is filled in is code."""
    tree = ast.parse(source)
    statements = {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    inside = {part for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts = [part.value if isinstance(part, ast.Constant) else "x" for part in node.values]
            text = "".join(map(str, parts))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in inside:
            text = node.value
        else:
            continue
        if node in statements:  # a docstring; names of arguments are code
            text = re.sub(r"^ +(?:\w+:(?= ))?", "", text, flags=re.M)
        else:  # what is indented in a message is code
            text = re.sub(r"^ +\S.*\n", "\n", text, flags=re.M)
        if len(text.split()) >= FEWEST:
            yield node.lineno, text


def sentences(text: str) -> Iterator[tuple[int, str]]:
    """The line on which each sentence of a Markdown text begins, and its words."""
    text = re.sub(r"<!-- (\S+):begin -->.*?<!-- \1:end -->|^(`{3,}|~{3,}).*?^\2", _blank, text, flags=re.DOTALL | re.M)
    text = re.sub(r"^ {4}.*|^[ \t]*\|.*", "", text, flags=re.M)
    text = re.sub(r"`[^`]*`", lambda found: "x" + "\n" * found[0].count("\n"), text)
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    line = 1
    for piece in re.split(r"((?<=[.!?:])[*_\"]*\s+|\n\s*\n|\n(?=\s*(?:[-*#]|\d+\.) ))", text):
        if piece.strip():
            yield line + piece[: len(piece) - len(piece.lstrip())].count("\n"), " ".join(piece.split())
        line += piece.count("\n")


def _blank(found: re.Match[str]) -> str:
    return "\n" * found[0].count("\n")


def findings(text: str) -> list[Finding]:
    """What breaks a rule in a Markdown text."""
    found = []
    for line, sentence in sentences(text):
        words = len(re.findall(r"[\w'’]+(?:[-.,/]\w+)*", sentence))
        if words > LONGEST:
            found.append(Finding(line, f"a sentence must have at most {LONGEST} words; given {words}: {sentence[:60]}"))
        relatives = len(re.findall(r"\b(?:which|who|whose|whom)\b", sentence))
        if relatives > MOST_RELATIVES:
            found.append(Finding(line, f"a sentence must have at most {MOST_RELATIVES} relatives: {sentence[:60]}"))
        for pattern, instead in AVOID.items():
            found += [
                Finding(
                    line, f"avoid {match[0]!r} ({instead}): {sentence[max(0, match.start() - 30) : match.end() + 20]}"
                )
                for match in re.finditer(rf"\b(?:{pattern})\b", sentence, flags=re.IGNORECASE)
            ]
    return found


def python_findings(source: str) -> list[Finding]:
    """What breaks a rule in a program's docstrings and messages."""
    return [Finding(begin + line - 1, message) for begin, text in texts(source) for line, message in findings(text)]


def main(argv: Sequence[str] | None = None) -> int:
    """Print what breaks a rule; 1 if anything does."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="*", metavar="FILE")
    given = parser.parse_args(argv)
    failed = 0
    for path in given.files or [*documents(), *sources()]:
        look = python_findings if path.suffix == ".py" else findings
        for line, message in look(path.read_text()):
            print(f"{path}:{line}: {message}")
            failed = 1
    return failed


if __name__ == "__main__":
    sys.exit(main())
