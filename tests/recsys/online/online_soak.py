"""An online recommender that is killed at random moments, started again, and compared with what it acknowledged.

    python -m tests.recsys.online.online_soak --kills 1000

Children are forked, so that none of them imports torch again. After every kill the log must hold exactly what was
acknowledged, and of the call that was going on all or nothing; the recommender must start, with the snapshot that lies
there, and score as a batch pass over the histories does. The next child sends the interrupted batch again.
"""

import argparse
import itertools
import json
import os
import random
import signal
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch

from tests.support.checks import ROUNDING
from tests.support.crash import fork, wait
from tests.support.online_data import ITEMS, batch_scores, history, make_model, slot_bytes
from ttt4rec.recsys.online import OnlineRecommender
from ttt4rec.recsys.online.events import SQLiteEventLog

MODEL = make_model(0, inner="mlp", block_conv=True)
USERS = [f"u{n}" for n in range(12)]
MOST_CALLS = 12
SECONDS = 0.001, 0.03  # a child lives so long after what it told last: until about a commit, or for a few calls


def start(folder, slots=5):
    """A recommender on what lies in the folder."""
    options = {"pool_bytes": slots * slot_bytes(MODEL), "snapshot": folder / "states.safetensors"}
    return OnlineRecommender(MODEL, ITEMS, SQLiteEventLog(folder / "log.db"), **options)


def live(folder, rng, pipe, again, landed):
    """Until it is killed, do this and that, and tell before and after; first repeat what the last life was doing."""
    online = start(folder)
    tell(pipe, "observe", [] if landed else again)
    assert observe(online, again) == [not landed] * len(again)
    tell(pipe, "done")
    while True:
        what = rng.choices(["observe", "recommend", "save_snapshot", "forget"], [16, 4, 2, 1])[0]
        users = rng.sample(USERS, rng.randint(1, 4))
        batch = [[rng.choice(users), rng.choice(ITEMS), str(rng.getrandbits(60))] for _ in range(rng.randint(1, 6))]
        arguments = {"observe": batch, "forget": users[:1]}.get(what, [])
        tell(pipe, what, arguments)
        match what:
            case "observe":
                assert all(observe(online, batch))
            case "recommend":
                online.recommend(users)
            case "save_snapshot":
                online.save_snapshot()
            case "forget":
                online.forget(arguments)
        tell(pipe, "done")


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


def killed_after(folder, rng, again, landed):
    """What a child told before it was killed, at a random moment."""
    reading, writing = os.pipe()
    child = fork(lambda: live(folder, rng, writing, again, landed))
    os.close(writing)
    with os.fdopen(reading) as pipe:
        lines = list(itertools.islice(pipe, rng.randint(0, 2 * MOST_CALLS)))
        time.sleep(rng.uniform(0, rng.choice(SECONDS)))
        os.kill(child, signal.SIGKILL)
        code = wait(child)
        told = [json.loads(line) for line in [*lines, *pipe]]
    assert code == -signal.SIGKILL, f"a child ended by itself, with {code}, after {told[-1:]}"
    return told


def check(folder, expected):
    """The log holds one of the expected histories; scores are those of a batch pass. Returns which, and users kept."""
    online = start(folder)
    try:
        restored = online.stats()["users"]
        found = {user: history(online.log, user) for user in USERS}
        assert found in expected, f"{found} is none of {expected}"
        best_of_all = online.recommend(USERS, len(ITEMS), exclude_seen=False)
        for best, scores in zip(best_of_all, batch_scores(MODEL, list(found.values())), strict=True):
            scale = max(map(abs, scores.values()), default=0)
            assert dict(best).keys() == scores.keys()
            assert all(abs(score - scores[item]) <= (2**-24 + ROUNDING) * scale for item, score in best)
    finally:
        online.log.close()
    return expected.index(found), restored


def survive(folder, kills, seed=0):
    """Kill a recommender so many times; returns counts of what happened."""
    rng, counts = random.Random(seed), Counter()
    taken, again, landed = {user: [] for user in USERS}, [], True
    for _ in range(kills):
        told = killed_after(folder, random.Random(rng.random()), again, landed)
        actions = told[::2]
        interrupted = actions.pop() if len(told) % 2 else ["nothing", []]
        for what, arguments in actions:
            taken = apply(taken, what, arguments)
            counts["acknowledged events"] += len(arguments) if what == "observe" else 0
        expected = [taken, apply(taken, *interrupted)]
        which, restored = check(folder, expected)
        taken = expected[which]
        if actions:  # else it was killed before it had sent the last one's batch again
            again, landed = interrupted[1] if interrupted[0] == "observe" else [], False
            counts["interrupted batches"] += bool(again)
        landed = landed or which == 1
        counts["kills"] += 1
        counts["of these logged"] += which and interrupted[0] == "observe" and bool(actions)
        counts["states from snapshots"] += restored
    return counts


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        begin = time.perf_counter()
        happened = survive(Path(place), args.kills, args.seed)
    listed = ", ".join(f"{count:,} {what}" for what, count in happened.items())
    print(f"{listed}; nothing acknowledged was lost, in {time.perf_counter() - begin:.0f} s")
