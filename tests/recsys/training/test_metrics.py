import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.recbole_metrics import CUTOFFS, FIXTURE, PRIME, made_up
from ttt4rec.models import full_softmax
from ttt4rec.recsys.training.metrics import RankingMetrics


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(2, 200).map(lambda twice: twice / 2), min_size=1, max_size=30),
    st.integers(0, 30),
    st.sets(st.integers(1, 120), min_size=1, max_size=3),
)
def test_averages_are_those_of_the_plain_definition(ranks: list[float], cut: int, cutoffs: set[int]) -> None:
    metrics = RankingMetrics(sorted(cutoffs))
    for piece in (ranks[:cut], ranks[cut:]):
        metrics.update(torch.tensor(piece))
    expected = {"MRR": sum(1 / rank for rank in ranks)}
    for k in cutoffs:
        hits = [rank for rank in ranks if rank <= k]
        expected[f"HR@{k}"] = len(hits)
        expected[f"NDCG@{k}"] = sum(1 / math.log2(1 + rank) for rank in hits)
        expected[f"MRR@{k}"] = sum(1 / rank for rank in hits)
    assert metrics.compute() == pytest.approx({name: total / len(ranks) for name, total in expected.items()})


def test_names_and_their_order() -> None:
    metrics = RankingMetrics()
    metrics.update(torch.tensor([1.0, 20.0]))
    values = metrics.compute()
    assert list(values) == ["HR@10", "NDCG@10", "MRR@10", "HR@50", "NDCG@50", "MRR@50", "MRR"]
    assert values["HR@10"] == values["NDCG@10"] == values["MRR@10"] == 0.5
    assert values["HR@50"] == 1.0


def test_many_float32_ranks_are_summed_in_float64() -> None:
    metrics = RankingMetrics([10])
    for _ in range(20):
        metrics.update(torch.full((1_000_000,), 3.0))
    assert metrics.compute() == pytest.approx({"HR@10": 1.0, "NDCG@10": 0.5, "MRR@10": 1 / 3, "MRR": 1 / 3}, abs=1e-12)


def test_bad_use() -> None:
    with pytest.raises(ValueError, match="given none"):
        RankingMetrics().compute()
    for cutoffs in ([], [0, 10]):
        with pytest.raises(ValueError, match="cutoffs must be one or more of at least 1"):
            RankingMetrics(cutoffs)
    for rank in (0.5, torch.nan):
        with pytest.raises(ValueError, match="ranks must be at least 1"):
            RankingMetrics().update(torch.tensor([rank]))


RECBOLE = json.loads(FIXTURE.read_text())
RECBOLE_NAMES = {"HR": "hit", "NDCG": "ndcg", "MRR": "mrr"}


def metrics_of(ranks: torch.Tensor) -> dict[str, float]:
    """Our metrics by the names that RecBole has for them."""
    metrics = RankingMetrics(CUTOFFS)
    metrics.update(ranks)
    parts = ([*name.split("@"), value] for name, value in metrics.compute().items() if "@" in name)
    return {f"{RECBOLE_NAMES[name]}@{k}": value for name, k, value in parts}


def ranks_of(scores: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Of a target in every row, for a catalogue whose embeddings are unit vectors."""
    table = torch.cat((torch.zeros(1, scores.shape[1]), torch.eye(scores.shape[1])))
    return full_softmax.ranks(scores, table, targets + 1)


@pytest.mark.parametrize("case", RECBOLE.values(), ids=RECBOLE)
def test_ranks_are_the_mean_ranks_of_recbole(case: dict) -> None:
    scores, targets = made_up(case["steps"])
    assert ranks_of(scores, targets).tolist() == case["ranks"]


def test_metrics_are_those_of_recbole() -> None:
    case = RECBOLE[f"{PRIME} scores"]
    ours = metrics_of(ranks_of(*made_up(case["steps"])))
    assert ours == pytest.approx({name: case["metrics"][name] for name in ours}, abs=1e-10)  # it rounds to ten places
    assert case["metrics"].keys() - ours.keys() == {"gauc"}


def test_metrics_with_ties_are_between_what_recbole_could_have_drawn() -> None:
    case = RECBOLE["16 scores"]
    scores, targets = made_up(case["steps"])
    ours = ranks_of(scores, targets)
    half = ((scores == scores.gather(1, targets[:, None])).sum(1) - 1) / 2
    assert (half > 0).double().mean() > 0.9
    best, middle, worst = (metrics_of(ranks) for ranks in (ours - half, ours, ours + half))
    for name in middle:
        for value in (middle[name], case["metrics"][name]):  # where ties are, its top k are as torch.topk leaves them
            assert worst[name] <= value <= best[name]
    assert worst["ndcg@10"] < case["metrics"]["ndcg@10"] < best["ndcg@10"]
