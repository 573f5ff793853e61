"""Results of ``rectools_check``, which needs another environment than the page."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from tools.documents import ROOT

from ..runner import Result
from ..study import Data

CHECKS_FILE: Path = ROOT / "studies" / "results" / "benchmark_rectools.jsonl"


def of_model(model: str, data: Data, results: Iterable[Result]) -> list[Result]:
    """Of one model on one data set."""
    return [result for result in results if result["model"] == model and data.key.items() <= result.items()]


def best_rate(model: str, data: Data, results: Iterable[Result]) -> float:
    """The learning rate that was best in validation, among the runs with the first seed."""
    known = of_model(model, data, results)
    first = min(result["seed"] for result in known)
    best = max((x for x in known if x["seed"] == first), key=lambda result: max(result["validation"]))
    return float(best["settings"]["learning_rate"])


def rows(data: Data, results: Sequence[Result]) -> dict[str, list[Result]]:
    """By label: the runs with the best rate."""
    found = {}
    for model in dict.fromkeys(result["model"] for result in results):
        if known := of_model(model, data, results):
            rate = best_rate(model, data, known)
            chosen = [result for result in known if result["settings"]["learning_rate"] == rate]
            found[f"RecTools {chosen[0]['rectools']} {_title(chosen[0])}, run by RecTools"] = chosen
    return found


def _title(result: Result) -> str:
    """A model's name; HSTU may have times."""
    times = result["settings"].get("relative_time_attention")
    return result["model"] + ("" if times is None else ", with times" if times else ", without times")
