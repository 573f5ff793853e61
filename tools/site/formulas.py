"""The equations of docs/mathematics.md typeset: from the characters of the page to LaTeX, and from that to MathML.

The page stays readable as text, and code refers to it by number; only the site shows the equations as a book does.
"""

import re
from html import escape
from itertools import groupby

BLOCK = re.compile(r"(?:^ {4}\S.*\n(?:^ {4,}\S.*\n)*)", re.MULTILINE)
NUMBERED = re.compile(r"\((\d+)\) +")
NAMES = ("base_lr", "gelu", "gate", "tril", "taps", "max", "lr", "ln", "LN")
WORD = re.compile(r"by|with|at|the|gradient|of|from|in|mini-batch,|learned|one|carries|bias|and|is|dW's|place")
REFERENCE = re.compile(r"\(\d+\)")
SYMBOLS = {
    "∘": r"\circ ", "←": r"\leftarrow ", "Σ": r"\sum", "Π": r"\prod", "≤": r"\le ", "·": r"\cdot ", "‖": r"\Vert ",
    "½": r"\frac{1}{2}", "ᵀ": r"^{\top}", "²": "^{2}", "³": "^{3}", "γ": r"\gamma ", "β": r"\beta ", "ε": r"\epsilon ",
    "σ": r"\sigma ", "δ": r"\delta ", "η": r"\eta ", "τ": r"\tau ", "π": r"\pi ", "ℓ": r"\ell ",
}  # fmt: skip
ACCENTS = {"\u0302": r"\hat", "\u0304": r"\bar"}
IDENTIFIER = re.compile(
    rf"(?P<d>d(?=(?:{'|'.join(NAMES)}|[A-Za-zγβτ])))?(?P<base>{'|'.join(NAMES)}|[A-Za-zγβσδητπℓε])(?P<accent>[\u0302\u0304])?"
    r"(?P<digit>\d)?(?:_(?P<sub>\{[^}]*\}|[A-Za-z]+\d?))?(?P<after>[ᵀ²³]|'+²?)?"
)


def latex(formula: str) -> str:
    """LaTeX of a formula in the characters of the page."""
    parts: list[str] = []
    position = 0
    while position < len(formula):
        here = formula[position]
        if here == "√":
            end = _closing(formula, position + 1)
            parts.append(rf"\sqrt{{{latex(formula[position + 2 : end])}}}")
            position = end + 1
        elif here in "ΣΠ":
            found = re.match(r"_(\{[^}]*\}|\w)", formula[position + 1 :])
            parts.append(SYMBOLS[here].strip() + (f"_{{{latex(found[1].strip('{}'))}}}" if found else ""))
            position += 1 + (found.end() if found else 0)
        elif found := IDENTIFIER.match(formula, position):
            parts.append(_identifier(found))
            position = found.end()
        else:
            parts.append(SYMBOLS.get(here, here))
            position += 1
    return re.sub(r"(?<=[\w})]) (?=[\w\\(])(?!\\(?:circ|le|leftarrow|cdot|Vert)\b)", r"\\, ", "".join(parts))


def _closing(formula: str, opening: int) -> int:
    """The place of the parenthesis that closes the one at ``opening``."""
    depth = 0
    for i, character in enumerate(formula[opening:], opening):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return i
    raise ValueError(f"parentheses must be closed; given {formula}")


def _identifier(found: re.Match[str]) -> str:
    base = found["base"]
    text = rf"\mathrm{{{base.replace('_', ' ')}}}" if base in NAMES else SYMBOLS.get(base, base).strip()
    if found["accent"]:
        text = f"{ACCENTS[found['accent']]}{{{text}}}"
    below = found["digit"] or ""
    if sub := found["sub"]:
        inner = latex(sub.strip("{}")) if sub[0] == "{" or len(sub) < 4 else rf"\mathrm{{{sub}}}"
        below = f"{below},{inner}" if below else inner
    after = "".join(SYMBOLS.get(character, character) for character in found["after"] or "")
    return (r"\mathrm{d}" if found["d"] else "") + text + (f"_{{{below}}}" if below else "") + after


def cell(text: str) -> str:
    """HTML of one equation, or of words with formulas among them."""
    tokens = text.split(" ")
    worded = any(WORD.fullmatch(token) for token in tokens)  # else a number in brackets is a factor
    runs = groupby(tokens, lambda token: bool(WORD.fullmatch(token) or (worded and REFERENCE.fullmatch(token))))
    return " ".join(escape(" ".join(run)) if words else mathml(" ".join(run)) for words, run in runs)


def mathml(formula: str) -> str:
    """MathML, which browsers show by themselves."""
    from latex2mathml.converter import convert

    return str(convert(latex(formula)))


def typeset(markdown: str) -> str:
    """The page with its blocks of equations as HTML."""
    return BLOCK.sub(lambda found: _block(found[0]), markdown)


def _block(text: str) -> str:
    rows = []
    for line in text.strip("\n").split("\n"):
        number = NUMBERED.match(line.strip())
        cells = re.split(r" {2,}", line.strip()[number.end() :] if number else line.strip())
        shown = "".join(f"<span>{cell(one)}</span>" for one in cells)
        name = f' id="equation-{number[1]}"' if number else ""
        rows.append(f"<div{name}><span>{f'({number[1]})' if number else ''}</span>{shown}</div>")
    return f'<div class="equations">{"".join(rows)}</div>\n'
