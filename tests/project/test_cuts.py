"""The pairs of cuts that a GPU is to time first: predictions, the order of things, and that they launch."""

import itertools
import json

import pytest
import torch

from benchmarks import cuts
from ttt4rec.kernels import launch

VERSIONS = ("3.6.0", "3.9.0")


def predicted_of(pair, cut, filling):
    _, predicted = cuts.known_predictions(VERSIONS[0])
    return cuts.prediction(predicted, pair.shape, cut, filling)


@pytest.mark.parametrize("version", VERSIONS)
def test_every_cut_is_predicted(version):
    found, predicted = cuts.known_predictions(version)
    assert found == version
    assert set(predicted) == {f"{p.shape} {'×'.join(map(str, c))}" for p in cuts.PAIRS for c in (p.before, p.after)}
    assert all(row["few"] > 0 < row["full"] for row in predicted.values())


def test_of_another_triton_the_newest_predictions_serve():
    assert cuts.known_predictions("3.7.1")[0] == VERSIONS[-1]


@pytest.mark.parametrize("pair", cuts.PAIRS, ids=lambda pair: pair.shape)
def test_the_second_cut_is_that_of_the_table(pair):
    chosen = launch.blocks(pair.op, pair.head_dim, pair.mini_batch_size, torch.bfloat16, cuts.ARCHITECTURE, 4)
    assert chosen == pair.after != pair.before


def test_a_pair_is_timed_in_turn_and_its_ratio_is_the_median_of_the_rounds():
    """A machine that slows down, by more than the cuts differ, changes no ratio."""
    slowness, calls = itertools.count(1), []

    def timer(call):
        if call() == cuts.PAIRS[0].before:
            timer.slow = next(slowness)
            return 3.0 * timer.slow
        return 2.0 * timer.slow

    def make(pair, cut, filling):
        return lambda: calls.append(cut) or cut

    (timed,) = cuts.measure(cuts.PAIRS[:1], [cuts.FULL], cuts.known_predictions(VERSIONS[0])[1], timer, make)
    assert calls == (cuts.ROUNDS + 1) * [cuts.PAIRS[0].before, cuts.PAIRS[0].after]
    assert timed.measured == pytest.approx(1.5)
    assert timed.predicted == pytest.approx(
        predicted_of(cuts.PAIRS[0], cuts.PAIRS[0].before, cuts.FULL)
        / predicted_of(cuts.PAIRS[0], cuts.PAIRS[0].after, cuts.FULL)
    )


@pytest.mark.parametrize("turned", [False, True])
def test_the_result_says_how_often_the_order_was_right(turned):
    """Of a GPU that behaves as predicted all is right, of one that does the opposite nothing is."""
    predicted = cuts.known_predictions(VERSIONS[0])[1]

    def make(pair, cut, filling):
        return lambda: cuts.prediction(predicted, pair.shape, cut, filling)

    timed = list(
        cuts.measure(cuts.PAIRS, [cuts.FEW, cuts.FULL], predicted, lambda call: 1 / call() if turned else call(), make)
    )
    written = json.loads(json.dumps(cuts.result(timed, VERSIONS[0], VERSIONS[0])))
    sure = [pair for pair in written["pairs"] if pair["sure"]]
    assert len(written["pairs"]) == 2 * len(cuts.PAIRS) > len(sure) > len(cuts.PAIRS)
    assert {pair["right"] for pair in sure} == {not turned}
    assert f"right in {0 if turned else len(sure)} of {len(sure)} pairs" in written["score"]
    assert {"device", "torch", "triton", "date", "commit"} <= set(written)


@pytest.mark.gpu
@pytest.mark.parametrize("pair", [p for p in cuts.PAIRS if p.head_dim == 16], ids=lambda pair: pair.shape)
def test_kernels_launch(pair, monkeypatch):
    """With the cut that is asked for, on as many programs as there are heads for it."""
    ran, run = [], launch.Launch.run
    monkeypatch.setattr(launch.Launch, "run", lambda self: ran.append(self) or run(self))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for cut in (pair.before, pair.after):
        cuts.launch_of(pair, cut, cuts.Filling("tiny", sequences=1, tokens=2 * pair.mini_batch_size + 3), device)()
        assert ran[-1].blocks == cut
        assert ran[-1].grid == (4 // cut[2],)
