"""Losses, ranks and best items in blocks against the matrix of all scores."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from ttt4rec import item_blocks, native
from ttt4rec.arguments import FullSoftmax
from ttt4rec.models import full_softmax
from ttt4rec.native import threads
from ttt4rec.operators import full_softmax_nll, full_softmax_total_nll

N, V, C = 37, 101, 8


def case(dtype=torch.float32, scale=1.0, seed=0):
    torch.manual_seed(seed)
    h = (torch.randn(N, C, dtype=torch.float64) * scale).to(dtype)
    table = torch.randn(V + 1, C, dtype=torch.float64).to(dtype)
    return h, table, torch.randint(1, V + 1, (N,))


def wide_case(targets, num_items, width):
    """Of a width at which products, exponentials and sums of a sum of losses are one on a CPU."""
    torch.manual_seed(targets)
    h, table = torch.randn(targets, width), torch.randn(num_items + 1, width)
    return h, table, torch.randint(1, num_items + 1, (targets,))


def dense_nll(h, table, items, reduction="none"):
    return F.cross_entropy(h @ table[1:].T, items - 1, reduction=reduction)


def gradients(function, h, table, items, weights, reduction="none", **options):
    h, table = h.detach().requires_grad_(), table.detach().requires_grad_()
    loss = function(h, table, items, reduction, **options)
    weights = weights if reduction == "none" else weights[0]
    return loss.detach(), *torch.autograd.grad(loss, (h, table), weights.to(loss.dtype))


@pytest.fixture(params=[N * 7, N * V - 1, 1 << 23], ids=["blocks", "two-blocks", "whole"])
def _block(request, monkeypatch):
    monkeypatch.setattr(item_blocks, "SCORES_PER_BLOCK", request.param)
    monkeypatch.setattr(item_blocks, "FEW_ROWS", 8)  # so that a sum goes by items, and by 36 and all rows at a time


@pytest.mark.usefixtures("_block")
@pytest.mark.parametrize("scale", [1.0, 100.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["auto", "eager", "reference"])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_loss_and_gradients_are_those_of_all_scores(dtype, scale, backend, reduction):
    h, table, items = case(dtype, scale)
    weights = torch.randn(N)
    wide = [x.to(torch.promote_types(dtype, torch.float32)) for x in (h, table)]
    exact = gradients(dense_nll, h.double(), table.double(), items, weights.double(), reduction)
    dense = gradients(dense_nll, *wide, items, weights, reduction)
    given = gradients(full_softmax.nll, h, table, items, weights, reduction, backend=backend)
    assert [x.dtype for x in given] == [torch.promote_types(dtype, torch.float32), dtype, dtype]
    highest = (h.double() @ table.double().T).abs().max()
    relative = torch.finfo(given[0].dtype).eps * highest  # of exp(score - log of the sum), either rounded
    for name, x, plain, true in zip(("loss", "h", "table"), given, dense, exact, strict=True):
        rounded = torch.finfo(x.dtype).eps * true.abs().max()
        allowed = 4 * (plain - true).abs().max() + 2 * relative * true.abs().max() + rounded
        assert (x - true).abs().max() <= allowed, name
    assert given[2][0].abs().max() == 0


@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
@pytest.mark.parametrize(("targets", "num_items", "width"), [(16, 5, 16), (37, 64, 48), (300, 333, 64), (65, 129, 112)])
def test_a_sum_in_one_pass_is_that_of_all_scores(targets, num_items, width, scale):
    h, table, items = wide_case(targets, num_items, width)
    h, ones = h * scale, torch.ones(targets)
    exact = gradients(dense_nll, h.double(), table.double(), items, ones.double(), "sum")
    dense = gradients(dense_nll, h, table, items, ones, "sum")
    given = gradients(full_softmax.nll, h, table, items, ones, "sum")
    relative = torch.finfo(torch.float32).eps * (h.double() @ table.double().T).abs().max()
    for name, x, plain, true in zip(("loss", "h", "table"), given, dense, exact, strict=True):
        allowed = 4 * (plain - true).abs().max() + 2 * relative * true.abs().max()
        assert (x - true).abs().max() <= allowed, name
    assert given[2][0].abs().max() == 0


def test_threads_change_no_number_of_a_sum(monkeypatch):
    h, table, items = wide_case(300, 2000, 32)
    alone = native.full_softmax_total_nll(FullSoftmax(h, table, items))
    monkeypatch.setattr(threads.torch, "get_num_threads", lambda: 3)
    for ours, theirs in zip(native.full_softmax_total_nll(FullSoftmax(h, table, items)), alone, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_no_number_shows_in_a_sum(bad):
    h, table, items = wide_case(20, 50, 16)
    h[3, 5] = bad
    loss, grad_h, grad_table = gradients(full_softmax.nll, h, table, items, torch.ones(20), "sum")
    assert loss.isnan()
    assert grad_h[3].isnan().all()
    assert grad_h[:3].isfinite().all()
    assert grad_table[1:].isnan().all()


@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_gradients_of_a_narrow_table_are_summed_in_float32(monkeypatch, reduction):
    monkeypatch.setattr(item_blocks, "SCORES_PER_BLOCK", 4 * V)
    monkeypatch.setattr(item_blocks, "FEW_ROWS", 4)
    many = 4096  # equal terms, four at a time: a sum in bfloat16 would stop growing at 256 of them
    h, table, items = torch.ones(many, C).bfloat16(), torch.zeros(V + 1, C).bfloat16(), torch.full((many,), 7)
    _, _, grad = gradients(full_softmax.nll, h, table, items, torch.ones(many), reduction)
    exact = torch.full((V,), many / V, dtype=torch.float64)
    exact[7 - 1] -= many
    assert ((grad[1:].double() / exact[:, None] - 1).abs() <= torch.finfo(torch.bfloat16).eps / 2).all()


@pytest.mark.parametrize("few", [1, 64], ids=["rows", "blocks-of-items"])
def test_gradients_against_differences_and_the_operators_contract(monkeypatch, few):
    monkeypatch.setattr(item_blocks, "SCORES_PER_BLOCK", 3 * 4)
    monkeypatch.setattr(item_blocks, "FEW_ROWS", few)
    h, table, items = torch.randn(3, 2).double(), torch.randn(8, 2).double(), torch.tensor([1, 7, 7])
    h.requires_grad_(), table.requires_grad_()
    for reduction in ("none", "sum", "mean"):
        assert torch.autograd.gradcheck(partial(full_softmax.nll, items=items, reduction=reduction), (h, table))
    for operator in (full_softmax_nll, full_softmax_total_nll):
        torch.library.opcheck(operator.op, (h, table, items, "eager"))


@pytest.mark.usefixtures("_block")
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_a_second_derivative_is_an_error(reduction):
    h, table, items = case()
    loss = full_softmax.nll(h.requires_grad_(), table, items, reduction).sum()
    (first,) = torch.autograd.grad(loss, h, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        first.square().sum().backward()


@pytest.mark.usefixtures("_block")
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_one_gradient_without_the_other(reduction):
    h, table, items = case()
    weights = torch.ones(N)
    _, *both = gradients(full_softmax.nll, h, table, items, weights, reduction)
    for wanted, expected in zip((h, table), both, strict=True):
        loss = full_softmax.nll(*(x.requires_grad_(x is wanted) for x in (h, table)), items, reduction).sum()
        assert torch.equal(torch.autograd.grad(loss, wanted)[0], expected)


def test_a_sum_is_differentiated_as_it_is_computed_where_that_pays(monkeypatch):
    calls = []
    monkeypatch.setattr(
        full_softmax, "full_softmax_total_nll", lambda *given: calls.append(1) or full_softmax_total_nll(*given)
    )

    def taken(h, table, items, reduction="sum"):
        calls.clear()
        full_softmax.nll(h, table, items, reduction)
        return bool(calls)

    h, table, items = case()
    assert not taken(h, table, items)
    for wanted in (h, table):
        wanted.requires_grad_()
        assert taken(h, table, items)
        assert taken(h, table, items, "mean")
        assert not taken(h, table, items, "none")
        with torch.no_grad():
            assert not taken(h, table, items)
        wanted.requires_grad_(False)
    table.requires_grad_()
    monkeypatch.setattr(item_blocks, "SCORES_PER_BLOCK", (N - 1) * V)
    assert not taken(h, table, items)  # fewer rows than there are, and than are worth a visit of the table
    assert taken(h[:-1], table, items[:-1])
    assert item_blocks.rows_at_once(torch.empty(9, C)) == min(item_blocks.CACHED_ROWS, (N - 1) * V // 8)


def test_operators_with_inputs_of_other_strides():
    h, table, items = case()
    h, table = h.T.contiguous().T, table.T.contiguous().T
    loss, lse = full_softmax_nll(FullSoftmax(h, table, items), "auto")
    torch.library.opcheck(full_softmax_nll.backward_op, (h, table, items, lse, torch.ones_like(loss), "auto"))
    h.requires_grad_(), table.requires_grad_()
    for operator in (full_softmax_nll, full_softmax_total_nll):
        torch.library.opcheck(operator.op, (h, table, items, "auto"))


@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_an_item_that_does_not_exist_in_a_compiled_program(reduction):
    h, table, items = case()
    items[3] = V + 1
    torch._dynamo.reset()
    compiled = torch.compile(full_softmax.nll, backend="aot_eager", fullgraph=True)
    with pytest.raises(ValueError, match="from 1 to 101; given"):
        compiled(h.requires_grad_(), table, items, reduction)


@pytest.mark.usefixtures("_block")
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_traced_in_one_graph(reduction):
    h, table, items = case()
    arguments = (h.requires_grad_(), table.requires_grad_(), items, reduction)
    compiled = torch.compile(full_softmax.nll, backend="aot_eager", fullgraph=True)
    torch._dynamo.reset()
    given, expected = compiled(*arguments), full_softmax.nll(*arguments)
    torch.testing.assert_close(given, expected)
    for own, true in zip(*(torch.autograd.grad(x.sum(), (h, table)) for x in (given, expected)), strict=True):
        torch.testing.assert_close(own, true)


@pytest.mark.usefixtures("_block")
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_autocast_leaves_the_scores_alone(reduction):
    h, table, items = case()
    expected = gradients(full_softmax.nll, h, table, items, torch.ones(N), reduction)
    with torch.autocast("cpu", torch.bfloat16):
        loss = full_softmax.nll(h.requires_grad_(), table.requires_grad_(), items, reduction)
        assert torch.equal(full_softmax.ranks(h, table, items), ranks_of_all_scores(h, table, items))
    given = loss.detach(), *torch.autograd.grad(loss, (h, table), torch.ones_like(loss))
    for a, b in zip(given, expected, strict=True):
        assert torch.equal(a, b)


def dense_ranks(scores, items):
    """The mean of a rank before and one behind all that score the same."""
    own = scores.gather(1, items[:, None] - 1)
    return 1 + (scores > own).sum(1).double() + ((scores == own).sum(1) - 1) / 2


def ranks_of_all_scores(h, table, items):
    with torch.autocast("cpu", enabled=False):
        return dense_ranks(h @ table[1:].T, items)


@given(
    st.integers(1, 8).flatmap(
        lambda width: st.lists(
            st.tuples(st.lists(st.integers(-2, 2), min_size=width, max_size=width), st.integers(1, width)),
            min_size=1,
            max_size=6,
        )
    )
)
def test_rank_is_the_mean_over_all_orders_of_ties(rows):
    table = torch.cat((torch.zeros(1, len(rows[0][0])), torch.eye(len(rows[0][0]))))
    given = full_softmax.ranks(
        torch.tensor([row for row, _ in rows]).float(), table, torch.tensor([x for _, x in rows])
    )
    for rank, (scores, item) in zip(given.tolist(), rows, strict=True):
        best = sorted(scores, reverse=True).index(scores[item - 1]) + 1
        worst = len(scores) - sorted(scores).index(scores[item - 1])
        assert rank == (best + worst) / 2


@pytest.mark.usefixtures("_block")
@pytest.mark.parametrize("levels", [None, 2])
@pytest.mark.parametrize("many", [1, 1 << 20], ids=["whole-rows", "blocks-of-items"])
def test_ranks_are_those_of_all_scores(monkeypatch, levels, many):
    monkeypatch.setattr(item_blocks, "MANY_ROWS", many)
    h, table, items = case(torch.float64)
    if levels:  # many ties
        h, table = h.clamp(-1, 1).round(), table.clamp(-1, 1).round()
    assert torch.equal(full_softmax.ranks(h, table, items), ranks_of_all_scores(h, table, items))


@given(st.lists(st.sampled_from([-math.inf, -1e38, -1e-45, 0.0, 1e-45, 1.0, 3e38, math.inf]), min_size=1))
def test_ranks_of_scores_that_differ_by_next_to_nothing_or_are_infinite(values):
    table = torch.tensor([0.0, *values])[:, None]
    everything = torch.arange(1, len(table))
    given = full_softmax.ranks(torch.ones(len(values), 1), table, everything)
    assert torch.equal(given, dense_ranks(table[1:].T.expand(len(values), -1), everything))


@pytest.mark.usefixtures("_block")
def test_ties_of_equal_items_survive_rounding():
    h, table, items = case()
    table[1:] = table[1]
    assert full_softmax.ranks(h, table, items).tolist() == [(V + 1) / 2] * N


@pytest.mark.usefixtures("_block")
@pytest.mark.parametrize("k", [1, 5, V, V + 3])
@pytest.mark.parametrize("levels", [None, 2])
@pytest.mark.parametrize("exclude", [False, True])
def test_top_k_is_a_stable_sort_of_all_scores(k, levels, exclude):
    h, table, items = case()
    if levels:
        h, table = h.clamp(-1, 1).round(), table.clamp(-1, 1).round()
    scores, seen = h @ table[1:].T + 0.0, None
    if exclude:
        seen = (torch.arange(N).repeat(2), torch.cat((items, items % V + 1)))
        scores[seen[0], seen[1] - 1] = -torch.inf
    expected, columns = scores.sort(dim=1, descending=True, stable=True)
    best, found = full_softmax.top_k(h, table, k, seen)
    torch.testing.assert_close(best, expected[:, :k], rtol=0, atol=1e-5)
    if levels:  # whole numbers, so that ties are ties however the product is taken
        assert torch.equal(found, columns[:, :k] + 1)
    if exclude and k >= V:
        assert (best[:, -2:] == -torch.inf).all()


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=12), st.integers(1, 12))
def test_top_k_orders_any_floats(values, k):
    table = torch.tensor([0.0, *values])[:, None]
    best, items = full_softmax.top_k(torch.ones(1, 1), table, k)
    expected = sorted(range(len(values)), key=lambda j: (-values[j], j))[:k]
    assert items[0].tolist() == [j + 1 for j in expected]
    assert best[0].tolist() == [values[j] for j in expected]


@pytest.mark.usefixtures("_block")
def test_what_was_seen_takes_no_part_in_ranks():
    h, table, items = case(torch.float64)
    rows, others = torch.arange(N).repeat_interleave(3), torch.randint(1, V + 1, (3 * N,))
    keep = others != items[rows]
    rows, others = rows[keep], others[keep]
    scores = h @ table[1:].T
    scores[rows, others - 1] = -torch.inf
    given = full_softmax.ranks(h, table, items, (rows, others))
    assert torch.equal(given, dense_ranks(scores, items))


def test_nothing_to_do():
    h, table, items = case()
    assert full_softmax.nll(h[:0], table, items[:0]).shape == (0,)
    assert full_softmax.nll(h[:0].requires_grad_(), table, items[:0], "sum") == 0
    assert full_softmax.ranks(h[:0], table, items[:0]).shape == (0,)
    assert full_softmax.top_k(h[:0], table, 3)[1].shape == (0, 3)


@pytest.mark.usefixtures("_block")
def test_scores_that_are_not_numbers():
    h, table, items = case()
    table[V // 2, 0] = math.nan
    with pytest.raises(ValueError, match="NaN"):
        full_softmax.ranks(h, table, items)
    with pytest.raises(ValueError, match="NaN"):
        full_softmax.top_k(h, table, 3)
    assert full_softmax.nll(h, table, items).isnan().all()
    assert full_softmax.nll(h.requires_grad_(), table, items, "sum").isnan()


@pytest.mark.parametrize("function", [full_softmax.nll, full_softmax.ranks])
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"items": torch.zeros(N, dtype=torch.int64)}, ValueError, "from 1 to 101; given 0 to 0"),
        ({"items": torch.full((N,), V + 1)}, ValueError, "given 102 to 102"),
        ({"items": torch.ones(N)}, TypeError, "int64; given torch.float32"),
        ({"items": torch.ones(N + 1, dtype=torch.int64)}, ValueError, r"given \[38\]"),
        ({"h": torch.ones(N, C + 1)}, ValueError, r"given \[37, 9\] and \[102, 8\]"),
        ({"h": torch.ones(C)}, ValueError, r"given \[8\]"),
    ],
)
def test_wrong_arguments(function, change, error, message):
    h, table, items = case()
    with pytest.raises(error, match=message):
        function(**({"h": h, "table": table, "items": items} | change))


def test_wrong_reduction():
    with pytest.raises(ValueError, match="one of none, sum, mean; given 'average'"):
        full_softmax.nll(*case(), "average")


@pytest.mark.parametrize("wrong", [11, 0, -1])
def test_what_was_seen_must_be_items(wrong):
    h, table, rows = torch.randn(2, 4), torch.randn(11, 4), torch.tensor([0, 1])
    for seen in (torch.tensor([1, wrong]), torch.tensor([wrong, 1])):
        with pytest.raises(ValueError, match=f"items must be from 1 to 10; given .*{wrong}"):
            full_softmax.top_k(h, table, 3, (rows, seen))
        with pytest.raises(ValueError, match="items must be from 1 to 10"):
            full_softmax.ranks(h, table, torch.tensor([2, 3]), (rows, seen))


def test_wrong_k():
    with pytest.raises(ValueError, match="k must be at least 1; given 0"):
        full_softmax.top_k(*case()[:2], 0)
