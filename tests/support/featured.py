"""Made-up data in which what comes next depends on the items' colours, and some items that only features tell of."""

import functools
import random
import tempfile

import torch

from ttt4rec import TTT4Rec, TTT4RecConfig
from ttt4rec.recsys import Recommender, TrainOptions, build_histories, fit, load_interactions, split_by_ratio
from ttt4rec.recsys.data.item_features import item_features

COLOURS, OF_A_COLOUR, COLD = 6, 8, 2  # the last two items of a colour are in nobody's history
SMALL = {"width": 16, "num_heads": 2, "ffn_width": 16, "max_len": 8, "mini_batch_size": 4, "inner": "linear"}


def items_of(colour, cold=False):
    places = range(OF_A_COLOUR - COLD, OF_A_COLOUR) if cold else range(OF_A_COLOUR - COLD)
    return [f"i{colour * OF_A_COLOUR + place}" for place in places]


def colour_of(item):
    return int(item[1:]) // OF_A_COLOUR


def colourful_rows(users=80, length=12):
    """Each user takes any item of one colour, then any of the next."""
    rng = random.Random(0)
    starts = [rng.randrange(COLOURS) for _ in range(users)]
    return [
        (f"u{user}", rng.choice(items_of((start + t) % COLOURS)), t)
        for user, start in enumerate(starts)
        for t in range(length)
    ]


def feature_columns():
    """A category, a number that tells of it in part, and a vector that tells of nothing; titles that all differ."""
    rng = random.Random(1)
    items = [f"i{number}" for number in range(COLOURS * OF_A_COLOUR)]
    return {
        "item_id": items,
        "colour": [f"colour {colour_of(item)}" for item in items],
        "price": [float(colour_of(item) % 2) for item in items],
        "text": [[rng.gauss(0, 1) for _ in range(3)] for _ in items],
        "title": [f"The {item}" for item in items],
    }


def colourful_split():
    return split_by_ratio(build_histories(load_interactions(colourful_rows())), (3, 1, 1))


def featured_model(split, seed=0, features=None, dtype=None, **config):
    given = item_features(feature_columns(), split) if features is None else features
    torch.manual_seed(seed)
    shape = TTT4RecConfig(num_items=split.histories.num_items, **(SMALL | config))
    return TTT4Rec(shape, dtype=dtype, features=given)


@functools.cache
def trained_on_colours():
    """A recommender that knows all items but the cold ones."""
    split = colourful_split()
    model = featured_model(split)
    with tempfile.TemporaryDirectory() as folder:
        fit(model, split, folder, TrainOptions(epochs=6, targets_per_batch=64, learning_rate=1e-2))
    return Recommender(model.eval(), split.histories)
