"""Snapshots: a restart reads no history again, and no wrong, old or broken file makes a wrong state."""

import copy
import dataclasses
import itertools
import json
import resource
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.support.checks import ROUNDING
from tests.support.crash import fork, wait
from tests.support.online_data import ITEMS, batch_scores, history, make_model, slot_bytes
from ttt4rec import TTT4Rec
from ttt4rec.atomic_files import checksum
from ttt4rec.recsys.online import OnlineRecommender, snapshot
from ttt4rec.recsys.online.events import Event, SQLiteEventLog

MODEL = make_model(0, inner="mlp", backbone="mamba", block_conv=True)
USERS = tuple(f"u{n}" for n in range(7))
EVENTS = [(user, ITEMS[(3 * n + step) % 12]) for n, user in enumerate(USERS) for step in range(n + 1)]


def start(folder, model=MODEL, items=ITEMS, slots=10):
    """A recommender on what lies in the folder."""
    log = SQLiteEventLog(folder / "log.db")
    return OnlineRecommender(
        model, items, log, pool_bytes=slots * slot_bytes(model), snapshot=folder / "states.safetensors"
    )


@pytest.fixture
def saved(tmp_path, monkeypatch):
    """A folder with a log and a snapshot, copied in parts of two users."""
    monkeypatch.setattr(snapshot, "_USERS_AT_ONCE", 2)
    online = start(tmp_path)
    online.observe(*zip(*EVENTS, strict=True))
    assert online.save_snapshot() == len(USERS)
    online.log.close()
    return tmp_path


def assert_right(online, users=USERS):
    best_of_all = online.recommend(users, 12, exclude_seen=False)
    taken = [history(online.log, user) for user in users]
    for best, expected in zip(best_of_all, batch_scores(online._states.model, taken), strict=True):
        scale = max(map(abs, expected.values()))
        assert dict(best).keys() == expected.keys()
        assert all(abs(score - expected[item]) <= (2**-24 + ROUNDING) * scale for item, score in best)


def test_a_restart_reads_no_history(saved):
    online = start(saved)
    assert online.stats() == {"users": 7, "slots": 10, "steps": 0, "prefills": 0, "evictions": 0}
    online.observe(["u3", "new"], ["i1", "i2"])
    assert_right(online, [*USERS, "new"])
    assert online.stats() == {"users": 8, "slots": 10, "steps": 1, "prefills": 1, "evictions": 0}
    assert online.save_snapshot() == 8
    assert start(saved).stats()["users"] == 8


def test_the_most_recently_used_come_back(saved):
    online = start(saved, slots=3)
    assert online._states.users() == ["u4", "u5", "u6"]
    assert_right(online)
    online.recommend(["u1", "u0", "u2"])
    assert online.save_snapshot() == 3
    assert start(saved)._states.users() == ["u1", "u0", "u2"]


class Impatient:
    """A lock for which somebody waits who does something whenever it is free."""

    def __init__(self, action):
        self.lock, self.action, self.acting = threading.Lock(), action, False

    def __enter__(self):
        self.lock.acquire()

    def __exit__(self, *error):
        self.lock.release()
        if not self.acting:
            self.acting = True
            self.action()
            self.acting = False


def test_states_that_change_while_they_are_saved(saved):
    """What a snapshot says of a state is true of that state."""
    online, steps = start(saved), itertools.count()
    online._states._lock = Impatient(lambda: online.observe(USERS, [ITEMS[next(steps) % 12]] * 7))
    online.save_snapshot()
    assert next(steps) == 5  # as often as it was free: once for the users, four times for two states each
    again = start(saved)
    assert_right(again)
    assert again.stats()["prefills"] == 0


def test_without_users_or_file(tmp_path):
    online = start(tmp_path)
    assert online.save_snapshot() == 0
    assert start(tmp_path).stats()["users"] == 0


def test_histories_that_changed_since(saved):
    """Longer by some, begun anew after forgetting, and with an event put between."""
    log = SQLiteEventLog(saved / "log.db")
    log.append([Event("u2", "i7"), Event("u2", "i8")])
    log.forget(["u3", "u4"])
    log.append([Event("u4", item) for item in ("i1", "i2", "i3", "i4", "i5", "i6")])
    log.append([Event("u5", "i1", time=5), Event("u5", "i2", time=3)])
    online = start(saved)
    assert online.recommend(["u3"]) == [[]]
    assert_right(online, [user for user in USERS if user != "u3"])
    assert online.stats()["prefills"] == 1  # u4; u5's history still begins as it did
    log.append([Event("u5", "i9", time=1), Event("u6", "i9", time=5), Event("u6", "i8", time=4)])
    online.save_snapshot()
    log.append([Event("u6", "i7", time=4.5)])
    online = start(saved)
    assert_right(online, [user for user in USERS if user != "u3"])


@pytest.mark.parametrize("by", ["this process", "another one", "one before the restart"])
def test_the_next_snapshot_holds_nobody_who_was_forgotten(saved, by):
    online = start(saved)
    if by == "this process":
        online.forget(["u3"])
    elif by == "another one":
        SQLiteEventLog(saved / "log.db").forget(["u3"])
    else:
        online.forget(["u3"])
        online = start(saved)  # from the snapshot of before
        assert "u3" in online._states.users()
    assert online.save_snapshot() == 6
    assert "u3" not in json.loads(load_file(saved / "states.safetensors")["users"].numpy().tobytes())
    assert "u3" not in online._states.users()
    again = start(saved)
    assert_right(again, [user for user in USERS if user != "u3"])
    assert again.stats()["prefills"] == 0


def test_snapshots_by_many_threads(saved):
    online = start(saved)
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda _: online.save_snapshot(), range(20))) == [7] * 20
    assert start(saved).stats()["users"] == 7


def test_what_a_killed_saver_left_is_removed(tmp_path):
    online = OnlineRecommender(MODEL, ITEMS, SQLiteEventLog(tmp_path / "log.db"), snapshot=tmp_path / "s[1]")
    left, other = (tmp_path / f"{name}.0123456789abcdef.part" for name in ("s[1]", "s1"))
    left.touch()
    other.touch()
    online.save_snapshot()
    assert not left.exists()
    assert other.exists()


def test_a_log_from_a_backup(saved):
    """The log is older than the snapshot and went on otherwise; versions and lengths may be the same."""
    shutil.copy(saved / "log.db", saved / "backup.db")
    online = start(saved)
    online.observe(["u1", "u2", "u2"], ["i1", "i2", "i3"])
    online.save_snapshot()
    online.log.close()
    for name in ("log.db-wal", "log.db-shm"):
        (saved / name).unlink(missing_ok=True)
    shutil.copy(saved / "backup.db", saved / "log.db")
    log = SQLiteEventLog(saved / "log.db")
    log.append([Event("u1", "i9")])
    online = start(saved)
    assert_right(online)
    assert online.stats()["prefills"] == 2


def broken(path, how):
    """Damage a snapshot."""
    content = path.read_bytes()
    match how:
        case "truncated":
            path.write_bytes(content[: len(content) // 2])
        case "empty":
            path.write_bytes(b"")
        case "text":
            path.write_text("states")
        case "one bit":
            path.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
        case "other tensors":
            save_file({name: x for name, x in load_file(path).items() if name != "mark"}, path, marks(path))
        case "another kind":
            save_file(load_file(path), path, marks(path) | {"kind": "ttt4rec states of users, version 1"})
        case "no marks":
            save_file(load_file(path), path)
        case "folder":
            path.unlink()
            path.mkdir()


def rewritten(path, change):
    """A snapshot with another content and the right checksum for it."""
    tensors = load_file(path)
    users = json.loads(tensors["users"].numpy().tobytes())
    users, tensors = change(users, tensors)
    tensors["users"] = torch.from_numpy(np.frombuffer(json.dumps(users).encode(), np.uint8).copy())
    save_file(tensors, path, marks(path) | {"checksum": checksum(tensors)})


CONTENTS = {
    "numbers": (lambda users, tensors: ([[], *range(6)], tensors), "its users are not texts that all differ"),
    "one of them twice": (lambda users, tensors: ([*users[1:], users[1]], tensors), "its users are not texts that all"),
    "no list": (lambda users, tensors: (dict.fromkeys(users), tensors), "its users are not texts that all differ"),
    "too few": (lambda users, tensors: (users[1:], tensors), "its tensors do not belong to its 6 users"),
    "another dtype": (lambda users, tensors: (users, {name: x.float() for name, x in tensors.items()}), "float"),
    "another shape": (lambda users, tensors: (users, tensors | {"hidden": tensors["hidden"][:, :3].clone()}), ""),
}


@pytest.mark.parametrize("content", CONTENTS)
def test_a_snapshot_of_wrong_content_is_passed_over(saved, caplog, content):
    change, reason = CONTENTS[content]
    rewritten(saved / "states.safetensors", change)
    online = start(saved)
    assert "is passed over, states are made from the event log: " in caplog.text
    assert reason in caplog.text
    assert_right(online)
    online.observe([f"v{n}" for n in range(10)], ["i1"] * 10)
    assert online.stats()["users"] == 10  # no slot is lost


def test_only_the_owner_may_read_it(saved):
    assert (saved / "states.safetensors").stat().st_mode & 0o777 == 0o600


def marks(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


REASONS = {
    "truncated": "",
    "empty": "",
    "text": "",
    "one bit": "its checksum is wrong",
    "other tensors": "its checksum is wrong",
    "another kind": "it is not a snapshot of this version",
    "no marks": "it is not a snapshot of this version",
    "folder": "",
}


@pytest.mark.parametrize("how", REASONS)
def test_a_damaged_snapshot_is_passed_over(saved, caplog, how):
    broken(saved / "states.safetensors", how)
    online = start(saved)
    assert f"is passed over, states are made from the event log: {REASONS[how]}" in caplog.text
    assert online.stats()["users"] == 0
    assert_right(online)
    if how != "folder":
        online.save_snapshot()
        assert start(saved).stats()["users"] == 7


def test_a_foreign_snapshot_is_passed_over(saved, caplog):
    """Of other weights, another configuration, other items, and other inner rates."""
    settings = dataclasses.replace(MODEL.config, base_lr=0.5)
    alike = TTT4Rec(settings).double().eval()
    alike.load_state_dict(MODEL.state_dict())
    frozen, slower = copy.deepcopy(MODEL), copy.deepcopy(MODEL)
    frozen.blocks[1].mixer.adapt = False
    slower.blocks[0].mixer.set_inner_lr_scale(0.1)
    other = make_model(1, inner="mlp", backbone="mamba", block_conv=True)
    others = (other, alike, frozen, slower, make_model(0, inner="linear"))
    for model, items in (*((model, ITEMS) for model in others), (MODEL, (*ITEMS[1:], ITEMS[0]))):
        caplog.clear()
        online = start(saved, model, items)
        assert "it belongs to another model" in caplog.text
        assert online.stats()["users"] == 0
    for model in (other, alike, frozen, slower):
        assert_right(start(saved, model))


def test_a_state_layout_that_does_not_fit_is_passed_over(saved, caplog, monkeypatch):
    """As after an upgrade that forgot to count the version up; no slot is lost."""
    tensors = snapshot.UserStates.export

    def export(states, users):
        kept, named = tensors(states, users)
        return kept, {name: x for name, x in named.items() if name != "1.conv"}

    monkeypatch.setattr(snapshot.UserStates, "export", export)
    start(saved).save_snapshot()
    online = start(saved)
    assert "'1.conv'" in caplog.text
    assert_right(online)
    online.observe([f"v{n}" for n in range(10)], ["i1"] * 10)
    assert online.stats()["users"] == 10


def test_a_full_disk_leaves_the_old_snapshot(saved):
    path = saved / "states.safetensors"
    before = path.read_bytes()

    def child():
        online = start(saved)
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
        with pytest.raises(OSError, match=r"cannot write|File too large"):
            online.save_snapshot()

    assert wait(fork(child)) == 0
    assert path.read_bytes() == before
    assert not list(saved.glob("*.part"))
    assert json.loads(load_file(path)["users"].numpy().tobytes()) == list(USERS)
