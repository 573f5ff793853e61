"""What the tests do to Triton's interpreter changes its speed alone."""

import inspect

import torch
import triton.language as tl
from triton.runtime import interpreter

from tests.support.interpreter import PLACES


@interpreter.InterpretedFunction
def exponential(x, factor):
    return tl.exp(factor * x)


@interpreter.InterpretedFunction
def curve_kernel(x, result, n: tl.constexpr):
    at = tl.program_id(0) * n + tl.arange(0, n)
    total = tl.full((n, 4), 0.0, tl.float32)
    for _ in range(5):
        total += exponential(tl.load(x + at), 0.5)[:, None]
    tl.store(result + at[:, None] * 4 + tl.arange(0, 4)[None, :], total.to(tl.bfloat16))


def run(x):
    result = torch.empty(*x.shape, 4, dtype=torch.bfloat16)
    curve_kernel[(len(x),)](x, result, x.shape[1])
    return result


def language():
    """All that the interpreter replaces some of."""
    return [getattr(owner, name) for owner in (tl, tl.math, tl.tensor) for name in dir(owner) if name != "T"]


def test_a_hastened_interpreter_does_the_same(monkeypatch):
    x, replaced, before = torch.randn(3, 32), [], language()
    originals = [inspect.unwrap(getattr(owner, name)) for owner, name, _ in PLACES]
    replace = originals[0]
    originals[0] = lambda function: (replaced.append(function), replace(function))[1]
    results, counts = [], []
    for hastened in (False, True):
        with monkeypatch.context() as patch:
            for (owner, name, wrap), original in zip(PLACES, originals, strict=True):
                patch.setattr(owner, name, wrap(original) if hastened else original)
            results.append(run(x))
        counts.append(len(replaced))
        replaced.clear()
        assert language() == before
    assert torch.equal(*results)
    torch.testing.assert_close(results[0], (5 * (0.5 * x).exp()).bfloat16()[..., None].expand(3, 32, 4))
    assert counts == [1 + 3 * 5, 1]  # a launch, and every call within


def test_the_interpreter_of_the_tests_is_hastened(pytestconfig):
    interpreting = not torch.cuda.is_available() and pytestconfig.getoption("--emulate") is None
    assert hasattr(interpreter._patch_lang, "__wrapped__") == interpreting
