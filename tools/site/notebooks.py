"""Notebooks as pages: their text, their code, and what they printed and drew when they were saved."""

import json
from collections.abc import Iterator
from typing import Any

NOTEBOOK = ".ipynb"


def page_of(text: str) -> str:
    """A notebook's file as Markdown."""
    return "\n\n".join(part for cell in json.loads(text)["cells"] for part in _parts(cell)) + "\n"


def sources(text: str) -> list[str]:
    """The code of a notebook's cells."""
    return ["".join(cell["source"]) for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]


def _parts(cell: dict[str, Any]) -> Iterator[str]:
    source = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        yield source
        return
    yield f"```python\n{source}\n```"
    for output in cell["outputs"]:
        if picture := output.get("data", {}).get("image/png"):
            yield f"![What this code draws](data:image/png;base64,{''.join(picture).strip()})"
        elif printed := "".join(output.get("text", ())).strip("\n"):
            yield f"```text\n{printed}\n```"
