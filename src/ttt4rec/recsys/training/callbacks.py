"""What a training run tells those who follow it, and how one of them ends it early."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ttt4rec.models.ttt4rec import TTT4Rec
from ttt4rec.options import TrainOptions
from ttt4rec.recsys.data.split import Split


@dataclass(frozen=True)
class EpochReport:
    """One line of ``metrics.csv``."""

    epoch: int
    loss: float
    train_seconds: float
    valid_seconds: float
    metrics: dict[str, float]

    def row(self) -> dict[str, float]:
        """The line's columns."""
        own = {"epoch": self.epoch, "loss": self.loss}
        seconds = {"train_seconds": self.train_seconds, "valid_seconds": self.valid_seconds}
        return own | {f"valid_{name}": value for name, value in self.metrics.items()} | seconds


@dataclass(frozen=True)
class TrainingRun:
    """A run that begins, or goes on.

    Attributes:
        model: as it is trained.
        split: histories and their parts.
        options: how it is trained.
        folder: of checkpoint and metrics.
        reports: of the epochs that an earlier call has finished.
    """

    model: TTT4Rec
    split: Split
    options: TrainOptions
    folder: Path
    reports: tuple[EpochReport, ...]


class Callback:
    """Follows a run, in the first of several processes; what is not overridden does nothing.

    What a callback raises ends the run. The checkpoint of the last finished epoch stays.
    """

    def on_start(self, run: TrainingRun) -> None:
        """Before the first epoch of this call of ``fit``."""

    def on_epoch(self, report: EpochReport) -> bool | None:
        """After an epoch, whose checkpoint is written; True ends the run there, as if its patience were at an end."""

    def on_end(self, reports: Sequence[EpochReport], error: BaseException | None) -> None:
        """At the end, also after an error, of which it is told; without one, the model has its best weights."""

    def on_test(self, metrics: Mapping[str, float]) -> None:
        """After the end, by whoever has ranked the test targets with the model, as ``ttt4rec train`` has."""


class Callbacks:
    """Several of them, told in their order."""

    def __init__(self, callbacks: Sequence[Callback]) -> None:
        self._callbacks = callbacks
        self._started = list[Callback]()

    def on_start(self, run: TrainingRun) -> None:
        """Tell all of them; those that were told are told of the end too."""
        for callback in self._callbacks:
            self._started.append(callback)
            callback.on_start(run)

    def on_epoch(self, report: EpochReport) -> bool:
        """Tell all of them; whether one wants the run to end."""
        wishes = [callback.on_epoch(report) is True for callback in self._callbacks]
        return any(wishes)

    def on_end(self, reports: Sequence[EpochReport], error: BaseException | None) -> None:
        """Tell all of them, also if one fails; the first failure is raised if there was no error before."""
        failures = _failures(partial(callback.on_end, reports, error) for callback in self._started)
        if failures and error is None:
            raise failures[0]

    def on_test(self, metrics: Mapping[str, float]) -> None:
        """Tell all of them, also if one fails; then the first failure is raised."""
        if failures := _failures(partial(callback.on_test, metrics) for callback in self._callbacks):
            raise failures[0]


def _failures(calls: Iterable[Callable[[], None]]) -> list[Exception]:
    """Make all calls; what they raised."""
    failures = list[Exception]()
    for call in calls:
        try:
            call()
        except Exception as failure:
            failures.append(failure)
    return failures
