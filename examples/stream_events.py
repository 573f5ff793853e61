"""Read a user's events one at a time, the state saved to a file in between, and compare with one call over all of them.

    python examples/stream_events.py --events 100 --model runs/ml-100k

Without --model the weights are random, which changes nothing about the comparison.
"""

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ttt4rec import TTT4Rec, TTT4RecConfig, TTTState
from ttt4rec.models.blocks import BlockState


def read_event(model: TTT4Rec, item: int, folder: Path) -> Tensor:
    """Scores of all items [num_items] after one more event; what the user's past left is in ``folder``."""
    files = [folder / f"block{i}.safetensors" for i in range(len(model.blocks))]
    states = [BlockState(TTTState.load(file), None) for file in files] if files[0].exists() else None
    hidden, states = model(torch.tensor([[item]]), states=states, return_states=True)
    for state, file in zip(states, files, strict=True):
        state.mixer.save(file)
    return model.scores(hidden[0, 0])


@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> float:
    """Returns the largest difference between a streamed and a batch score."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of a trained model with the TTT mixer")
    parser.add_argument("--events", type=int, default=50)
    args = parser.parse_args(argv)

    torch.manual_seed(0)
    model = TTT4Rec.load(args.model) if args.model else TTT4Rec(TTT4RecConfig(num_items=1000, num_blocks=2)).eval()
    if model.config.mixer != "ttt" or model.config.block_conv:
        parser.error(
            f"--model must have the TTT mixer and no block_conv, so that a TTTState is all; given {args.model}"
        )
    history = torch.randint(1, model.config.num_items + 1, (args.events,))
    expected = model.scores(model(history[None])[0])
    difference = 0.0
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        for i, item in enumerate(history.tolist()):
            scores = read_event(model, item, Path(folder))
            difference = max(difference, float((scores - expected[i]).abs().max()))
            if (i + 1) % max(1, args.events // 5) == 0:
                best = int(scores.argmax()) + 1
                print(f"event {i + 1:4d}: item {item:4d} read, best next item {best:4d}, largest difference so far "
                      f"{difference:.1e}")  # fmt: skip
        milliseconds = 1000 * (time.perf_counter() - begin) / args.events
        size = sum(file.stat().st_size for file in Path(folder).iterdir())
    print(f"{milliseconds:.1f} ms an event, {size} bytes of state a user, whatever the number of events")
    print(f"scores are as large as {float(expected.abs().max()):.2f}; streamed and batch differ by at most "
          f"{difference:.1e}")  # fmt: skip
    return difference


if __name__ == "__main__":
    main()
