"""What the kernels' source must not say, since the oldest supported Triton, 3.6, does not take it."""

import ast

import pytest

from tools.documents import ROOT

SOURCES = sorted((ROOT / "src" / "ttt4rec" / "kernels").glob("*.py"))


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_bounds_and_shapes_are_names(source):
    """An attribute of a constant, as ``tile.taps``, is no constant there; a ``tl.constexpr`` made of it is."""
    for call in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(call, ast.Call) and ast.unparse(call.func) in ("tl.static_range", "tl.zeros"):
            shape = call.args[0]
            sizes = shape.elts if isinstance(shape, ast.Tuple) else call.args
            wrong = [ast.unparse(x) for x in sizes if isinstance(x, ast.Attribute)]
            assert not wrong, f"line {call.lineno}: {wrong}"
