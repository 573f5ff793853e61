"""Compiled libraries: made once, kept where nobody else writes, and the eager path where there are none."""

import logging
import os
import pwd
import shutil
from pathlib import Path

import pytest
import torch

from tests.support.checks import (
    assert_close,
    inner_inputs,
    run_inner,
)
from tests.support.crash import fork, wait
from ttt4rec import native, ttt_linear
from ttt4rec.native import build, cache


def forget_libraries():
    """What a new process knows of libraries: nothing."""
    build._warned.clear()
    for function in (build.library, native.shape_refusal, native.softmax_refusal):
        function.cache_clear()


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """An empty cache, and a process that remembers no library."""
    monkeypatch.setenv("TTT4REC_CACHE", str(tmp_path / "cache"))
    forget_libraries()
    yield tmp_path / "cache"
    forget_libraries()


STAND_IN = """#!/bin/sh
made={inner_loop}
for word; do
  case $word in
    --version) echo stand-in; exit ;;
    *full_softmax.cpp) made={softmax} ;;
  esac
done
{meanwhile}
while [ "$1" != -o ]; do shift; done
cat "$made" >"$2"  # with the rights that the umask gives a new file
"""


def stand_in(folder, inner_loop, softmax, meanwhile=""):
    """In place of a compiler: a command that copies what was compiled before, and does something else before that."""
    script = folder / "stand-in"
    script.write_text(STAND_IN.format(inner_loop=inner_loop, softmax=softmax, meanwhile=meanwhile))
    script.chmod(0o755)
    return script


@pytest.fixture(scope="module")
def compiled():
    """Paths of two libraries that were compiled: of the inner loop, and of the softmax."""
    forget_libraries()
    return build.library("linear", 8, 0, "float")._name, build.library("linear", 16, 0, "float", build.SOFTMAX)._name


@pytest.fixture(scope="module")
def compiler(compiled, tmp_path_factory):
    """One that takes no time; to all that looks after libraries it is one."""
    return str(stand_in(tmp_path_factory.mktemp("compiler"), *compiled))


@pytest.fixture
def quick(compiler, fresh, monkeypatch):
    """``fresh``, with that compiler."""
    monkeypatch.setenv("CXX", compiler)
    return fresh


@pytest.fixture(scope="module")
def filled(compiler, tmp_path_factory):
    """A cache with what the tests below need."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TTT4REC_CACHE", str(folder))
        patch.setenv("CXX", compiler)
        forget_libraries()
        build.library("linear", 8, 0, "float")
        build.library("linear", 16, 0, "float", build.SOFTMAX)
        forget_libraries()
    return folder


BROKEN = {
    "missing": ("no-such-compiler", "which is not there"),
    "empty": ("", "which is not there"),
    "failing": ("false", "the compiler failed: false"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_without_a_compiler_the_eager_path_runs_and_says_so(case, fresh, monkeypatch, caplog):
    command, reason = BROKEN[case]
    monkeypatch.setenv("CXX", command)
    inputs = inner_inputs("linear", B=1, L=5, H=1, D=8, K=2)
    with caplog.at_level(logging.WARNING, "ttt4rec"):
        o, _ = ttt_linear(**inputs, mini_batch_size=2)
        ttt_linear(**inputs, mini_batch_size=2)
    assert_close(o, ttt_linear(**inputs, mini_batch_size=2, backend="eager")[0])
    assert [reason in record.message for record in caplog.records] == [True]  # once
    with pytest.raises(RuntimeError, match=f"'native' cannot be compiled: .*{reason}"):
        run_inner("linear", inputs, backend="native")
    assert not list(fresh.glob("*")) if fresh.exists() else True


def test_no_compiler_on_the_path(fresh, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(fresh))
    with pytest.raises(build.BuildError, match="none of c"):
        build.compiler()


def test_softmax_without_a_compiler(fresh, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "cannot be compiled: $CXX names" in native.softmax_refusal(torch.device("cpu"), torch.float32)


def test_a_cache_that_cannot_be_written(fresh, monkeypatch):
    fresh.write_text("a file where the folder should be")
    with pytest.raises(build.BuildError, match="cannot be compiled to"):
        build.library("linear", 8, 0, "float")


def test_compiled_once_and_kept(quick, monkeypatch):
    build.library("linear", 8, 0, "float")
    assert len(list(quick.glob("*"))) == 1  # nothing beside it
    build.library.cache_clear()
    made, compile_ = [], build._compile
    monkeypatch.setattr(build, "_compile", lambda *given: (made.append(given), compile_(*given)))
    build.library("linear", 8, 0, "float")
    assert made == []
    for name in ("_version", "_processor"):  # a library of another compiler or for another processor is not taken
        build.library.cache_clear()
        with monkeypatch.context() as patch:
            patch.setattr(build, name, lambda *_: "another")
            build.library("linear", 8, 0, "float")
    assert len(made) == 2
    assert len({place.name.rpartition("-")[0] for place in quick.iterdir()}) == 3


def plant(content):
    """In place of the compiler, something that puts its own library into the cache."""

    def compile_(command, place, name):
        place.mkdir(exist_ok=True)
        (place / "made").write_bytes(content)
        cache.keep(place / "made", place, name)

    return compile_


def auto_runs_eagerly(caplog):
    """Run with ``backend="auto"`` twice, and the loss; the one warning that says why all of it was slow."""
    inputs = inner_inputs("linear", B=1, L=5, H=1, D=8, K=2, dtype=torch.float32)
    with caplog.at_level(logging.WARNING, "ttt4rec"):
        o, _ = ttt_linear(**inputs, mini_batch_size=2)
        ttt_linear(**inputs, mini_batch_size=2)
        assert native.softmax_refusal(torch.device("cpu"), torch.float32)
    assert torch.equal(o, ttt_linear(**inputs, mini_batch_size=2, backend="eager")[0])
    (record,) = caplog.records
    assert "the slower eager path runs" in record.message
    with pytest.raises(RuntimeError, match="'native' cannot be compiled"):
        run_inner("linear", inputs, backend="native")
    return record.message


def test_a_library_that_cannot_be_loaded(fresh, monkeypatch, caplog):
    monkeypatch.setattr(build, "_compile", plant(b"not a library"))
    with pytest.raises(build.BuildError, match=r"made no library that works; .* cannot be loaded"):
        build.library("linear", 8, 0, "float")
    assert "cannot be loaded" in auto_runs_eagerly(caplog)


def test_a_library_that_lacks_a_function(quick, monkeypatch, caplog):
    softmax = Path(build.library("linear", 16, 0, "float", build.SOFTMAX)._name).read_bytes()
    native.softmax_refusal.cache_clear()
    monkeypatch.setattr(build, "_compile", plant(softmax))
    inputs = inner_inputs("linear", B=1, L=5, H=1, D=8, K=2)
    with caplog.at_level(logging.WARNING, "ttt4rec"):
        o, _ = ttt_linear(**inputs, mini_batch_size=2)
    assert torch.equal(o, ttt_linear(**inputs, mini_batch_size=2, backend="eager")[0])
    (record,) = caplog.records
    assert "ttt_forward" in record.message


def test_without_a_home(fresh, monkeypatch, caplog):
    monkeypatch.delenv("TTT4REC_CACHE")
    monkeypatch.delenv("HOME")

    def nobody(_):
        raise KeyError("getpwuid(): uid not found")

    monkeypatch.setattr(pwd, "getpwuid", nobody)
    message = auto_runs_eagerly(caplog)
    assert "$HOME is not set" in message
    assert "set $TTT4REC_CACHE" in message


def test_a_cache_that_leads_to_itself(fresh, monkeypatch, caplog):
    loop = fresh.with_name("loop")
    loop.symlink_to(loop)
    monkeypatch.setenv("TTT4REC_CACHE", str(loop))
    assert "loop" in auto_runs_eagerly(caplog)
    assert "HOME" not in caplog.text


@pytest.mark.parametrize("case", ["read-only", "unreadable"])
def test_a_cache_that_refuses(case, fresh, monkeypatch, caplog):
    """Of permissions, which do not bind the user root, who may run this test."""

    def refuse(self, *args, **kwargs):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir" if case == "read-only" else "exists", refuse)
    assert "Permission denied" in auto_runs_eagerly(caplog)


COMPILERS = {
    "no words": ("c++ '", "No closing quotation"),
    "no program": ("{script}", "Exec format error"),
    "odd bytes": ("{odd}", "the compiler failed"),
}


@pytest.mark.parametrize("case", COMPILERS)
def test_commands_that_are_no_compiler(case, fresh, monkeypatch, caplog, tmp_path):
    command, reason = COMPILERS[case]
    for name, content in {
        "script": b"\x00\x01",
        "odd": b"#!/bin/sh\nprintf '\\377\\376'; printf '\\377' >&2; exit 1\n",
    }.items():
        (tmp_path / name).write_bytes(content)
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("CXX", command.format(script=tmp_path / "script", odd=tmp_path / "odd"))
    assert reason in auto_runs_eagerly(caplog)


@pytest.mark.parametrize("command", ["no-such-compiler", "false", "{script}"])
def test_a_filled_cache_serves_without_a_compiler(command, quick, monkeypatch, caplog, tmp_path):
    inputs = inner_inputs("linear", B=1, L=5, H=1, D=8, K=2, dtype=torch.float32)
    expected, _ = run_inner("linear", inputs, backend="native")
    kept = sorted(quick.iterdir())
    forget_libraries()
    (tmp_path / "script").write_bytes(b"\x00\x01")
    (tmp_path / "script").chmod(0o755)
    monkeypatch.setenv("CXX", command.format(script=tmp_path / "script"))
    with caplog.at_level(logging.WARNING, "ttt4rec"):
        assert torch.equal(run_inner("linear", inputs, backend="native")[0], expected)
    assert not caplog.records
    assert sorted(quick.iterdir()) == kept


def flip(path, place=-100):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.unlink()  # the old file is in use
    path.write_bytes(content)


def test_a_damaged_library_is_compiled_anew_or_not_used(quick, monkeypatch, caplog):
    build.library("linear", 8, 0, "float")
    (path,) = quick.iterdir()
    whole = path.read_bytes()
    flip(path)
    forget_libraries()
    build.library("linear", 8, 0, "float")
    assert path.read_bytes() == whole
    flip(path)
    forget_libraries()
    monkeypatch.setenv("CXX", "no-such-compiler")
    message = auto_runs_eagerly(caplog)
    assert "no-such-compiler" in message
    assert f"{path} cannot be loaded: its bytes are not those that were written" in message


STRANGER = 54321


def give_away(path, monkeypatch):
    """Have a file or folder belong to somebody else than who runs the test."""
    if os.geteuid() == 0:
        os.chown(path, STRANGER, -1)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: STRANGER)


@pytest.mark.parametrize("what", ["folder", "file"])
@pytest.mark.parametrize("change", ["owner", 0o757, 0o775])
def test_what_others_may_have_put_there_is_not_loaded(what, change, filled, quick, monkeypatch, caplog):
    shutil.copytree(filled, quick)
    for path in [quick] if what == "folder" else list(quick.iterdir()):
        give_away(path, monkeypatch) if change == "owner" else path.chmod(change)
    kept = sorted(quick.iterdir())
    forget_libraries()
    message = auto_runs_eagerly(caplog)
    assert str(quick) in message
    assert ("must belong to you or root" if change == "owner" else f"given {change:o}") in message
    assert sorted(quick.iterdir()) == kept


@pytest.mark.parametrize(
    ("mode", "owned", "taken"),
    [(0o777, True, False), (0o1777, True, True), (0o755, True, True), (0o755, False, False), (0o1777, False, False)],
)
def test_the_folder_of_the_cache_cannot_be_exchanged(mode, owned, taken, quick, monkeypatch, caplog):
    parent = quick.parent / "parent"
    parent.mkdir()
    parent.chmod(mode)
    if not owned:
        give_away(parent, monkeypatch)
    monkeypatch.setenv("TTT4REC_CACHE", str(parent / "cache"))
    if taken:
        build.library("linear", 8, 0, "float")
        assert (parent / "cache").stat().st_mode & 0o022 == 0
    else:
        assert f"they can exchange what is in {parent};" in auto_runs_eagerly(caplog)


def test_libraries_are_written_by_nobody_else(quick):
    before = os.umask(0)
    try:
        build.library("linear", 8, 0, "float")
    finally:
        os.umask(before)
    assert [path.stat().st_mode & 0o022 for path in (quick, *quick.iterdir())] == [0, 0]
    forget_libraries()
    build.library("linear", 8, 0, "float")


def test_processes_that_compile_at_once(compiled, fresh, tmp_path, monkeypatch):
    """Each has begun before one ends."""
    everyone = 'touch "{0}/$$"; for wait in $(seq 1000); do [ "$(ls {0} | wc -l)" -ge 3 ] && break; sleep 0.01; done'
    (tmp_path / "begun").mkdir()
    monkeypatch.setenv("CXX", str(stand_in(tmp_path, *compiled, everyone.format(tmp_path / "begun"))))
    children = [fork(lambda: build.library("linear", 8, 0, "float")) for _ in range(3)]
    assert [wait(child) for child in children] == [0, 0, 0]
    assert len(list((tmp_path / "begun").iterdir())) == 3
    assert len(list(fresh.glob("*"))) == 1
