"""An online recommender that is killed at random moments, started again, and compared with what it acknowledged.

    python -m tests.recsys.online.online_soak --kills 1000 --threads 6

Children are forked, so that none of them imports torch again. In each, several clients do this and that at once, each
for some users, and send batches now and then that are refused. After every kill the log must hold exactly what was
acknowledged, and of each client's call that was going on all or nothing; the recommender must start, with the snapshot
that lies there, and score as a batch pass over the histories does. The next child sends interrupted batches again.
"""

import argparse
import itertools
import json
import os
import random
import signal
import sqlite3
import tempfile
import threading
import time
import traceback
from collections import Counter
from contextlib import closing
from pathlib import Path

import torch

from tests.support.checks import ROUNDING
from tests.support.crash import fork, wait
from tests.support.online_data import ITEMS, batch_scores, history, make_model, slot_bytes
from ttt4rec.recsys.data import DataError
from ttt4rec.recsys.online import OnlineRecommender
from ttt4rec.recsys.online.events import DamagedLogError, Event, SQLiteEventLog

MODEL = make_model(0, inner="mlp", block_conv=True)
USERS = [f"u{n}" for n in range(12)]
DAMAGED = "damaged"  # a user whose history takes no events
MOST_CALLS = 12
SECONDS = 0.001, 0.03  # a child lives so long after what it told last: until about a commit, or for a few calls


def start(folder, slots=5):
    """A recommender on what lies in the folder."""
    options = {"pool_bytes": slots * slot_bytes(MODEL), "snapshot": folder / "states.safetensors"}
    return OnlineRecommender(MODEL, ITEMS, SQLiteEventLog(folder / "log.db"), **options)


def live(folder, rng, pipe, clients):
    """Until it is killed, do this and that for all clients, each in a thread, and tell before and after."""
    online = start(folder)
    threads = [
        threading.Thread(target=serve, args=(online, random.Random(rng.random()), pipe, number, client))
        for number, client in enumerate(clients)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:  # which end by a failure only
        thread.join()
    os._exit(1)


def serve(online, rng, pipe, number, client):
    """One client's life; first it repeats what it was doing in the last one."""
    try:
        tell(pipe, number, "observe", [] if client.landed else client.again)
        assert observe(online, client.again) == [not client.landed] * len(client.again)
        tell(pipe, number, "done")
        while True:
            what = rng.choices(["observe", "recommend", "save_snapshot", "forget", "be refused"], [16, 4, 2, 1, 4])[0]
            users = rng.sample(client.users, rng.randint(1, min(4, len(client.users))))
            batch = [[rng.choice(users), rng.choice(ITEMS), str(rng.getrandbits(60))] for _ in range(rng.randint(1, 6))]
            arguments = {"observe": batch, "forget": users[:1]}.get(what, [])
            tell(pipe, number, what, arguments)
            match what:
                case "observe":
                    assert all(observe(online, batch))
                case "recommend":
                    online.recommend(users)
                case "save_snapshot":
                    online.save_snapshot()
                case "forget":
                    online.forget(arguments)
                case "be refused":
                    be_refused(online, [*batch, rng.choice([[users[0], "no such item", "1"], [DAMAGED, "i1", "1"]])])
            tell(pipe, number, "done")
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def be_refused(online, batch):
    """Because of the batch's last event."""
    try:
        observe(online, batch)
    except (DataError, DamagedLogError):
        return
    raise AssertionError(f"{batch} was taken")


def observe(online, batch):
    users, items, names = zip(*batch, strict=True) if batch else ([], [], [])
    return online.observe(users, items, event_ids=names)


def tell(pipe, *words):
    os.write(pipe, json.dumps(words).encode() + b"\n")  # in one piece, being short


def apply(taken, what, arguments):
    """Histories after an action."""
    taken = {user: list(items) for user, items in taken.items()}
    if what == "observe":
        for user, item, _ in arguments:
            taken[user].append(item)
    if what == "forget":
        taken |= {user: [] for user in arguments}
    return taken


def killed_after(folder, rng, clients):
    """What a child told before it was killed, at a random moment: for each client all that it told."""
    reading, writing = os.pipe()
    child = fork(lambda: live(folder, rng, writing, clients))
    os.close(writing)
    with os.fdopen(reading) as pipe:
        lines = list(itertools.islice(pipe, rng.randint(0, 2 * MOST_CALLS * len(clients))))
        time.sleep(rng.uniform(0, rng.choice(SECONDS)))
        os.kill(child, signal.SIGKILL)
        code = wait(child)
        told = [json.loads(line) for line in [*lines, *pipe]]
    assert code == -signal.SIGKILL, f"a child ended by itself, with {code}, after {told[-1:]}"
    return [[words for who, *words in told if who == number] for number in range(len(clients))]


def check(folder, expected):
    """Of each client the log holds one of the expected histories; scores are those of a batch pass.

    Returns which of them, and users kept.
    """
    online = start(folder)
    try:
        restored = online.stats()["users"]
        found = {user: history(online.log, user) for user in USERS}
        which = []
        for histories in expected:
            own = {user: found[user] for user in histories[0]}
            assert own in histories, f"{own} is none of {histories}"
            which.append(histories.index(own))
        best_of_all = online.recommend(USERS, len(ITEMS), exclude_seen=False)
        for best, scores in zip(best_of_all, batch_scores(MODEL, list(found.values())), strict=True):
            scale = max(map(abs, scores.values()), default=0)
            assert dict(best).keys() == scores.keys()
            assert all(abs(score - scores[item]) <= (2**-24 + ROUNDING) * scale for item, score in best)
    finally:
        online.log.close()
    return which, restored


class Client:
    """Some users' histories as they were acknowledged, and what was going on when the last life ended."""

    def __init__(self, users):
        self.users, self.taken = users, {user: [] for user in users}
        self.again, self.landed = [], True

    def hear(self, told):
        """What a life told; returns counts, the histories that may be, and the action that was going on."""
        actions = told[::2]
        interrupted = actions.pop() if len(told) % 2 else ["nothing", []]
        counts = Counter()
        for what, arguments in actions:
            self.taken = apply(self.taken, what, arguments)
            counts["acknowledged events"] += len(arguments) if what == "observe" else 0
            counts["refused batches"] += what == "be refused"
        if actions:  # else it was killed before it had sent the last one's batch again
            self.again, self.landed = interrupted[1] if interrupted[0] == "observe" else [], False
            counts["interrupted batches"] += bool(self.again)
        return counts, [self.taken, apply(self.taken, *interrupted)]


def damage(folder):
    """A history that takes no events any more."""
    with closing(SQLiteEventLog(folder / "log.db")) as log:
        log.append([Event(DAMAGED, ITEMS[0])])
    with closing(sqlite3.connect(folder / "log.db")) as database:
        database.execute("UPDATE users SET length = 5")
        database.commit()


def survive(folder, kills, seed=0, threads=1):
    """Kill a recommender so many times; returns counts of what happened."""
    rng, counts = random.Random(seed), Counter()
    clients = [Client(USERS[number::threads]) for number in range(threads)]
    damage(folder)
    for _ in range(kills):
        expected = []
        for client, told in zip(clients, killed_after(folder, random.Random(rng.random()), clients), strict=True):
            heard, histories = client.hear(told)
            counts += heard
            expected.append(histories)
        found, restored = check(folder, expected)
        for client, histories, which in zip(clients, expected, found, strict=True):
            client.taken = histories[which]
            counts["of these logged"] += which and bool(client.again) and not client.landed
            client.landed = client.landed or which == 1
        counts["kills"] += 1
        counts["states from snapshots"] += restored
    return counts


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=1, help="clients at once, whose events are logged in groups")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        begin = time.perf_counter()
        happened = survive(Path(place), args.kills, args.seed, args.threads)
    listed = ", ".join(f"{count:,} {what}" for what, count in happened.items())
    print(f"{listed}; nothing acknowledged was lost, in {time.perf_counter() - begin:.0f} s")
