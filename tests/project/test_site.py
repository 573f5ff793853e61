"""The site, but for its building: every page is in its navigation, links lead to pages, and formulas are typeset."""

import json
import re
from types import SimpleNamespace

import pytest

from tools import resources
from tools.documents import ROOT
from tools.site import formulas, hooks, notebooks
from ttt4rec.cli import make_parser

EQUATIONS = (ROOT / "docs" / "mathematics.md").read_text()


def test_the_navigation_has_every_document_once() -> None:
    listed = re.findall(r"^\s+- .+: (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    pages = [hooks.site_path(path) for path in ROOT.glob("docs/**/*.md")]
    assert {name for name in listed if "repository/" not in name} == {*pages, "index.md"}
    assert {name for name in listed if "repository/" in name} <= {hooks.site_path(path) for path in hooks.outside()}
    assert len(listed) == len(set(listed))


@pytest.mark.parametrize(
    ("page", "link", "expected"),
    [
        ("index.md", "docs/layer.md#streams", "layer.md#streams"),
        ("index.md", "docs/two-loops.svg", "two-loops.svg"),
        ("index.md", "examples", "repository/examples/README.md"),
        ("online.md", "../examples/serve_http.py", "repository/examples/serve_http.py.md"),
        ("reference/operators.md", "../extending.md", "../extending.md"),
        ("repository/examples/README.md", "serve_http.py", "serve_http.py.md"),
        ("repository/studies/README.md", "../docs/paper.md", "../../paper.md"),
        ("online.md", "#http", "#http"),
        ("online.md", "nowhere.md", "nowhere.md"),
        ("references.md", "https://arxiv.org/abs/2407.04620", "https://arxiv.org/abs/2407.04620"),
    ],
)
def test_links_are_those_of_the_site(page: str, link: str, expected: str) -> None:
    source = SimpleNamespace(file=SimpleNamespace(src_uri=page))
    assert hooks.on_page_markdown(f"[text]({link})", source) == f"[text]({expected})"
    code = f"```\n[text]({link})\n```\n"
    assert hooks.on_page_markdown(code, source) == code


def test_what_pages_link_to_is_part_of_the_site() -> None:
    added = {path.relative_to(ROOT).as_posix() for path in hooks.outside()}
    assert {"README.md", "CHANGELOG.md", "examples/serve_http.py"} <= added
    assert "benchmarks/results/cpu-epyc-2-cores/time.png" in added  # by way of a report


def test_a_notebook_is_a_page_with_its_outputs() -> None:
    markdown = {"cell_type": "markdown", "source": ["# Title\n", "Text."]}
    outputs = [{"text": ["4\n"]}, {"data": {"image/png": "QUJD\n", "text/plain": "<Figure>"}}]
    code = {"cell_type": "code", "source": ["2 + 2"], "outputs": outputs}
    page = notebooks.page_of(json.dumps({"cells": [markdown, code]}))
    assert page.startswith("# Title\nText.\n\n```python\n2 + 2\n```\n\n```text\n4\n```\n\n![")
    assert page.endswith("](data:image/png;base64,QUJD)\n")


@pytest.mark.parametrize(
    ("formula", "expected"),
    [
        ("dZ2 W2ᵀ", r"\mathrm{d}Z_{2}\, W_{2}^{\top}"),
        ("x̂ = r (z - m(z))", r"\hat{x} = r\, (z - m(z))"),
        ("1 / √(m((z)²) + ε)", r"1 / \sqrt{m((z)^{2}) + \epsilon}"),
        ("-Σ_j lr_j dX̄_c", r"-\sum_{j}\, \mathrm{lr}_{j}\, \mathrm{d}\bar{X}_{c}"),
        ("s_last ∘ gelu''(Z1)", r"s_{\mathrm{last}} \circ  \mathrm{gelu}''(Z_{1})"),
    ],
)
def test_formulas_become_latex(formula: str, expected: str) -> None:
    assert formulas.latex(formula) == expected


def test_every_equation_is_typeset(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr(formulas, "mathml", lambda formula: seen.append(formulas.latex(formula)) or "")
    page = formulas.typeset(EQUATIONS)
    numbers = re.findall(r"^ {4}\((\d+)\) ", EQUATIONS, re.MULTILINE)
    assert re.findall(r'id="equation-(\d+)"', page) == numbers
    assert len(seen) > 2 * len(numbers)
    for text in seen:
        assert text.count("{") == text.count("}")
        assert text.isascii(), text
        letters = re.sub(r"\\mathrm\{[^}]*\}|\\[A-Za-z]+", " ", text)
        assert not re.search("[a-z]{3,}", letters), f"a word among the letters of {text}"


def test_every_command_has_its_help() -> None:
    text = (ROOT / "docs" / "reference" / "commands.md").read_text()
    commands = next(action.choices for action in make_parser()._actions if isinstance(action.choices, dict))
    assert sorted(hooks.HELP.findall(text)) == sorted(commands)
    page = hooks.on_page_markdown(text, SimpleNamespace(file=SimpleNamespace(src_uri="reference/commands.md")))
    assert page.count("usage: ttt4rec") == len(commands)
    assert "<!--" not in page


def test_the_table_to_filter_has_every_row() -> None:
    page = hooks.on_page_markdown(
        (ROOT / "docs" / "resources.md").read_text(), SimpleNamespace(file=SimpleNamespace(src_uri="resources.md"))
    )
    rows = sum(map(len, resources.read(resources.FILE.read_text()).values()))
    assert page.count("<tr>") == rows + 1
    assert page.count("<th>") == len(resources.HEADER)
    assert 'class="filtered"' in page
    assert "table.filtered" in (ROOT / "docs" / "assets" / "filter.js").read_text()
