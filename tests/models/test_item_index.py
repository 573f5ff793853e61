"""The index of a table: exact, whoever else is asked about, and as old as the table."""

import copy
import math
import os
import pickle
import subprocess
import sys
import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tools.documents import ROOT
from ttt4rec import TTT4Rec, TTT4RecConfig
from ttt4rec.models import full_softmax, item_index
from ttt4rec.models.item_index import ItemIndex
from ttt4rec.native import item_index as native

EPS = torch.finfo(torch.float32).eps


@pytest.fixture(autouse=True)
def plain(monkeypatch):
    """How often the plain way was taken."""
    calls = []

    def top_k(*given):
        calls.append(given)
        return TOP_K(*given)

    monkeypatch.setattr(full_softmax, "top_k", top_k)
    return calls


TOP_K = full_softmax.top_k


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def adverse(h, items):
    """Rows that the codes miss by half a step, in the direction of h."""
    table = torch.randint(-126, 126, (items + 1, h.shape[1]), generator=torch.Generator().manual_seed(1)).float()
    table += 0.499 * h[0] / h[0].abs().max().clamp(min=1e-30)
    table[:, 0] = 127
    return table


TABLES = {
    "normal": lambda h, items: random(items + 1, h.shape[1], seed=1),
    "whole": lambda h, items: random(items + 1, h.shape[1], seed=1).round(),
    "equal": lambda h, items: random(1, h.shape[1], seed=1).expand(items + 1, -1).clone(),
    "zeros": lambda h, items: random(items + 1, h.shape[1], seed=1) * (torch.arange(items + 1) % 3 == 0)[:, None],
    "peaks": lambda h, items: random(items + 1, h.shape[1], seed=1) ** 9,
    "sizes": lambda h, items: random(items + 1, h.shape[1], seed=1) * 10.0 ** (40 * random(items + 1, 1, seed=2) / 4),
    "adverse": adverse,
}
cases = st.fixed_dictionaries(
    {
        "kind": st.sampled_from(sorted(TABLES)),
        "width": st.integers(1, 200),
        "rows": st.integers(1, 20),
        "items": st.integers(1, 300),
        "scales": st.tuples(*[st.sampled_from([1.0, 1e-44, 1e-38, 1e-20, 1e-9, 1e9, 1e15, 1e30, 1e37])] * 2),
        "seed": st.integers(0, 99),
    }
)


def case(kind, width, rows, items, scales, seed):
    h = random(rows, width, seed=seed)
    table = TABLES[kind](h, items)
    h, table = h * scales[0], table * scales[1]
    return h, table.clamp(-3e38, 3e38)


def all_scores(index, table, h):
    """As the index takes them, and their bounds."""
    both = [native.bounds(index._items(table), row) for row in h]
    return (torch.stack(x) for x in zip(*both, strict=True))


@given(case=cases.map(lambda given: case(**given)))
def test_no_score_is_above_its_bound(case):
    h, table = case
    for flush in (False, True):
        torch.set_flush_denormal(flush)
        try:
            scores, bounds = all_scores(ItemIndex(), table, h[:2])
        finally:
            torch.set_flush_denormal(False)
        reached = ~(bounds < scores)
        assert bool(reached.all()), (scores[~reached], bounds[~reached])


@given(case=cases.map(lambda given: case(**given)), data=st.data())
def test_the_result_is_that_of_scoring_every_item(case, data):
    h, table = case
    rows, items = len(h), len(table) - 1
    k = data.draw(st.integers(1, items))
    pairs = data.draw(st.lists(st.tuples(st.integers(0, rows - 1), st.integers(1, items)), max_size=40))
    seen = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2)
    index = ItemIndex()
    scores, _ = all_scores(index, table, h)
    if bool(scores.isnan().any()):
        return
    scores[seen[:, 0], seen[:, 1] - 1] = -torch.inf
    expected, columns = (scores + 0.0).sort(dim=1, descending=True, stable=True)
    best, found = index.top_k(h, table, k, (seen[:, 0], seen[:, 1]))
    assert torch.equal(best, expected[:, :k])
    assert torch.equal(found, columns[:, :k] + 1)


@pytest.mark.parametrize("width", [8, 64, 100])
def test_few_items_are_scored_where_the_bound_serves(width):
    """It is a tight one: with it, a hundredth of the items or so remain; so the test above tells something."""
    h, table = random(1, width), random(5001, width, seed=1)
    scores, bounds = all_scores(ItemIndex(), table, h)
    assert (bounds >= scores.topk(10).values[:, -1:]).sum() < 50
    assert (bounds - scores).max() < 0.25 * scores.std()


def test_codes_that_miss_in_the_direction_of_h_leave_no_slack():
    """So the bound cannot be a lower one, and these tables do try it. Of this h the codes miss nothing."""
    h = random(1, 64).sign() * (torch.arange(64) > 0)
    scores, bounds = all_scores(ItemIndex(), adverse(h, 500), h)
    missed = 0.499 * h.square().sum() / h.abs().max()
    assert (bounds - scores).max() < 0.05 * missed


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_who_else_is_asked_about_changes_no_number(threads, monkeypatch):
    h, table, index = random(67, 48), random(3001, 48, seed=1), ItemIndex()
    seen = torch.arange(67).repeat(30), torch.randint(1, 3001, (67 * 30,))
    alone = [index.top_k(row[None], table, 9, (torch.zeros(30).long(), seen[1][n::67])) for n, row in enumerate(h)]
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    for rows in (slice(0, 67), slice(3, 11), slice(60, 67), slice(5, 7)):
        inside = (seen[0] >= rows.start) & (seen[0] < rows.stop)
        best = index.top_k(h[rows], table, 9, (seen[0][inside] - rows.start, seen[1][inside]))
        for own, single in zip(best, zip(*alone[rows], strict=True), strict=True):
            assert torch.equal(own, torch.cat(single))


@pytest.mark.parametrize("rows", [1, 2, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("exclude", [False, True])
def test_it_agrees_with_the_plain_way(rows, dtype, exclude, plain):
    h, table, index = random(rows, 64).to(dtype), random(2001, 64, seed=1), ItemIndex()
    table[1500:1600] = table[100:200]  # ties
    seen = (torch.arange(rows).repeat(7), torch.randint(1, 2001, (7 * rows,))) if exclude else None
    best, found = index.top_k(h, table, 20, seen)
    assert not plain
    expected, items = TOP_K(h, table, 20, seen)
    allowed = 64 * EPS * h.float().norm(dim=1, keepdim=True) * table.norm(dim=1).max()
    assert ((best - expected).abs() <= allowed).all()
    gaps = TOP_K(h, table, 21, seen)[0].diff(dim=1).abs()
    clear = (gaps > 2 * allowed) | (gaps == 0)
    clear[:, 1:] &= clear[:, :-1].clone()
    assert torch.equal(found[clear], items[clear])
    assert clear.float().mean() > 0.5


def test_whole_numbers_give_the_plain_result(plain):
    h, table = random(9, 32).round(), random(501, 32, seed=1).round()
    seen = torch.arange(9).repeat(40), torch.randint(1, 501, (360,))
    for k in (1, 10, 500, 700):
        for own, expected in zip(ItemIndex().top_k(h, table, k, seen), TOP_K(h, table, k, seen), strict=True):
            assert torch.equal(own, expected)
    assert not plain


def test_a_million_items():
    h, table, index = random(3, 8), random(1_000_001, 8, seed=1), ItemIndex()
    best, found = index.top_k(h, table, 5)
    expected, items = TOP_K(h, table, 5)
    torch.testing.assert_close(best, expected)
    assert torch.equal(found, items)
    made = index._items(table)
    assert sum(x.nbytes for x in (made.codes, made.scale, made.size, made.error)) <= 1_000_064 * (8 + 12)


@pytest.mark.slow
@pytest.mark.parametrize("without", ["avx512vnni", "avx512f", "avx"])
def test_processors_that_have_less(without, tmp_path):
    """Each takes sums of products its own way; what a processor lacks anyhow it can do without."""
    chosen = "no_score_is_above or agrees_with_the_plain_way or whole_numbers or overflow or changes_no_number"
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", __file__, "-k", chosen]
    environment = os.environ | {"CXX": f"c++ -mno-{without}", "TTT4REC_CACHE": str(tmp_path)}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-3000:]
    assert " passed" in run.stdout


CHANGES = {
    "in place": lambda model: torch.nn.init.normal_(model.embedding.weight),
    "a row": lambda model: model.embedding.weight.detach()[7].mul_(9),
    "loaded": lambda model: model.load_state_dict(other().state_dict()),
    "assigned": lambda model: model.load_state_dict(other().state_dict(), assign=True),
    "replaced": lambda model: setattr(model, "embedding", other().embedding),
    **{
        name: lambda model, kind=kind, options=options: trained(model, kind(model.parameters(), lr=1.0, **options))
        for name, kind, options in (
            ("sgd", torch.optim.SGD, {}),
            ("adam", torch.optim.Adam, {}),
            ("foreach", torch.optim.Adam, {"foreach": True}),
            ("fused", torch.optim.Adam, {"fused": True}),
        )
    },
}


def other(seed=1):
    torch.manual_seed(seed)
    return TTT4Rec(TTT4RecConfig(300, 16, num_heads=2))


def trained(model, optimizer):
    model.nll(random(4, 16), torch.tensor([1, 2, 3, 4]), "mean").backward()
    optimizer.step()


@pytest.mark.parametrize("change", CHANGES)
def test_a_table_that_changed_is_read_again(change):
    model, index, h = other(0), ItemIndex(), random(3, 16)
    index.top_k(h, model.embedding.weight, 300)
    before = index._made
    index.top_k(h, model.embedding.weight, 300)
    assert index._made is before
    with torch.no_grad() if change in ("in place", "a row") else torch.enable_grad():
        CHANGES[change](model)
    given = index.top_k(h, model.embedding.weight, 300)
    assert index._made is not before
    for own, fresh in zip(given, ItemIndex().top_k(h, model.embedding.weight, 300), strict=True):
        assert torch.equal(own, fresh)


def test_what_is_written_past_pytorch_is_read_after_clear():
    table, index, h = random(301, 16), ItemIndex(), random(1, 16)
    index.top_k(h, table, 1)
    table.data[5] = 100 * h[0]
    index.clear()
    assert index.top_k(h, table, 1)[1].item() == 5


def test_a_model_takes_an_index(plain):
    model, index, h = other(), ItemIndex(), random(5, 16)
    index.prepare(model.embedding.weight)
    made = index._made
    best, found = model.top_k(h, 4, index=index)
    assert index._made is made
    assert not plain
    assert not best.requires_grad
    expected, items = model.top_k(h, 4)
    torch.testing.assert_close(best, expected)
    assert torch.equal(found, items)


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_a_table_without_finite_numbers_is_refused(number):
    table, index = random(301, 16), ItemIndex()
    table[0] = number  # padding takes no part
    index.top_k(random(1, 16), table, 3)
    table[300, 15] = number
    for _ in range(2):
        for call in (index.prepare, lambda x: index.top_k(random(1, 16), x, 3)):
            with pytest.raises(ValueError, match="the item table must have finite numbers; given some from"):
                call(table)
    table[300, 15] = 0
    index.top_k(random(1, 16), table, 3)


@pytest.mark.parametrize("rows", [1, 2, 9])
@pytest.mark.parametrize("number", [math.nan, math.inf, 3e38])
def test_scores_that_are_not_numbers(rows, number):
    """Also where a sum overflows on its way: inf - inf."""
    h, table = random(rows, 16), random(301, 16)
    h[-1, :2] = number
    table[:, :2] = torch.tensor([3e38, -3e38])
    index = ItemIndex()
    with pytest.raises(ValueError, match="scores must be numbers; given NaN"):
        index.top_k(h, table, 3)
    assert index.top_k(random(rows, 16), random(301, 16), 3)[0].isfinite().all()


def test_sums_over_codes_that_overflow_where_those_of_the_table_do_not():
    h, table = torch.tensor([[-3e37, 3e37]]), torch.zeros(101, 2)
    table[60] = torch.tensor([1e-3, 1.1e-3])
    assert ItemIndex().top_k(h, table, 1)[1].item() == 60


def test_wrong_arguments_are_refused_as_the_plain_way_does():
    h, table, index = random(2, 4), random(11, 4), ItemIndex()
    rows = torch.tensor([0, 1])
    with pytest.raises(ValueError, match="k must be at least 1; given 0"):
        index.top_k(h, table, 0)
    with pytest.raises(ValueError, match=r"given \[2, 3\] and \[11, 4\]"):
        index.top_k(h[:, :3], table, 1)
    for wrong in (11, 0, -1):
        with pytest.raises(ValueError, match=f"items must be from 1 to 10; given .*{wrong}"):
            index.top_k(h, table, 3, (rows, torch.tensor([1, wrong])))
    for wrong in (2, -1):
        with pytest.raises(IndexError, match=f"rows must be from 0 to 1; given .*{wrong}"):
            index.top_k(h, table, 3, (torch.tensor([0, wrong]), torch.tensor([1, 2])))
    for top_k in (index.top_k, TOP_K):
        with pytest.raises(IndexError, match="out of bounds"):
            top_k(h, table, 3, (rows, torch.tensor([1, 2, 3])))
    with pytest.raises(ValueError, match="top_k depends on values"):
        index.top_k(h.to("meta"), table.to("meta"), 3)


PLAIN = {
    "float64 table": lambda h, table: (h, table.double()),
    "float64 h": lambda h, table: (h.double(), table),
    "bfloat16": lambda h, table: (h.bfloat16(), table.bfloat16()),
    "strides": lambda h, table: (h, table.T.contiguous().T),
    "nobody": lambda h, table: (h[:0], table),
    "no items": lambda h, table: (h, table[:1]),
    "wide": lambda h, table: (torch.ones(1, item_index.WIDEST + 1), torch.ones(3, item_index.WIDEST + 1)),
}


@pytest.mark.parametrize("kind", PLAIN)
def test_what_goes_the_plain_way(kind, plain):
    h, table = PLAIN[kind](random(2, 16), random(31, 16))
    for own, expected in zip(ItemIndex().top_k(h, table, 3), TOP_K(h, table, 3), strict=True):
        assert torch.equal(own, expected)
    assert len(plain) == 1


def test_without_a_compiler_the_plain_way_serves(plain, monkeypatch):
    monkeypatch.setattr(item_index, "shortcut", lambda *_: None)
    h, table = random(2, 16), random(31, 16)
    assert torch.equal(ItemIndex().top_k(h, table, 3)[1], TOP_K(h, table, 3)[1])
    assert len(plain) == 1


def test_under_modes_and_gradients():
    h, table, index = random(2, 16).requires_grad_(), random(31, 16).requires_grad_(), ItemIndex()
    expected = index.top_k(h.detach(), table.detach(), 3)
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu")):
        with mode():
            best, found = index.top_k(h, table, 3)
            torch.testing.assert_close(best, expected[0])
            assert torch.equal(found, expected[1])
            assert not best.requires_grad
    with torch.inference_mode():
        assert torch.equal(index.top_k(h, table.clone(), 3)[1], expected[1])


def test_several_threads_may_ask_and_copies_are_empty():
    h, table, index = random(8, 16), random(3001, 16), ItemIndex()
    expected, found = ItemIndex().top_k(h, table, 5), [None] * 4

    def ask(n):
        found[n] = [index.top_k(h, table, 5) for _ in range(20)]

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(4)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert all(
        torch.equal(x, y) for results in found for result in results for x, y in zip(result, expected, strict=True)
    )
    for copied in (copy.deepcopy(index), pickle.loads(pickle.dumps(index))):
        assert copied._made is None
