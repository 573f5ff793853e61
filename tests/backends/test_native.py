"""The compiled path: its numbers are the reference's, and where it cannot be compiled the eager path runs."""

import ctypes
import logging
import os
import pwd
import shutil
import threading
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.support.batches import batches
from tests.support.checks import (
    BACKBONES,
    INNERS,
    assert_close,
    assert_states_close,
    check_gradients,
    flat,
    inner_inputs,
    inner_results,
    make_layer,
    run_inner,
)
from tests.support.crash import fork, wait
from tests.support.steps import read_on, step_arguments
from ttt4rec import TTTState, native, ttt_linear
from ttt4rec.arguments import TokenStep
from ttt4rec.native import build, cache, full_softmax, inner_loop, step, threads
from ttt4rec.native.item_index import IndexCall
from ttt4rec.native.whole_layer import AroundCall
from ttt4rec.native.whole_step import BlockCall, LayerCall, ModelCall, NormCall
from ttt4rec.operators import token_step

FP32 = 3e-6  # a few roundings of 6e-8, summed over features, tokens and mini-batches


@pytest.mark.parametrize("inner", INNERS)
@given(batch=batches(head_dims=(8, 16, 24)), seed=st.integers(0, 99))
def test_equals_the_reference(inner, batch, seed):
    shape, where = batch
    torch.manual_seed(seed)
    inputs = inner_inputs(inner, **shape | {"hidden": 2 * shape["D"]})
    o, state, grads = inner_results(inner, inputs, backend="reference", **where)
    own_o, own_state, own_grads = inner_results(inner, inputs, backend="native", **where)
    assert_close(own_o, o, name="o")
    assert_states_close(own_state, state)
    for name, expected in grads.items():
        assert_close(own_grads[name], expected, name=f"grad {name}")


@pytest.mark.parametrize("inner", INNERS)
def test_gradcheck_from_state_to_state(inner):
    inputs = inner_inputs(inner, B=1, L=5, H=1, D=8, K=3, hidden=16)
    tokens = ("q", "k", "v", "inner_lr")
    state = TTTState(
        tuple(torch.randn(1, *x.shape, dtype=torch.float64) * 0.1 for n, x in inputs.items() if n[0] in "Wb"),
        *(torch.randn(1, 2, 1, 8, dtype=torch.float64) for _ in range(2)),
        0.1 * torch.rand(1, 2, 1, dtype=torch.float64),
        torch.tensor([2]),
    )
    shared = {name: x for name, x in inputs.items() if name not in tokens}

    def function(q, k, v, lr, *weights):
        own = TTTState(weights, state.pending_k, state.pending_v, state.pending_lr, state.position)
        given = dict(zip(tokens, (q, k, v, lr), strict=True)) | shared
        o, end = run(inner, given, state=own)
        return o, *end.weights

    check_gradients(function, [*(inputs[name] for name in tokens), *state.weights])


@pytest.mark.parametrize("inner", INNERS)
@pytest.mark.parametrize("head_dim", [64, *(pytest.param(D, marks=pytest.mark.slow) for D in (32, 128))])
def test_large_heads_in_float32(inner, head_dim):
    inputs = {n: x.float() for n, x in inner_inputs(inner, B=2, L=19, H=1, D=head_dim, K=16).items()}
    exact = flat(inner_results(inner, {n: x.double() for n, x in inputs.items()}, backend="reference"))
    for name, actual in flat(inner_results(inner, inputs, backend="native")).items():
        assert_close(actual, exact[name], FP32, name)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 1, 2), (2, 1, 2), (1, 7, 2), (2, 7, 1), (2, 7, 3)])
def test_tokens_may_be_parts_of_wider_rows(sizes):
    B, L, H = sizes
    inputs = inner_inputs("linear", B=B, L=L, H=H, D=8, K=3)
    expected, _ = run("linear", inputs)
    wide = torch.stack([inputs[name] for name in "qkv"], 2)  # [B, L, 3, H, D]
    parts = inputs | {name: wide[:, :, i] for i, name in enumerate("qkv")}
    assert torch.equal(run("linear", parts)[0], expected)


def test_libraries_of_different_shapes_share_nothing():
    """Both have 32 hidden features: if the loader takes their names for one, the second has the sizes of the first."""
    for head_dim in (16, 8):
        inputs = inner_inputs("mlp", B=1, L=9, H=2, D=head_dim, K=4, hidden=32)
        expected = flat(inner_results("mlp", inputs, backend="reference"))
        for name, actual in flat(inner_results("mlp", inputs, backend="native")).items():
            assert_close(actual, expected[name], name=name)


CALLS = {  # what crosses into C++, and what there tells its size
    inner_loop.ScanCall: (build.INNER_LOOP, "ttt_call_size"),
    step.StepCall: (build.STEP, "ttt_step_call_size"),
    LayerCall: (build.STEP, "ttt_layer_call_size"),
    NormCall: (build.STEP, "ttt_norm_call_size"),
    BlockCall: (build.STEP, "ttt_block_call_size"),
    ModelCall: (build.STEP, "ttt_model_call_size"),
    AroundCall: (build.AROUND, "ttt_around_call_size"),
    full_softmax._Call: (build.SOFTMAX, "softmax_call_size"),
    IndexCall: (build.SOFTMAX, "index_call_size"),
}


def test_structures_are_as_large_in_both_languages():
    ours = {x for x in ctypes.Structure.__subclasses__() if x.__module__.startswith("ttt4rec.native")}
    assert ours == CALLS.keys()
    for structure, (sources, function) in CALLS.items():
        for scalar in ("float",) if sources == build.SOFTMAX else ("float", "double"):
            size = getattr(build.library("linear", 16, 0, scalar, sources), function)
            size.restype = ctypes.c_int64
            assert size() == ctypes.sizeof(structure), structure


@pytest.mark.parametrize("inner", INNERS)
def test_threads_change_no_number(inner, monkeypatch):
    inputs = inner_inputs(inner, B=5, L=11, H=3, D=8, K=4, dtype=torch.float32)
    alone = flat(inner_results(inner, inputs, backend="native"))
    monkeypatch.setattr(threads, "ALONE", 0)
    monkeypatch.setattr(threads.torch, "get_num_threads", lambda: 3)
    for name, x in flat(inner_results(inner, inputs, backend="native")).items():
        assert torch.equal(x, alone[name]), name


@pytest.mark.parametrize("flush", [False, True])
def test_other_threads_treat_denormals_as_the_caller_does(flush, monkeypatch):
    monkeypatch.setattr(threads.torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(threads, "_executors", {})
    everyone, seen = threading.Barrier(3), []
    threads.share(lambda begin, _: (begin < 3 and everyone.wait(10)) and 0, 24)  # all have begun, under the usual rule

    def look(begin, end):
        if begin < 3:
            everyone.wait(10)
        return seen.append(threads.flushes_denormals()) or 0

    torch.set_flush_denormal(flush)
    try:
        threads.share(look, 24)
    finally:
        torch.set_flush_denormal(False)
    assert seen == [flush] * 24


def test_a_small_call_does_not_wait_for_a_large_one(monkeypatch):
    monkeypatch.setattr(threads.torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(threads, "_executors", {})
    occupied, done = threading.Event(), threading.Event()
    threads._executor(2).submit(lambda: (occupied.set(), done.wait(10)))
    occupied.wait(10)
    threads.share(lambda begin, end: 0, 2)
    assert not done.is_set()
    done.set()


def test_every_row_is_shared_out_once(monkeypatch):
    monkeypatch.setattr(threads.torch, "get_num_threads", lambda: 4)
    for rows in (0, 1, 3, 31, 32, 33, 1000):
        seen = []
        threads.share(lambda begin, end, seen=seen: seen.extend(range(begin, end)) or 0, rows)
        assert sorted(seen) == list(range(rows))
    with pytest.raises(MemoryError, match="no memory"):
        threads.share(lambda begin, _: int(begin == 2), 64)


def test_after_an_interruption_nobody_works_on(monkeypatch):
    monkeypatch.setattr(threads.torch, "get_num_threads", lambda: 3)
    caller, begun = threading.current_thread(), []

    def work(begin, end):
        if threading.current_thread() is caller:
            raise KeyboardInterrupt
        begun.append(begin)
        time.sleep(0.02)
        return 0

    with pytest.raises(KeyboardInterrupt):
        threads.share(work, 240)
    count = len(begun)
    time.sleep(0.1)
    assert len(begun) == count < 23


def test_after_a_thread_that_cannot_be_started_nobody_works_on(monkeypatch):
    monkeypatch.setattr(threads.torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(threads, "_executors", {})
    start, begun, ended = threading.Thread.start, [], []

    def starts_one(self):
        if threads._executor(3)._threads:
            begun[0].wait(10)
            raise RuntimeError("can't start new thread")
        begun.append(threading.Event())
        start(self)

    def work(begin, end):
        begun[0].set()
        time.sleep(0.05)
        ended.append(begin)
        return 0

    monkeypatch.setattr(threading.Thread, "start", starts_one)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        threads.share(work, 240)
    count = len(ended)
    time.sleep(0.2)
    assert len(ended) == count < 20


def test_a_compiled_step_does_not_write_beside_its_pool():
    torch._dynamo.reset()
    layer = make_layer("linear", "transformer", width=16, backend="native")
    pool, x = layer.make_pool(4), torch.randn(2, 16, dtype=torch.float64)
    around = torch.full((6, *pool.records.shape[1:]), 7.0, dtype=torch.float64)
    around[1:5] = pool.records
    pool.records = around[1:5]
    before = around.clone()
    step = torch.compile(layer.step, fullgraph=True, backend="eager")
    for slots in ([-1, 1], [4, 1]):
        # no_grad: after an error within, Dynamo leaves the mode as the step has it
        with torch.no_grad(), pytest.raises((ValueError, IndexError), match=r"slots must be from 0 to 3|out of bounds"):
            step(x, pool, torch.tensor(slots))
        assert torch.equal(around, before)


def test_a_step_in_low_precision_from_slots_with_strides():
    layer = make_layer("mlp", "transformer", width=16, backend="native").bfloat16()
    pools, x = [layer.make_pool(5) for _ in range(2)], torch.randn(3, 16, dtype=torch.bfloat16)
    slots = torch.tensor([4, 9, 0, 9, 2, 9])[::2]
    y = layer.step(x, pools[0], slots)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, layer.step(x, pools[1], slots.contiguous()))
    assert torch.equal(pools[0].records, pools[1].records)
    q, k, v, *rest = step_arguments("mlp", torch.float32, D=8, K=4)
    given = TokenStep(*(t.bfloat16() for t in (q, k, v)), *rest)
    assert token_step(given, "native")[0].dtype == torch.bfloat16


def test_a_forked_child_has_its_own_threads(monkeypatch):
    monkeypatch.setattr(threads.torch, "get_num_threads", lambda: 2)
    inputs = inner_inputs("linear", B=4, L=5, H=1, D=8, K=4, dtype=torch.float32)
    expected, _ = run("linear", inputs)
    child = os.fork()
    if child == 0:  # no assertion may leave the child
        os._exit(int(not torch.equal(run("linear", inputs)[0], expected)))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize("inner", INNERS)
def test_not_a_number_stays_in_its_stream_and_behind_its_mini_batch(inner):
    inputs = inner_inputs(inner, B=2, L=9, H=1, D=8, K=4)
    expected, _ = run(inner, inputs)
    inputs["k"][0, 5, 0, 3] = float("nan")
    o, _ = run(inner, inputs)
    assert o[0, 5:].isnan().any(-1).all()
    assert torch.equal(o[0, :4], expected[0, :4])
    assert torch.equal(o[1], expected[1])


@pytest.mark.parametrize("inner", INNERS)
@pytest.mark.parametrize("head_dim", [8, 16, 64])
@pytest.mark.parametrize("mini_batch_size", [1, 2, 8])
def test_the_step_equals_the_eager_path(inner, head_dim, mini_batch_size):
    """Outputs, and all of the records that is ever read, also of streams that were not stepped."""
    D, K = head_dim, mini_batch_size
    given = step_arguments(inner, torch.float64, D=D, K=K)
    expected = TokenStep(*(x.clone() if isinstance(x, torch.Tensor) else x for x in given))
    assert_close(token_step(given, "native")[0], token_step(expected, "eager")[0])
    slots, offset, record = given.slots, given.offset, given.record
    weights, rows = record.parts(expected.records)
    own_weights, own_rows = record.parts(given.records)
    for own, w in zip(own_weights, weights, strict=True):
        assert_close(own, w)
    for slot, place in zip(slots.tolist(), offset.tolist(), strict=True):
        for own, row in zip(record.row_parts(own_rows[slot]), record.row_parts(rows[slot]), strict=True):
            assert_close(own[:, : place + 1], row[:, : place + 1])


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("inner", INNERS)
def test_a_layer_steps_as_it_reads(inner, backbone):
    layer = make_layer(inner, backbone, width=16, backend="native")
    x = torch.randn(3, 11, 16, dtype=torch.float64)
    whole, end = layer(x, return_state=True)
    pool, slots = layer.make_pool(5), torch.tensor([4, 0, 2])
    assert_close(read_on(layer, x, pool, slots), whole)
    assert_states_close(pool.read(slots), end.detach())


@pytest.mark.parametrize("inner", INNERS)
def test_compile_has_no_graph_break(inner):
    torch._dynamo.reset()
    layer = make_layer(inner, "transformer", width=16, backend="native")
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 7, 16, dtype=torch.float64)
    assert_close(compiled(x), layer(x))


def test_what_it_does_not_take():
    with pytest.raises(RuntimeError, match=r"'native' takes head and hidden dimensions .* 8; given 6 and 0"):
        run("linear", inner_inputs("linear", B=1, L=3, H=1, D=6, K=2))
    meta = native.shape_refusal(torch.device("meta"), "linear", 8, 0, torch.float32, build.STEP)
    assert meta == "runs on CPU tensors; given meta"


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
        run("linear", inputs)
    assert not list(fresh.glob("*")) if fresh.exists() else True


def test_no_compiler_on_the_path(fresh, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(fresh))
    with pytest.raises(build.BuildError, match="none of c"):
        build.compiler()


@given(rows=st.integers(1, 3), columns=st.integers(1, 700), gap=st.integers(0, 3), seed=st.integers(0, 99))
def test_softmax_of_a_block_in_rows_of_any_width(rows, columns, gap, seed):
    torch.manual_seed(seed)
    memory = torch.randn(rows, columns + gap) * 10
    scores, before = memory[:, gap:], memory[:, :gap].clone()
    column, grad = torch.randint(-2, columns + 2, (rows,)), torch.randn(rows)
    exact = scores.double()
    lse = full_softmax.log_sum_exp(scores)
    eps = torch.finfo(torch.float32).eps
    assert (lse - exact.logsumexp(1)).abs().max() <= 4 * eps + eps * exact.abs().max()
    expected = exact.softmax(1)
    for row, target in enumerate(column.tolist()):
        if 0 <= target < columns:
            expected[row, target] -= 1
    allowed = 2 * eps * (2 + exact.abs().max())  # of the exponent, of exp and of the product
    full_softmax.to_gradient(scores, lse, column, grad)
    assert (scores - expected * grad.double().unsqueeze(1)).abs().max() <= allowed * grad.abs().max()
    assert torch.equal(memory[:, :gap], before)


def test_softmax_of_scores_that_are_not_numbers_and_of_other_kinds():
    scores = torch.zeros(2, 20)
    scores[0, 19] = float("nan")
    assert full_softmax.log_sum_exp(scores).isnan().tolist() == [True, False]
    scores = torch.tensor([[0.0, torch.inf], [-torch.inf, -torch.inf], [1.0, -torch.inf]])
    assert full_softmax.log_sum_exp(scores).tolist() == [torch.inf, -torch.inf, 1.0]
    assert "given torch.float64 on cpu" in native.softmax_refusal(torch.device("cpu"), torch.float64)
    assert "on meta" in native.softmax_refusal(torch.device("meta"), torch.float32)


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
        run("linear", inputs)
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
    expected, _ = run("linear", inputs)
    kept = sorted(quick.iterdir())
    forget_libraries()
    (tmp_path / "script").write_bytes(b"\x00\x01")
    (tmp_path / "script").chmod(0o755)
    monkeypatch.setenv("CXX", command.format(script=tmp_path / "script"))
    with caplog.at_level(logging.WARNING, "ttt4rec"):
        assert torch.equal(run("linear", inputs)[0], expected)
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


def run(inner, inputs, **options):
    return run_inner(inner, inputs, backend="native", **options)
