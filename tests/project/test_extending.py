"""The guide on extending: its blocks run, and the tests over the tables take in what it adds."""

import re
import subprocess
import sys

import pytest

from tests.support.guide import GUIDE
from tools.documents import ROOT

HELD_TO = {
    "models/test_mixers.py": "mean",
    "models/test_model.py": "mean",
    "layers/test_initialisation.py": "mean",
    "layers/test_meta.py": "(mean|recall)",
    "layers/test_step.py": "(mean|recall)",
    "layers/test_functional.py": "recall",
    "operators/test_operators.py": "(toy|recall)",
}


@pytest.mark.slow
def test_the_guide_runs_and_what_it_adds_is_held_to_the_checks_of_what_is_there():
    """In a process of its own: operators cannot be taken away again."""
    tests = ["tests/project/extended.py", *(f"tests/{name}" for name in HELD_TO)]
    command = [sys.executable, "-m", "pytest", "-q", "-rA", "-p", "tests.support.guide", *tests]
    command += ["-k", "(mean or toy or recall) and not are_added and not compile"]  # which take as long as the rest
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout
    for name, toy in HELD_TO.items():
        assert re.search(rf"^PASSED tests/{name}::.*{toy}", ran.stdout, flags=re.MULTILINE), name


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`([a-z_/]+/[a-z_/]*\.?\w*)`", GUIDE.read_text()))))
def test_files_that_the_guide_names_are_there(path):
    assert (ROOT / path).exists() or (ROOT / "src" / "ttt4rec" / path).exists()
