"""The compiled path: its numbers are the reference's, and its threads and structures."""

import ctypes
import os
import threading
import time

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
from tests.support.steps import read_on, step_arguments
from ttt4rec import TTTState, native
from ttt4rec.arguments import TokenStep
from ttt4rec.native import build, full_softmax, inner_loop, step, threads
from ttt4rec.native.item_index import IndexCall
from ttt4rec.native.whole_layer import PassCall, ProductCall
from ttt4rec.native.whole_step import BlockCall, LayerCall, ModelCall, NormCall
from ttt4rec.operators import token_step

FP32 = 3e-6  # a few roundings of 6e-8, summed over features, tokens and mini-batches


@pytest.mark.parametrize("inner", INNERS)
@given(batch=batches(head_dims=(8, 16)), seed=st.integers(0, 99))
def test_equals_the_reference(inner, batch, seed):
    check_equals_the_reference(inner, batch, seed, 4)


@pytest.mark.slow
@pytest.mark.parametrize("inner", INNERS)
@given(batch=batches(head_dims=(8, 16, 24)), seed=st.integers(0, 99))
def test_equals_the_reference_with_fewer_hidden_features(inner, batch, seed):
    check_equals_the_reference(inner, batch, seed, 2)


def check_equals_the_reference(inner, batch, seed, hidden):
    shape, where = batch
    torch.manual_seed(seed)
    inputs = inner_inputs(inner, **shape | {"hidden": hidden * shape["D"]})
    o, state, grads = inner_results(inner, inputs, backend="reference", **where)
    own_o, own_state, own_grads = inner_results(inner, inputs, backend="native", **where)
    assert_close(own_o, o, name="o")
    assert_states_close(own_state, state)
    for name, expected in grads.items():
        assert_close(own_grads[name], expected, name=f"grad {name}")


@pytest.mark.parametrize("inner", INNERS)
def test_gradcheck_from_state_to_state(inner):
    inputs = inner_inputs(inner, B=1, L=5, H=1, D=8, K=3)
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
@pytest.mark.parametrize("head_dim", [32, 64, 128])
@pytest.mark.slow
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


@pytest.mark.slow
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
    step.DecayCall: (build.STEP, "ttt_decay_call_size"),
    LayerCall: (build.STEP, "ttt_layer_call_size"),
    NormCall: (build.STEP, "ttt_norm_call_size"),
    BlockCall: (build.STEP, "ttt_block_call_size"),
    ModelCall: (build.STEP, "ttt_model_call_size"),
    PassCall: (build.PASS, "ttt_pass_call_size"),
    ProductCall: (build.PASS, "ttt_product_call_size"),
    full_softmax._Call: (build.SOFTMAX, "softmax_call_size"),
    full_softmax.TotalCall: (build.SOFTMAX, "softmax_total_call_size"),
    IndexCall: (build.SOFTMAX, "index_call_size"),
}


def test_structures_are_as_large_in_both_languages():
    ours = {x for x in ctypes.Structure.__subclasses__() if x.__module__.startswith("ttt4rec.native")}
    assert ours == CALLS.keys()
    for structure, (sources, function) in CALLS.items():
        shapes = [("linear", 8, 0, scalar) for scalar in ("float", "double")]
        for shape in [full_softmax.SHAPE[:-1]] if sources == build.SOFTMAX else shapes:
            size = getattr(build.library(*shape, sources), function)
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
@pytest.mark.parametrize("head_dim", [8, 16, pytest.param(64, marks=pytest.mark.slow)])
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


def run(inner, inputs, **options):
    return run_inner(inner, inputs, backend="native", **options)
