"""A small made-up dataset with a pattern that a sequence model can learn."""

import random

import torch

from ttt4rec import TTT4Rec, TTT4RecConfig
from ttt4rec.recsys.data import build_histories, read_interactions
from ttt4rec.recsys.data.split import split_by_ratio

NUM_ITEMS = 24
SMALL = [
    "--width",
    "16",
    "--num-heads",
    "2",
    "--ffn-width",
    "16",
    "--max-len",
    "8",
    "--targets-per-batch",
    "128",
]


def write_events(path, users=60, seed=0):
    """Users walk round the ring of items, one step on at a time, now and then two."""
    rng = random.Random(seed)
    lines = ["user_id:token\titem_id:token\ttimestamp:float"]
    for user in range(users):
        item = rng.randrange(NUM_ITEMS)
        for t in range(rng.randrange(8, 30)):
            lines.append(f"u{user}\ti{item}\t{1_000_000_000 + t}")
            item = (item + (2 if rng.random() < 0.1 else 1)) % NUM_ITEMS
    path.write_text("\n".join(lines) + "\n")
    return path


def make_split(tmp_path, users=60):
    return split_by_ratio(build_histories(read_interactions(write_events(tmp_path / "ring.inter", users))), (3, 2, 5))


def make_model(split, seed=0, **config):
    torch.manual_seed(seed)
    small = {"width": 16, "num_heads": 2, "ffn_width": 32, "max_len": 8, "mini_batch_size": 4}
    return TTT4Rec(TTT4RecConfig(num_items=split.histories.num_items, **(small | config)))


def rows_of(data):
    """User id, item id and time of every interaction."""
    users, items = (
        [ids[code] for code in codes] for ids, codes in ((data.user_ids, data.users), (data.item_ids, data.items))
    )
    return list(zip(users, items, data.times.tolist(), strict=True))
