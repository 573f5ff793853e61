"""Nothing that was saved is lost: kills, full disks, and files that are not what they should be."""

import contextlib
import dataclasses
import os
import resource

import pytest
import torch
from safetensors.torch import save_file

from tests.support.crash import OPTIONS, fork, survive, train, wait
from tests.support.recsys_data import make_model, make_split
from ttt4rec import TTT4Rec, atomic_files
from ttt4rec.recsys.recommend import Recommender
from ttt4rec.recsys.training.checkpoint import save_checkpoint
from ttt4rec.recsys.training.train import CHECKPOINT_FILE, METRICS_FILE, fit


@pytest.mark.parametrize("kills", [10, pytest.param(100, marks=pytest.mark.slow)])
def test_killed_at_random_moments(tmp_path, kills):
    assert survive(tmp_path, kills, seed=kills) >= kills // 10


@pytest.mark.parametrize("nth", [0, 1, 2, 2 * OPTIONS.epochs - 1])  # the last: nothing of the training is left
@pytest.mark.parametrize("moment", ["half written", "before", "after"])
def test_killed_while_a_file_is_replaced(tmp_path, nth, moment):
    split = make_split(tmp_path)
    replace, left = os.replace, [nth]

    def fatal(source, target):
        left[0] -= 1
        if left[0] == -1:
            if moment == "half written":
                os.truncate(source, os.path.getsize(source) // 2)
            if moment == "after":
                replace(source, target)
            os._exit(9)
        replace(source, target)

    def child():
        atomic_files.os.replace = fatal
        train(split, tmp_path / "run")

    assert wait(fork(child)) == 9
    assert train(split, tmp_path / "run") == train(split, tmp_path / "whole")


def limited(size, function):
    """Run the function in a child whose files cannot grow beyond a size; it must raise OSError."""

    def child():
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        with pytest.raises(OSError, match=r"cannot write|File too large"):
            function()

    return wait(fork(child)) == 0


def test_a_checksum_is_of_names_types_and_shapes_too():
    x = torch.arange(4, dtype=torch.int32)
    alike = [{"x": x}, {"y": x}, {"x": x.view(torch.float32)}, {"x": x.view(2, 2)}, {"x": x[:2], "y": x[2:]}]
    assert len({atomic_files.checksum(tensors) for tensors in alike}) == 5
    assert atomic_files.checksum({"a": x, "b": x + 1}) == atomic_files.checksum({"b": x + 1, "a": x})


def test_a_full_disk_loses_nothing(tmp_path):
    split = make_split(tmp_path)
    run = tmp_path / "run"

    def stop(report):
        if report.epoch == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(make_model(split), split, run, OPTIONS, report=stop)
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    assert limited(10_000, lambda: fit(make_model(split), split, run, OPTIONS))
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before
    assert train(split, run) == train(split, tmp_path / "whole")


def test_a_full_disk_leaves_the_old_recommender(tmp_path):
    split = make_split(tmp_path)
    old, new = make_model(split), make_model(split, seed=1)
    Recommender(old, split.histories).save(tmp_path / "model")
    before = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    for size in (0, 100, 5_000):
        assert limited(size, lambda: Recommender(new, split.histories).save(tmp_path / "model"))
        assert {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()} == before


def renamed(split):
    """Later histories with other, long item names: ids.json is far larger than the weights."""
    names = tuple(f"{item}-{'x' * 4000}" for item in reversed(split.histories.item_ids))
    return dataclasses.replace(split.histories, item_ids=names, times=split.histories.times + 1)


def test_a_full_disk_while_the_ids_are_written_leaves_the_old_recommender(tmp_path):
    split = make_split(tmp_path)
    Recommender(make_model(split), split.histories).save(tmp_path / "model")
    before = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    new = Recommender(make_model(split, seed=1), renamed(split))
    assert limited(60_000, lambda: new.save(tmp_path / "model"))
    assert {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()} == before


@pytest.mark.parametrize("nth", range(5))
def test_a_save_cut_off_between_files_is_never_a_mixture(tmp_path, monkeypatch, nth):
    split = make_split(tmp_path)
    Recommender(make_model(split), split.histories).save(tmp_path)
    new = Recommender(make_model(split, seed=1, base_lr=0.5), renamed(split))
    replace, left = os.replace, [nth]

    def cut_off(source, target):
        left[0] -= 1
        if left[0] == -1:
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
        patch.setattr(atomic_files.os, "replace", cut_off)
        new.save(tmp_path)
    if nth in (0, 4):
        assert Recommender.load(tmp_path).histories.item_ids == (new if nth else split).histories.item_ids
    else:
        with pytest.raises(ValueError, match="do not belong together"):
            Recommender.load(tmp_path)


def test_what_is_renamed_is_on_disk(tmp_path, monkeypatch):
    calls, sync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(atomic_files.os, "fsync", lambda h: (calls.append(os.readlink(f"/proc/self/fd/{h}")), sync(h)))
    monkeypatch.setattr(atomic_files.os, "replace", lambda a, b: (calls.append("rename"), replace(a, b)))
    atomic_files.write_json(tmp_path / "a.json", {"a": 1})
    partial, rename, folder = calls
    assert partial.startswith(f"{tmp_path}/a.json.")
    assert (rename, folder) == ("rename", str(tmp_path))


def test_two_writers_of_a_file_do_not_share_a_partial_one(tmp_path):
    path = tmp_path / "a"
    with atomic_files.replacing(path) as one, atomic_files.replacing(path) as two:
        one.write_text("one")
        two.write_text("two")
    assert path.read_text() == "one"
    (tmp_path / "plain").touch()
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_folder_that_cannot_be_written_is_known_before_training(tmp_path, monkeypatch):
    split = make_split(tmp_path)
    (tmp_path / "file").write_text("in the way")
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(OSError, match="file"):
            fit(make_model(split), split, folder, OPTIONS)

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("ttt4rec.recsys.training.train.tempfile.TemporaryFile", refuse)
    with pytest.raises(PermissionError):
        fit(make_model(split), split, tmp_path / "run", OPTIONS, report=lambda _: pytest.fail("trained in vain"))


def foreign(tmp_path, name):
    """Files that are no checkpoint of this run, by what they are."""
    path = tmp_path / name
    header = {"kind": "ttt4rec training checkpoint, version 3"}
    match name:
        case "pickle":
            torch.save({"model": torch.ones(2)}, path)
        case "tensors":
            save_file({"model.x": torch.ones(2)}, path)
        case "another version":
            save_file({"model.x": torch.ones(2)}, path, {"kind": "ttt4rec training checkpoint, version 0"})
        case "no progress":
            save_file({"model.x": torch.ones(2)}, path, header)
        case "no checksum":
            save_file({"model.x": torch.ones(2)}, path, header | {"progress": "{}"})
        case "other progress":
            save_checkpoint(path, {"model.x": torch.ones(2)}, {"epoch": 3})
        case "list":
            save_checkpoint(path, {"model.x": torch.ones(2)}, [3])
        case "other options":
            save_checkpoint(path, {"model.x": torch.ones(2)}, {"run": {"options": ["epochs"], "data": 3}})
        case "text":
            path.write_text("epoch 3")
        case "zeros":
            path.write_bytes(bytes(4096))
    return path.read_bytes()


NAMES = ["pickle", "tensors", "another version", "no progress", "no checksum", "other progress", "text", "zeros"]
NAMES += ["list", "other options"]


@pytest.mark.parametrize("name", NAMES)
def test_a_foreign_checkpoint_is_a_clear_error(tmp_path, name):
    split = make_split(tmp_path)
    (tmp_path / "run").mkdir()
    content = foreign(tmp_path, name)
    (tmp_path / "run" / CHECKPOINT_FILE).write_bytes(content)
    with pytest.raises(ValueError, match=r"damaged|not a training checkpoint|it does not say of which run") as error:
        fit(make_model(split), split, tmp_path / "run", OPTIONS)
    assert "\n" not in str(error.value)
    assert str(tmp_path / "run" / CHECKPOINT_FILE) in str(error.value)
    assert [path.name for path in (tmp_path / "run").iterdir()] == [CHECKPOINT_FILE]
    assert (tmp_path / "run" / CHECKPOINT_FILE).read_bytes() == content


@pytest.mark.parametrize("share", [0.001, 0.1, 0.5, 0.99, 0.9999])
def test_a_truncated_file_is_a_clear_error(tmp_path, share):
    split = make_split(tmp_path)
    train(split, tmp_path / "run", OPTIONS)
    for name, load in {
        CHECKPOINT_FILE: lambda: fit(make_model(split), split, tmp_path / "run", OPTIONS),
        "model.safetensors": lambda: TTT4Rec.load(tmp_path / "run"),
        "config.json": lambda: TTT4Rec.load(tmp_path / "run"),
    }.items():
        path = tmp_path / "run" / name
        whole = path.read_bytes()
        path.write_bytes(whole[: int(len(whole) * share)][:-3])
        with pytest.raises(ValueError, match=r"damaged|does not hold a TTT4Rec model|do not belong together"):
            load()
        path.write_bytes(whole)
    assert (tmp_path / "run" / METRICS_FILE).exists()
