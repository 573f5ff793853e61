"""Full-catalogue evaluation against ranking one prefix at a time."""

import math
import sys
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.support.recsys_data import make_model, make_split
from ttt4rec import item_blocks
from ttt4rec.recsys import evaluate
from ttt4rec.recsys.data.windows import evaluation_prefixes


@given(st.lists(st.integers(1, 60), max_size=40))
def test_batches_are_as_large_as_the_limit_allows(lengths):
    module = sys.modules[evaluate.__module__]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "TOKENS_PER_BATCH", 50)
        found = [batch.tolist() for batch in module._by_length(SimpleNamespace(lengths=torch.tensor(lengths)))]
    assert [i for batch in found for i in batch] == sorted(range(len(lengths)), key=lengths.__getitem__)
    for batch in found:
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= 50
    for batch, following in pairwise(found):
        assert (len(batch) + 1) * lengths[following[0]] > 50


@pytest.mark.parametrize("part", ["valid", "test"])
@pytest.mark.parametrize("sizes", [None, (40, 50)])
def test_agrees_with_one_prefix_at_a_time(tmp_path, monkeypatch, part, sizes):
    if sizes is not None:  # many batches, few scores at once
        monkeypatch.setattr(sys.modules[evaluate.__module__], "TOKENS_PER_BATCH", sizes[0])
        monkeypatch.setattr(item_blocks, "SCORES_PER_BLOCK", sizes[1])
    split = make_split(tmp_path)
    model = make_model(split).double().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    hits, gains, count = 0, 0.0, 0
    first, end = split.bounds(part)
    with torch.no_grad():
        for user in range(split.histories.num_users):
            history = torch.from_numpy(split.histories.history(user))
            for p in range(int(first[user]), int(end[user])):
                scores = model.scores(model(history[None, max(0, p - 8) : p])[0, -1])
                rank = int((scores > scores[history[p] - 1]).sum()) + 1
                count += 1
                hits += rank <= 5
                gains += 1 / math.log2(rank + 1) if rank <= 5 else 0
    metrics = evaluate(model, evaluation_prefixes(split, part, max_len=8), cutoffs=(5,))
    assert metrics["HR@5"] == pytest.approx(hits / count)
    assert metrics["NDCG@5"] == pytest.approx(gains / count)


def test_the_models_mode_is_put_back(tmp_path):
    split = make_split(tmp_path)
    model = make_model(split).train()
    windows = evaluation_prefixes(split, "test", max_len=8)
    assert evaluate(model, windows) == evaluate(model, windows)  # no dropout
    assert model.training


def test_scores_that_are_not_numbers_are_refused(tmp_path):
    split = make_split(tmp_path)
    model = make_model(split)
    torch.nn.init.constant_(model.norm.weight, float("nan"))
    with pytest.raises(ValueError, match="NaN"):
        evaluate(model, evaluation_prefixes(split, "test", max_len=8))


def test_a_constant_scorer_does_not_look_good(tmp_path):
    split = make_split(tmp_path)
    model = make_model(split)
    torch.nn.init.zeros_(model.embedding.weight)
    metrics = evaluate(model, evaluation_prefixes(split, "test", max_len=8), cutoffs=(10,))
    assert metrics["HR@10"] == 0


@pytest.mark.parametrize("block", [60, pytest.param(1 << 23, marks=pytest.mark.slow)])
def test_excluding_what_was_seen(tmp_path, monkeypatch, block):
    monkeypatch.setattr(item_blocks, "SCORES_PER_BLOCK", block)
    split = make_split(tmp_path)
    model = make_model(split).eval()
    ranks = []
    first, end = split.bounds("test")
    with torch.no_grad():
        for user in range(split.histories.num_users):
            history = torch.from_numpy(split.histories.history(user))
            for p in range(int(first[user]), int(end[user])):
                if history[p] in history[:p]:
                    continue
                scores = model.scores(model(history[None, max(0, p - 8) : p])[0, -1])
                target = float(scores[history[p] - 1])
                scores[history[:p] - 1] = -torch.inf
                ranks.append(int((scores > target).sum()) + 1)
    assert 0 < len(ranks) < split.num_targets("test")
    metrics = evaluate(model, evaluation_prefixes(split, "test", max_len=8), cutoffs=(5,), exclude_seen=True)
    assert metrics["HR@5"] == pytest.approx(sum(rank <= 5 for rank in ranks) / len(ranks))
    assert metrics["MRR"] == pytest.approx(sum(1 / rank for rank in ranks) / len(ranks))
