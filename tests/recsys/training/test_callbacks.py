"""Who follows a run is told of it, and may end it."""

import json
import os
import subprocess
import sys

import pytest

from tests.support.recsys_data import SMALL, make_model, make_split, write_events
from ttt4rec.cli import main
from ttt4rec.options import TRACKERS
from ttt4rec.recsys import TrainOptions, fit
from ttt4rec.recsys.training.callbacks import Callback, Callbacks
from ttt4rec.recsys.training.console import Console, counted, describe_model, duration
from ttt4rec.recsys.training.track import TRACKED_FILE, _Tracker, tracker

OPTIONS = TrainOptions(epochs=3, targets_per_batch=512)


class Notes(Callback):
    def __init__(self, stop_at=None, fail_at=None):
        self.seen, self.stop_at, self.fail_at = [], stop_at, fail_at

    def on_start(self, run):
        self.seen.append(("start", len(run.reports), run.options, run.folder.is_dir()))

    def on_epoch(self, report):
        self.seen.append(("epoch", report.epoch))
        if report.epoch == self.fail_at:
            raise RuntimeError("no more")
        return report.epoch == self.stop_at

    def on_end(self, reports, error):
        self.seen.append(("end", len(reports), error and str(error)))


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    return make_split(tmp_path_factory.mktemp("callbacks"), users=12)


def test_a_run_is_followed_stopped_and_taken_up(split, tmp_path):
    first, second = Notes(stop_at=1), Notes()
    reports = fit(make_model(split), split, tmp_path, OPTIONS, callbacks=[first, second])
    assert [report.epoch for report in reports] == [0, 1]
    assert first.seen == second.seen
    assert first.seen == [("start", 0, OPTIONS, True), ("epoch", 0), ("epoch", 1), ("end", 2, None)]
    later = Notes()
    assert len(fit(make_model(split), split, tmp_path, OPTIONS, callbacks=[later])) == 3
    assert later.seen == [("start", 2, OPTIONS, True), ("epoch", 2), ("end", 3, None)]


def test_the_end_is_told_after_an_error_with_the_checkpoint_there(split, tmp_path):
    notes = [Notes(fail_at=1), Notes()]
    with pytest.raises(RuntimeError, match="no more"):
        fit(make_model(split), split, tmp_path, OPTIONS, callbacks=notes)
    assert [x.seen[-1] for x in notes] == [("end", 2, "no more")] * 2
    assert len(fit(make_model(split), split, tmp_path, OPTIONS)) == 3


class FailsAtTheEnd(Notes):
    def on_end(self, reports, error):
        raise OSError("no disk")


def test_a_failure_at_the_end_hides_no_other_and_stops_nobody(split, tmp_path):
    notes = Notes()
    with pytest.raises(OSError, match="no disk"):
        fit(make_model(split), split, tmp_path / "a", OPTIONS, callbacks=[FailsAtTheEnd(), notes])
    assert notes.seen[-1] == ("end", 3, None)
    with pytest.raises(RuntimeError, match="no more"):
        fit(make_model(split), split, tmp_path / "b", OPTIONS, callbacks=[FailsAtTheEnd(fail_at=0), notes])


def test_all_are_told_of_the_test_though_one_fails():
    class FailsAtTheTest(Callback):
        def on_test(self, metrics):
            raise OSError("no disk")

    class Hears(Callback):
        def on_test(self, metrics):
            self.heard = metrics

    last = Hears()
    with pytest.raises(OSError, match="no disk"):
        Callbacks([FailsAtTheTest(), last]).on_test({"HR@10": 0.5})
    assert last.heard == {"HR@10": 0.5}


def test_what_the_console_shows(split, tmp_path, capsys):
    model = make_model(split)
    options = TrainOptions(epochs=5, patience=1, targets_per_batch=64, learning_rate=0.5)
    reports = fit(model, split, tmp_path, options, callbacks=[Console()])
    head, limits, *epochs = capsys.readouterr().out.splitlines()
    parameters = sum(p.numel() for p in model.parameters())
    assert head.startswith("model: ttt (mlp, backend ")
    assert f"width 16, 1 block, {parameters:,} parameters, on cpu (" in head
    steps = -(-split.num_targets("train") // 64)
    assert limits == f"at most 5 epochs of about {steps} steps; ends after 1 without a better validation NDCG@10"
    assert len(epochs) == len(reports)
    best = max(reports, key=lambda report: report.metrics["NDCG@10"])
    assert "best so far" in epochs[0]
    assert " left" in epochs[0]
    assert f"valid HR@10 {reports[0].metrics['HR@10']:.4f}  NDCG@10 {reports[0].metrics['NDCG@10']:.4f}" in epochs[0]
    if best.epoch < len(reports) - 1:
        assert epochs[-1].endswith(f"best was epoch {best.epoch}")


@pytest.mark.parametrize(
    ("config", "shown"),
    [
        ({"width": 20}, "ttt (mlp, backend eager), width 20, 1 block"),  # heads of 10 features are not compiled
        ({"mixer": "gru", "num_blocks": 2}, "gru, width 16, 2 blocks"),
    ],
    ids=str,
)
def test_a_model_is_described_with_what_computes_it(split, config, shown):
    assert describe_model(make_model(split, **config)) == shown


def test_one_is_not_several():
    assert [counted(x, "epoch") for x in (0, 1, 2, 1000)] == ["0 epochs", "1 epoch", "2 epochs", "1,000 epochs"]


def test_durations():
    assert [duration(x) for x in (0.2, 40, 300, 36_000)] == ["below 1 s", "40 s", "5 min", "10.0 h"]


TRACK = """
import sys
from pathlib import Path
from tests.support.recsys_data import SMALL, make_model, make_split, write_events
from ttt4rec.cli import main
from tests.recsys.training.test_callbacks import Notes
from ttt4rec.options import TRACKERS
from ttt4rec.recsys import TrainOptions, fit
from ttt4rec.recsys.training.track import tracker

folder = Path(sys.argv[1])
split = make_split(folder, users=12)
for epochs, fail_at in ((2, None), (3, None), (4, 3)):
    options = TrainOptions(epochs=epochs, targets_per_batch=512)
    callbacks = [*(tracker(name, {"data": "ring"}) for name in TRACKERS), Notes(fail_at=fail_at)]
    try:
        fit(make_model(split), split, folder / "run", options, callbacks=callbacks)
        for callback in callbacks:
            callback.on_test({"HR@10": epochs / 8})
    except RuntimeError:
        assert fail_at
"""


@pytest.fixture(scope="module")
def tracked(tmp_path_factory):
    """Two calls of fit for one run, and a third that fails, in a process of their own: the packages start threads."""
    folder = tmp_path_factory.mktemp("tracked")
    offline = {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "MLFLOW_DISABLE_TELEMETRY": "true"}
    place = {"MLFLOW_TRACKING_URI": f"file:{folder / 'mlruns'}", "MLFLOW_ALLOW_FILE_STORE": "true"}
    command = [sys.executable, "-c", TRACK, str(folder)]
    done = subprocess.run(command, env=os.environ | offline | place, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder, json.loads((folder / "run" / TRACKED_FILE).read_text())["runs"]


@pytest.mark.slow
def test_tensorboard(tracked):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder, known = tracked
    found = EventAccumulator(str(folder / "run" / known["tensorboard"]))
    found.Reload()
    assert [event.step for event in found.Scalars("valid/NDCG@10")] == [0, 1, 2, 3]
    assert "train/loss" in found.Tags()["scalars"]
    everything = EventAccumulator(str(folder / "run" / known["tensorboard"]), purge_orphaned_data=False)
    everything.Reload()
    assert [(event.step, event.value) for event in everything.Scalars("test/HR@10")] == [(2, 0.25), (3, 0.375)]
    assert not found.Scalars("test/HR@10")  # of models that were trained further
    texts = [x.tensor_proto.string_val[0].decode() for x in found.Tensors("settings/text_summary")]
    assert "| data | ring |" in texts[0]
    assert "| width | 16 |" in texts[0]


@pytest.mark.slow
def test_wandb(tracked):
    folder, known = tracked
    folders = sorted((folder / "run" / "wandb").glob(f"offline-run-*-{known['wandb']}"))
    assert folders
    files = [file for folder in folders for file in folder.glob(f"run-{known['wandb']}.wandb")]
    assert len(files) == len(folders) == 5
    assert sum(b"test/HR@10" in file.read_bytes() for file in files) == 2


@pytest.mark.slow
def test_mlflow(tracked, monkeypatch):
    folder, known = tracked
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    import mlflow

    client = mlflow.MlflowClient(tracking_uri=f"file:{folder / 'mlruns'}")
    run = client.get_run(known["mlflow"])
    assert (run.info.status, run.info.run_name) == ("FAILED", "run")
    assert (run.data.params["data"], run.data.params["width"]) == ("ring", "16")
    history = client.get_metric_history(run.info.run_id, "valid/NDCG_at_10")
    assert [metric.step for metric in history] == [0, 1, 2, 3]
    assert len(client.search_runs([run.info.experiment_id])) == 1
    tests = client.get_metric_history(run.info.run_id, "test/HR_at_10")
    assert [(metric.step, metric.value) for metric in tests] == [(2, 0.25), (3, 0.375)]


class Memory(_Tracker):
    """A tracker that forgets nothing, and fails when it is told to."""

    name = "memory"

    def __init__(self, fail_at=None):
        super().__init__()
        self.begun, self.sent, self.ended, self.tested, self.fail_at = [], [], [], [], fail_at

    def _begin(self, run, settings, known):
        self.begun.append(known)
        if self.fail_at == "start":
            raise KeyError("no such run")
        return "the run"

    def _send(self, epoch, numbers):
        if epoch == self.fail_at:
            raise KeyError("out of reach")
        self.sent.append(epoch)

    def _end(self, error):
        self.ended.append(error)

    def _send_test(self, epochs, numbers):
        if self.fail_at == "test":
            raise KeyError("gone")
        self.tested.append((epochs, numbers))


def test_what_a_tracker_has_missed_is_sent_when_the_run_goes_on(split, tmp_path):
    first, second = Memory(fail_at=1), Memory()
    with pytest.raises(RuntimeError, match="memory failed: 'out of reach'; finished epochs are kept, and training"):
        fit(make_model(split), split, tmp_path, OPTIONS, callbacks=[first])
    fit(make_model(split), split, tmp_path, OPTIONS, callbacks=[second])
    assert (first.begun, second.begun) == ([None], ["the run"])
    assert (first.sent, second.sent) == ([0], [1, 2])
    assert isinstance(first.ended[0], RuntimeError)
    (tmp_path / TRACKED_FILE).unlink()
    late = Memory()
    fit(make_model(split), split, tmp_path, OPTIONS, callbacks=[late])
    assert (late.begun, late.sent, late.ended) == ([None], [0, 1, 2], [None])


@pytest.mark.slow
def test_the_command_sends_what_the_test_targets_gave(tmp_path, monkeypatch, capsys):
    data = write_events(tmp_path / "ring.inter")
    command = ["train", str(data), "--out", str(tmp_path / "run"), "--track", "tensorboard", "--epochs", "1", *SMALL]
    tracker = Memory()
    monkeypatch.setattr("ttt4rec.recsys.commands.training.tracker", lambda name, settings: tracker)
    assert main(command) == 0
    metrics = json.loads((tmp_path / "run" / "run.json").read_text())["test"]
    assert tracker.tested == [(1, {f"test/{name}": value for name, value in metrics.items()})]
    tracker.fail_at = "test"
    assert main(command) == 2
    said = capsys.readouterr()
    assert "model in" in said.out.splitlines()[-1]  # which is whole
    assert "memory failed: 'gone'" in said.err


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"runs": 3}', '{"runs": {}, "sent": {"memory": "1"}}'])
def test_a_damaged_record_of_trackers_is_named(split, tmp_path, content):
    (tmp_path / TRACKED_FILE).write_text(content)
    with pytest.raises(ValueError, match=rf"{TRACKED_FILE} is damaged .*without it, trackers begin new runs"):
        fit(make_model(split), split, tmp_path, OPTIONS, callbacks=[Memory()])


def test_a_tracker_that_cannot_begin_says_what_to_do(split, tmp_path):
    with pytest.raises(RuntimeError, match=r"memory failed: 'no such run'.*with or without it \(--track\)"):
        fit(make_model(split), split, tmp_path, OPTIONS, callbacks=[Memory(fail_at="start")])


def test_a_tracker_without_its_package_says_what_to_install(monkeypatch):
    for name in TRACKERS:
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(ModuleNotFoundError, match=rf"--track {name} needs .*ttt4rec\[track\]"):
            tracker(name)
    with pytest.raises(ValueError, match="must be one of tensorboard, wandb, mlflow; given 'excel'"):
        tracker("excel")
