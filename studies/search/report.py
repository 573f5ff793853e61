"""The best trials, for ``docs/presets.md``."""

from collections.abc import Sequence

from optuna.trial import FrozenTrial, TrialState

from tools.documents import ROOT, section

from ..report import row
from .trials import JOURNAL, found

DOCUMENT = ROOT / "docs" / "presets.md"
SHOWN = 10
HEAD = (
    "validation NDCG@10", "epochs", "inner model", "backbone", "width", "blocks", "mini-batch", "forgetting", "norm",
    "gates", "dropout", "learning rate", "weight decay",
)  # fmt: skip
_PARAMETERS = (
    "inner", "backbone", "width", "num_blocks", "mini_batch_size", "forget", "norm", "gates", "dropout",
    "learning_rate", "weight_decay",
)  # fmt: skip


def table(trials: Sequence[FrozenTrial]) -> str:
    """The best of the trials that were not given up, and how many there were."""
    ended = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    pruned = sum(trial.state == TrialState.PRUNED for trial in trials)
    best = sorted(ended, key=lambda trial: -(trial.value or 0.0))[:SHOWN]
    rows = "".join(row(_cells(trial)) for trial in best)
    return (
        f"{len(ended) + pruned} recipes were tried, {pruned} of them given up on the way.\n\n"
        f"{row(HEAD)}{row(['---'] * len(HEAD))}{rows}"
    )


def _cells(trial: FrozenTrial) -> list[str]:
    values = [trial.params[name] for name in _PARAMETERS]
    shown = [f"{value:.2g}" if isinstance(value, float) else str(value) for value in values]
    return [f"{trial.value:.4f}", str(max(trial.intermediate_values) + 1), *shown]


def write() -> None:
    """Bring the document up to date with the journal."""
    text = table(found(JOURNAL))
    DOCUMENT.write_text(section("search").sub(lambda _: text, DOCUMENT.read_text()))
