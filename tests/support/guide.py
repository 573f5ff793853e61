"""A plugin of pytest: carries out docs/extending.md before tests are collected, so that they run over what it adds.

    python -m pytest -p tests.support.guide tests/models/test_mixers.py -k mean

A block that begins with the name of a file becomes that file, in a folder from which it can be imported.
"""

import re
import sys
import tempfile
from pathlib import Path

from tests.project.test_readme import python_blocks
from tools.documents import ROOT

GUIDE = ROOT / "docs" / "extending.md"
FILES = tempfile.TemporaryDirectory(prefix="guide")
names: dict[str, object] = {"__name__": "guide"}
"""What the guide's program has defined in the end."""


def pytest_configure() -> None:
    """Run the blocks in order, each with the names of those before it."""
    sys.path.insert(0, FILES.name)
    for line, source in python_blocks(GUIDE.read_text()):
        if file := re.match(r"# (\w+\.py)\n", source):
            Path(FILES.name, file[1]).write_text(source)
        else:
            exec(compile("\n" * line + source, GUIDE.name, "exec"), names)
