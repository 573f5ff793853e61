"""What a picture of runs shows, read from its artists."""

import pytest
from matplotlib.figure import Figure

from ttt4rec.palette import GRU, MARKERS, MLP
from ttt4rec.recsys.training.plot import plot_curves
from ttt4rec.recsys.training.report import _method


def rows(*scores):
    return [{"epoch": n, "loss": 3.0 - n, "valid_NDCG@10": score} for n, score in enumerate(scores)]


@pytest.fixture
def figures(monkeypatch):
    saved = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **_: saved.append(figure))
    return saved


def test_runs_of_a_method_have_its_colour_and_their_own_markers(figures, tmp_path):
    runs = {"a": rows(0.1, 0.3, 0.2), "b": rows(0.2, 0.1), "c": rows(0.1)}
    methods = {"a": _method({"mixer": "ttt", "inner": "mlp"}), "b": _method({"mixer": "ttt", "inner": "mlp"})}
    methods["c"] = _method({"mixer": "gru", "inner": "mlp"})
    plot_curves(runs, tmp_path / "x.png", methods)
    (figure,) = figures
    loss, scores = figure.axes
    for axes in (loss, scores):
        lines = {line.get_label(): line for line in axes.lines if not line.get_label().startswith("_")}
        assert {name: line.get_color() for name, line in lines.items()} == {"a": MLP, "b": MLP, "c": GRU}
        assert [lines[name].get_marker() for name in "abc"] == [MARKERS[0], MARKERS[1], MARKERS[0]]
        assert axes.get_title() == ""
        assert all(float(tick).is_integer() for tick in axes.get_xticks())
    stars = [(line.get_xdata()[0], line.get_ydata()[0]) for line in scores.lines if line.get_marker() == "*"]
    assert stars == [(1, 0.3), (0, 0.2), (0, 0.1)]
    assert (loss.get_xlabel(), loss.get_ylabel()) == ("epoch", "training loss")
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["a", "b", "c"]


def test_methods_as_pictures_name_them():
    named = {"hstu": "HSTU", "attention": "SASRec", "mine": ""}
    assert {mixer: _method({"mixer": mixer}) for mixer in named} == named
    assert _method({"mixer": "ttt", "inner": "linear"}) == "TTT-Linear"
    assert _method({}) == ""
