"""The documents keep our rules of English, and the check of them finds what breaks one."""

import time

import pytest

from tools import prose

LONG = "A sentence of words that goes on " + "and on " * 20 + "is found."


@pytest.mark.parametrize("path", prose.documents(), ids=lambda path: f"{path.parent.name}/{path.name}")
def test_documents_are_read_once(path) -> None:
    assert prose.findings(path.read_text()) == []


@pytest.mark.parametrize("path", prose.sources(), ids=lambda path: path.relative_to(prose.ROOT / "src").as_posix())
def test_docstrings_and_messages_are_read_once(path) -> None:
    assert prose.python_findings(path.read_text()) == []


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        (f"# Title\n\nShort. {LONG}", 3, "at most 36 words"),
        ("One line.\nThe losses stand beside\neach other.", 2, "avoid 'beside'"),
        ("Kernels such as these. There is no\nsuch kernel.", 1, "avoid 'such'"),
        ("- A list.\n- Its means are those of three seeds.", 2, "avoid 'those of'"),
        ("A row, which is a head, has weights whose size is fixed.", 1, "at most 1 relatives"),
    ],
)
def test_what_breaks_a_rule_is_found_where_it_stands(text: str, line: int, message: str) -> None:
    (finding,) = prose.findings(text)
    assert finding.line == line
    assert message in finding.message


PROGRAM = '''"""A module."""

KEY = "such a key"


def function(beside, others):
    """What it does.

    Args:
        beside: a name is code, `such` too.
        others: {others}
    """
    if others:
        raise ValueError(
            "the sizes "
            f"must be {message}; given {{beside}}"
        )
    print("examples:\\n  such a line is code\\n")
'''


@pytest.mark.parametrize(
    ("others", "message", "line", "found"),
    [
        ("they lie beside it.", "equal", 11, "avoid 'beside'"),
        ("some that lie\n            beside it.", "equal", 11, "avoid 'beside'"),
        ("some.", "those of one layer", 15, "avoid 'those of'"),
        (LONG, "equal", 11, "at most 36 words"),
    ],
)
def test_what_breaks_a_rule_in_a_program_is_found(others: str, message: str, line: int, found: str) -> None:
    program = PROGRAM.format(others=others, message=message)
    (finding,) = prose.python_findings(program)
    assert finding.line == line
    assert found in finding.message


def test_names_and_code_of_a_program_are_passed_over() -> None:
    assert prose.python_findings(PROGRAM.format(others="some.", message="equal")) == []


def test_code_tables_formulas_and_generated_parts_are_passed_over() -> None:
    code = f"```python\nx = 1  # {LONG}\n```"
    table = f"| {LONG} |\n| --- |"
    made = f"<!-- speed:begin -->\n{LONG}\n<!-- speed:end -->"
    text = f"{code}\n\n{table}\n\n    (1) {LONG}\n\n{made}\n\n[a link](beside.md) and `beside`.\n\nbeside"
    (finding,) = prose.findings(text)
    assert finding.line == text.count("\n") + 1


def test_it_is_quick() -> None:
    begin = time.process_time()
    for path in prose.documents():
        prose.findings(path.read_text())
    assert time.process_time() - begin < 1


def test_a_file_with_findings_fails(tmp_path, capsys) -> None:
    page = tmp_path / "page.md"
    page.write_text("It is to be had.\n")
    assert prose.main([str(page)]) == 1
    assert capsys.readouterr().out.startswith(f"{page}:1: avoid 'to be had'")
    page.write_text("It is at hand.\n")
    assert prose.main([str(page)]) == 0
    program = tmp_path / "program.py"
    program.write_text('raise ValueError("a size that is not to be had")\n')
    assert prose.main([str(page), str(program)]) == 1
    assert capsys.readouterr().out.startswith(f"{program}:1: avoid 'to be had'")
