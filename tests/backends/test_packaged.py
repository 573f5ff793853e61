"""Libraries that the package brings: the best that the processor can run, without a compiler, as right as any other."""

import shutil
from pathlib import Path

import pytest
import torch

from tests.backends.test_native import FP32
from tests.backends.test_native_libraries import compiled, flip, forget_libraries, fresh  # noqa: F401 are fixtures
from tests.support.checks import assert_close, flat, inner_inputs, inner_results, run_inner
from tools import libraries
from ttt4rec.models.item_index import ItemIndex
from ttt4rec.native import build, packaged

SHAPE = "linear", 8, 0, "float"
LEVELS = {level.name: level for level in packaged.LEVELS}
HERE = [level for level in packaged.LEVELS if packaged.runs(level)]


@pytest.fixture
def brought(compiled, fresh, monkeypatch, tmp_path):  # noqa: F811
    """A package that brings a library of one shape at every level, on a machine without a compiler."""
    folder = tmp_path / "libraries"
    monkeypatch.setattr(packaged, "FOLDER", folder)
    monkeypatch.setattr(build, "_run", lambda *command: copied(compiled[0], command))
    for level in packaged.LEVELS:
        build.compile_for(level, folder, *SHAPE, build.INNER_LOOP)
    monkeypatch.undo()
    monkeypatch.setenv("TTT4REC_CACHE", str(fresh))
    monkeypatch.setattr(packaged, "FOLDER", folder)
    monkeypatch.setenv("CXX", "no-such-compiler")
    forget_libraries()
    return folder


def copied(library, command):
    shutil.copy(library, command[command.index("-o") + 1])
    return type("Done", (), {"returncode": 0})


def level_taken(features, monkeypatch, machine="x86_64"):
    monkeypatch.setattr(packaged.platform, "machine", lambda: machine)
    monkeypatch.setattr(packaged, "_features", lambda: frozenset(features))
    build.library.cache_clear()
    return Path(build.library(*SHAPE)._name).parent.name


@pytest.mark.parametrize("name", LEVELS)
def test_a_processor_gets_the_best_that_it_has(name, brought, monkeypatch):
    machine, _, _, needs = LEVELS[name]
    assert level_taken(needs | {"sse2", "avx10"}, monkeypatch, machine) == name
    if needs:
        assert level_taken(needs - {min(needs)}, monkeypatch, machine) != name
    assert run_inner("linear", inner_inputs("linear", B=1, L=5, H=1, D=8, K=2, dtype=torch.float32), backend="native")


def test_nothing_is_loaded_on_another_kind_of_processor(brought, monkeypatch):
    monkeypatch.setattr(packaged.platform, "machine", lambda: "riscv64")
    with pytest.raises(build.BuildError, match="no-such-compiler"):
        build.library(*SHAPE)


def test_a_damaged_library_gives_way_to_the_next(brought, monkeypatch):
    (path,) = (brought / "avx2").iterdir()
    flip(path)
    assert level_taken(LEVELS["avx2"].needs, monkeypatch) == "baseline"


def test_other_shapes_and_types_are_compiled_as_ever(brought):
    for shape in (("linear", 8, 0, "double"), ("linear", 24, 0, "float")):
        with pytest.raises(build.BuildError, match="no-such-compiler"):
            build.library(*shape)


def test_folders_of_packages_may_be_their_groups(brought, monkeypatch):
    """As those of virtual environments are under umask 002; who can write there can write modules too."""
    (path,) = (brought / "baseline").iterdir()
    path.chmod(0o775)
    assert level_taken([], monkeypatch) == "baseline"


@pytest.mark.slow
@pytest.mark.parametrize("level", [level.name for level in HERE])
def test_every_level_is_right(level, fresh, monkeypatch, tmp_path):  # noqa: F811
    """Compiled as for a wheel; in float32, whose tolerance is that of any other library."""
    shape, softmax = ("linear", 16, 0, "float", build.INNER_LOOP), ("linear", 16, 0, "float", build.SOFTMAX)
    monkeypatch.setattr(packaged, "LEVELS", (LEVELS[level],))
    every = [softmax] if level == "avx512-vnni" else [shape, softmax]
    libraries.compile_all(tmp_path / "libraries", every, LEVELS[level].machine)
    monkeypatch.setattr(packaged, "FOLDER", tmp_path / "libraries")
    monkeypatch.setenv("CXX", "no-such-compiler")
    forget_libraries()
    if level != "avx512-vnni":
        inputs = {n: x.float() for n, x in inner_inputs("linear", B=2, L=19, H=2, D=16, K=8).items()}
        exact = flat(inner_results("linear", {n: x.double() for n, x in inputs.items()}, backend="reference"))
        for name, actual in flat(inner_results("linear", inputs, backend="native")).items():
            assert_close(actual, exact[name], FP32, name)
    h, table = torch.randn(5, 40), torch.randn(3000, 40)
    scores, items = ItemIndex().top_k(h, table, 7)
    expected, best = (h @ table[1:].T).topk(7)
    assert torch.equal(items, best + 1)
    assert_close(scores, expected, FP32)
    assert Path(build.library(*softmax)._name).parent.name == level


def test_a_wheel_brings_every_part_of_every_shape():
    every = list(libraries.shapes())
    assert len(set(every)) == len(every) == 5 * len(libraries.HEAD_DIMS) + 1
    assert {sources for *_, sources in every} == {build.INNER_LOOP, build.STEP, build.PASS, build.SOFTMAX}


def test_versions_that_a_library_needs(compiled):  # noqa: F811
    found = libraries.needed(Path(compiled[0]))
    assert (2, 2) <= found["GLIBC"] < (3,)
