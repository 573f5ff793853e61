"""What the tests of the online recommender share: a log in memory, small models, and what should be recommended."""

import bisect
import itertools
import threading

import pytest
import torch

from tests.support.checks import ROUNDING
from ttt4rec import TTT4Rec, TTT4RecConfig
from ttt4rec.recsys.online import OnlineRecommender
from ttt4rec.recsys.online.events import DamagedLogError, Event, Tail

ITEMS = tuple(f"i{j}" for j in range(12))


def make_model(seed=0, num_items=12, **config):
    """A model whose inner loop matters to the scores."""
    small = {"width": 8, "num_heads": 2, "ffn_width": 8, "mini_batch_size": 3, "num_blocks": 2, "max_len": 5}
    torch.manual_seed(seed)
    model = TTT4Rec(TTT4RecConfig(num_items=num_items, **(small | config))).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
        model.embedding.weight[0] = 0
    return model


def slot_bytes(model):
    """What one user takes of ``pool_bytes``."""
    time = 8 if model.event_times is not None else 0
    return sum(pool.nbytes for pool in model.make_pools(1)) + model.embedding.weight[0].nbytes + time


@torch.no_grad()
def batch_scores(model, histories, items=ITEMS):
    """Scores by item after each history of known items, all read in one padded pass; none after an empty one."""
    longest = max(map(len, histories), default=0)
    if not longest:
        return [{} for _ in histories]
    codes = torch.tensor([[items.index(x) + 1 for x in h] + [0] * (longest - len(h)) for h in histories])
    hidden = model(codes)[range(len(histories)), [len(h) - 1 for h in histories]]
    rows = model.scores(hidden).tolist()
    return [dict(zip(items, row, strict=True)) if h else {} for row, h in zip(rows, histories, strict=True)]


def history(log, user):
    """All items of a user."""
    return log.read([user], [[]])[0].items


def append_two_users(log):
    """Three events of u, and one of v."""
    log.append([Event("u", item, f"id {item}", time=n) for n, item in enumerate("abd", start=1)] + [Event("v", "a")])


def assert_damage_is_named(log, message, place, *meetings):
    """Damage of u, by whatever meets it; the log remembers it, and forgetting its user removes it."""
    for meet in meetings:
        with pytest.raises(DamagedLogError, match=f"is damaged: {message}; restore the {place} from a backup"):
            meet()
        assert log.damage == message
    assert history(log, "v") == ["a"]
    log.forget(["u"])
    log.append([Event("u", "e")])
    assert history(log, "u") == ["e"]


class MemoryEventLog:
    """An event log that forgets all when it goes; what the promises of ``EventLog`` are, in few lines."""

    def __init__(self):
        self.lock, self.histories = threading.Lock(), {}

    def append(self, events):
        with self.lock:
            return [self._append(event) for event in events]

    def _append(self, event):
        rows = self.histories.get(event.user_id, [])
        if event.event_id is not None and any(event.event_id == name for _, _, name in rows):
            return False
        time = event.time if event.time is not None else rows[-1][0] if rows else float("-inf")
        place = bisect.bisect_right([row[0] for row in rows], time)
        self.histories[event.user_id] = [*rows[:place], (time, event.item_id, event.event_id), *rows[place:]]
        return True

    def read(self, user_ids, known, limit=None):
        with self.lock:
            tails = []
            for user, beginnings in zip(user_ids, known, strict=True):
                rows = self.histories.get(user, [])
                marks = list(itertools.accumulate(rows, lambda mark, row: hash((mark, row)), initial=0))
                start = next((n for n, mark in beginnings if n <= len(rows) and marks[n] == mark), 0)
                stop = len(rows) if limit is None else min(len(rows), start + limit)
                limit = limit if limit is None else limit - (stop - start)
                times, items, _ = zip(*rows[start:stop], strict=True) if start < stop else ((), (), ())
                tails.append(Tail(start, list(items), marks[start + 1 : stop + 1], len(rows), times))
            return tails

    def forget(self, user_ids):
        with self.lock:
            for user in user_ids:
                self.histories.pop(user, None)


def run_threads(work, count):
    """Call ``work(number)`` in so many threads; what goes wrong in one is an error here."""
    errors = []

    def guarded(number):
        try:
            work(number)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors


ROUNDED = 2**-24 + ROUNDING  # scores come back in float32, of whatever the model computes in
USERS = ("u", "v", "w", "x", "y")
MODELS = [
    make_model(0, inner="mlp", block_conv=True),
    make_model(1, inner="linear", backbone="mamba", mini_batch_size=4),
]


def make_online(model=MODELS[0], slots=2, log=None, items=ITEMS, **options):
    return OnlineRecommender(model, items, log or MemoryEventLog(), pool_bytes=slots * slot_bytes(model), **options)


def assert_up_to_date(online, user, taken, model=MODELS[0], items=ITEMS, tolerance=ROUNDED):
    """Everything recommended to a user, and what is left without the seen, against one pass over what was taken."""
    everything, unseen = (online.recommend([user], len(items), exclude_seen=seen)[0] for seen in (False, True))
    if not taken:
        assert everything == unseen == []
        return
    (expected,) = batch_scores(model, [taken], items)
    scale = max(map(abs, expected.values()))
    assert dict(everything).keys() == expected.keys()
    assert all(abs(score - expected[item]) <= tolerance * scale for item, score in everything)
    assert [score for _, score in everything] == sorted((score for _, score in everything), reverse=True)
    assert unseen == [(item, score) for item, score in everything if item not in taken]
