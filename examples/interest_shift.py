"""A user's interest shifts: what the online recommender tells of it, event by event, and a plot.

    python examples/interest_shift.py --out interest_shift.png

Items come in groups, and users to train on take those of one group, then of another. A user who is new does the same
before the eyes of the recommender. Plotted are how much worse than the weights with which everybody begins those that
the model learned of this user know each item, and how far they have moved. Needs matplotlib, of ttt4rec[plot].
"""

import argparse
import tempfile
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import torch

from ttt4rec import TTT4Rec, TTT4RecConfig
from ttt4rec.recsys import TrainOptions, fit, split_by_ratio
from ttt4rec.recsys.data import Histories
from ttt4rec.recsys.online import OnlineRecommender, SQLiteEventLog

GROUPS, SIZE = 8, 20  # of items, and items in each
LENGTH = 64


def make_users(count: int, shift: int | None, rng: np.random.Generator) -> np.ndarray:
    """Item codes [count, LENGTH] of users who take another group's from event ``shift`` on; None: anywhere."""
    moments = rng.integers(8, LENGTH - 8, count) if shift is None else np.full(count, shift)
    first = rng.integers(GROUPS, size=count)
    second = (first + rng.integers(1, GROUPS, size=count)) % GROUPS
    groups = np.where(np.arange(LENGTH) < moments[:, None], first[:, None], second[:, None])
    return 1 + groups * SIZE + rng.integers(SIZE, size=groups.shape)


def train(taken: np.ndarray, epochs: int) -> TTT4Rec:
    """A model that forgets, of these users."""
    count, names = len(taken), tuple(map(str, range(1, GROUPS * SIZE + 1)))
    times = np.tile(np.arange(LENGTH), count)
    histories = Histories(taken.ravel(), np.arange(count + 1) * LENGTH, times, tuple(map(str, range(count))), names)
    config = TTT4RecConfig(len(names), 32, num_heads=2, ffn_width=64, inner="linear", mini_batch_size=4, max_len=LENGTH,
                           forget="token")  # fmt: skip
    model = TTT4Rec(config)
    with tempfile.TemporaryDirectory() as folder:
        fit(model, split_by_ratio(histories, (8, 2, 0)), folder, TrainOptions(epochs=epochs, learning_rate=3e-3))
    return model


def watch(online: OnlineRecommender, user: str, items: Sequence[int]) -> tuple[list[float], list[float]]:
    """How far the user's weights had moved after each event, and how much each surprised."""
    moved = []
    for item in items:
        online.observe([user], [str(item)])
        moved += online.moved([user])
    return moved, [number for _, number in online.surprise(user)]


def plot(moved: Sequence[float], surprise: Sequence[float], shift: int, path: Path) -> None:
    """Both against events, one above the other."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, sharex=True)
    events = range(1, len(moved) + 1)
    above.plot(events, surprise, ".-", color="#0072b2")
    above.axhline(1, color="gray", linewidth=0.8)
    above.set(ylabel="surprise", ylim=(0, None))
    below.plot(events, moved, ".-", color="#d55e00")
    below.set(ylabel="moved", xlabel="event", ylim=(0, None))
    for axes in (above, below):
        axes.axvline(shift + 0.5, color="gray", linestyle=":")
    figure.savefig(path, dpi=200)


def main(argv: Sequence[str] | None = None) -> tuple[list[float], list[float]]:
    """Returns what was plotted: moved, and surprise."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("interest_shift.png"), help="the plot")
    parser.add_argument("--users", type=int, default=200, help="to train on")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--shift", type=int, default=32, help="events of the new user's first interest")
    args = parser.parse_args(argv)

    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    model = train(make_users(args.users, None, rng), args.epochs)
    (items,) = make_users(1, args.shift, rng)
    with tempfile.TemporaryDirectory() as folder, closing(SQLiteEventLog(Path(folder) / "events.db")) as log:
        ids = [str(n) for n in range(1, GROUPS * SIZE + 1)]
        moved, surprise = watch(OnlineRecommender(model, ids, log, pool_bytes=1 << 20), "ada", items.tolist())
    plot(moved, surprise, args.shift, args.out)
    for name, part in (("before", slice(args.shift - 8, args.shift)), ("after", slice(args.shift, args.shift + 8))):
        print(f"eight events {name} the shift: surprise {np.mean(surprise[part]):.2f}, "
              f"weights moved by {np.mean(moved[part]):.2f}")  # fmt: skip
    print(f"plotted to {args.out}")
    return moved, surprise


if __name__ == "__main__":
    main()
