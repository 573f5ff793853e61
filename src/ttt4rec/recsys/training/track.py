"""Runs followed in TensorBoard, Weights & Biases or MLflow, each a callback of ``fit``.

Where they send what they are told is theirs to say: ``WANDB_MODE``, ``WANDB_PROJECT``, ``MLFLOW_TRACKING_URI``, ....
"""

from __future__ import annotations

import dataclasses
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ttt4rec.atomic_files import read_json, write_json
from ttt4rec.extras import require
from ttt4rec.options import TRACKERS
from ttt4rec.recsys.training.callbacks import Callback, EpochReport, TrainingRun

TRACKED_FILE = "tracked.json"
_PROJECT = "ttt4rec"


def tracker(name: str, settings: Mapping[str, Any] | None = None) -> Callback:
    """The callback for one of ``TRACKERS``.

    Args:
        name: of it.
        settings: what else to note of the run than its options and the model's shape.

    Raises:
        ValueError: there is none of that name. MissingPackageError: its package is not installed.
    """
    if name not in TRACKERS:
        raise ValueError(f"tracker must be one of {', '.join(TRACKERS)}; given {name!r}")
    require(f"--track {name}", name)
    return {"tensorboard": TensorBoard, "wandb": WandB, "mlflow": MLflow}[name](settings)


class _Tracker(Callback):
    """What all of them do: settings at the start, numbers of every epoch, whether it failed at the end, and the test.

    Args:
        settings: what else to note of the run.
    """

    name: str

    def __init__(self, settings: Mapping[str, Any] | None = None) -> None:
        self._settings = dict(settings or {})

    def on_start(self, run: TrainingRun) -> None:
        """Begin, or take up what an earlier call of ``fit`` began for the same folder, and send what it has not.

        Raises:
            ValueError: the record of what was begun is damaged. RuntimeError: the package has failed.
        """
        self._folder, self._path = run.folder, run.folder / TRACKED_FILE
        runs, sent = _read_tracked(self._path)
        known = runs.get(self.name) if run.reports else None
        self._sent = 0 if known is None else min(sent.get(self.name, 0), len(run.reports))
        settings = self._settings | dataclasses.asdict(run.model.config) | dataclasses.asdict(run.options)
        with _failures_of(self.name):
            self._known = self._begin(run, settings, known)
        self._note()
        for report in run.reports[self._sent :]:
            self.on_epoch(report)

    def on_epoch(self, report: EpochReport) -> None:
        """Send an epoch's numbers. RuntimeError: the package has failed."""
        seconds = {"seconds/train": report.train_seconds, "seconds/valid": report.valid_seconds}
        valid = {f"valid/{name}": value for name, value in report.metrics.items()}
        with _failures_of(self.name):
            self._send(report.epoch, {"train/loss": report.loss} | valid | seconds)
        self._sent = report.epoch + 1
        self._note()

    def on_end(self, reports: Sequence[EpochReport], error: BaseException | None) -> None:
        """End, as failed after an error. RuntimeError: the package has failed."""
        with _failures_of(self.name):
            self._end(error)

    def on_test(self, metrics: Mapping[str, float]) -> None:
        """Send them to the run that has ended, behind its epochs. RuntimeError: the package has failed."""
        with _failures_of(self.name):
            self._send_test(self._sent, {f"test/{name}": value for name, value in metrics.items()})

    def _note(self) -> None:
        runs, sent = _read_tracked(self._path)
        write_json(self._path, {"runs": runs | {self.name: self._known}, "sent": sent | {self.name: self._sent}})

    def _begin(self, run: TrainingRun, settings: dict[str, Any], known: str | None) -> str:
        """Begin a run, or go on with one; returns by what it is known."""
        raise NotImplementedError

    def _send(self, epoch: int, numbers: dict[str, float]) -> None:
        raise NotImplementedError

    def _end(self, error: BaseException | None) -> None:
        raise NotImplementedError

    def _send_test(self, epochs: int, numbers: dict[str, float]) -> None:
        raise NotImplementedError


@contextmanager
def _failures_of(name: str) -> Iterator[None]:
    """Whatever a package raises, as an error that says what to do."""
    try:
        yield
    except Exception as error:
        raise RuntimeError(
            f"{name} failed: {str(error) or type(error).__name__}; finished epochs are kept, and training goes on from "
            "them, with or without it (--track)"
        ) from error


def _read_tracked(path: Path) -> tuple[dict[str, str], dict[str, int]]:
    """By the names of trackers: what each began, and how many epochs it was sent."""
    if not path.is_file():
        return {}, {}
    try:
        content = read_json(path)
        runs, sent = content["runs"], content.get("sent", {})
        if isinstance(runs, dict) and isinstance(sent, dict) and all(isinstance(x, int) for x in sent.values()):
            return runs, sent
        reason = "it must hold runs by the names of trackers"
    except (ValueError, KeyError, RecursionError) as error:
        reason = str(error)
    raise ValueError(f"{path} is damaged ({reason}); without it, trackers begin new runs")


class TensorBoard(_Tracker):
    """Event files in the folder's ``tensorboard``: ``tensorboard --logdir runs`` shows several runs."""

    name = "tensorboard"

    def _begin(self, run: TrainingRun, settings: dict[str, Any], known: str | None) -> str:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(run.folder / "tensorboard"), purge_step=self._sent)
        rows = "\n".join(f"| {name} | {value} |" for name, value in settings.items())
        self._writer.add_text("settings", f"| option | value |\n| --- | --- |\n{rows}", self._sent)
        return "tensorboard"

    def _send(self, epoch: int, numbers: dict[str, float]) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, epoch)
        self._writer.flush()

    def _end(self, error: BaseException | None) -> None:
        self._writer.close()

    def _send_test(self, epochs: int, numbers: dict[str, float]) -> None:
        self._send(epochs, numbers)  # to another file of the folder: the writer opens it
        self._writer.close()


class WandB(_Tracker):
    """A run of Weights & Biases, in the project that ``WANDB_PROJECT`` names, else ``ttt4rec``."""

    name = "wandb"
    _opened = -math.inf  # when the last run was

    def _begin(self, run: TrainingRun, settings: dict[str, Any], known: str | None) -> str:
        self._run = self._open(name=run.folder.name, config=settings, id=known)
        return str(self._run.id)

    def _open(self, **given: Any) -> Any:
        import wandb

        # Its folders are named by seconds: never one of them twice.
        time.sleep(max(0.0, WandB._opened + 1 - time.monotonic()))
        WandB._opened = time.monotonic()
        project = os.environ.get("WANDB_PROJECT", _PROJECT)
        return wandb.init(project=project, dir=str(self._folder), resume="allow", **given)

    def _send(self, epoch: int, numbers: dict[str, float]) -> None:
        self._run.log({"epoch": epoch} | numbers)

    def _end(self, error: BaseException | None) -> None:
        self._run.finish(exit_code=0 if error is None else 1)

    def _send_test(self, epochs: int, numbers: dict[str, float]) -> None:
        with self._open(id=self._known) as run:
            run.summary.update(numbers)


class MLflow(_Tracker):
    """A run of MLflow, in the experiment that ``MLFLOW_EXPERIMENT_NAME`` names, else ``ttt4rec``.

    Its names of numbers may have no ``@``: HR@10 is ``HR_at_10`` there.
    """

    name = "mlflow"

    def _begin(self, run: TrainingRun, settings: dict[str, Any], known: str | None) -> str:
        import mlflow

        self._client: Any = mlflow.MlflowClient()
        if known is not None:
            self._id = known
            self._client.update_run(known, status="RUNNING")
            return known
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", _PROJECT)
        experiment = self._client.get_experiment_by_name(name)
        place = self._client.create_experiment(name) if experiment is None else experiment.experiment_id
        self._id = str(self._client.create_run(place, run_name=run.folder.name).info.run_id)
        for option, value in settings.items():
            self._client.log_param(self._id, option, value)
        return self._id

    def _send(self, epoch: int, numbers: dict[str, float]) -> None:
        for name, value in numbers.items():
            self._client.log_metric(self._id, name.replace("@", "_at_"), value, step=epoch)

    def _end(self, error: BaseException | None) -> None:
        self._client.set_terminated(self._id, "FINISHED" if error is None else "FAILED")

    def _send_test(self, epochs: int, numbers: dict[str, float]) -> None:
        self._send(epochs, numbers)  # a run that has ended takes them
