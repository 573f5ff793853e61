"""Train TTT4Rec in a plain loop under Hugging Face's accelerate: the same file for one CPU, several GPUs, bfloat16.

    pip install "ttt4rec[accelerate]"
    accelerate launch --mixed_precision bf16 examples/train_with_accelerate.py --out runs/accelerate

accelerate splits the batches between its processes and averages the gradients. The data are made up: everybody walks
round a ring of items.
"""

import argparse
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ttt4rec import TTT4Rec, TTT4RecConfig


class WithLoss(nn.Module):
    """The model together with its loss, so that what accelerate wraps is called once a step."""

    def __init__(self, model: TTT4Rec) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.model(ids[:, :-1])
        return F.cross_entropy(self.model.scores(hidden).flatten(0, 1), ids[:, 1:].flatten() - 1)


def walks(count: int, length: int, num_items: int) -> list[Tensor]:
    """Each user goes round the ring of items 1 to num_items by a step of his own, 1 to 3."""
    starts, steps = torch.randint(num_items, (count, 1)), torch.randint(1, 4, (count, 1))
    return list((starts + steps * torch.arange(length)) % num_items + 1)


def main(argv: Sequence[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--users", type=int, default=512)
    parser.add_argument("--length", type=int, default=33)
    parser.add_argument("--out", default="runs/accelerate", help="folder of the model")
    args = parser.parse_args(argv)

    set_seed(0)
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    model = WithLoss(TTT4Rec(TTT4RecConfig(num_items=20, width=32, num_heads=2, dropout=0.0)))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    data = DataLoader(walks(args.users, args.length, num_items=20), batch_size=64, shuffle=True)
    model, optimizer, data = accelerator.prepare(model, optimizer, data)
    losses = []
    for epoch in range(args.epochs):
        total = 0.0
        for ids in data:
            loss = model(ids)
            optimizer.zero_grad()
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            total += accelerator.reduce(loss.detach(), "mean").item()
        losses.append(total / len(data))
        accelerator.print(f"epoch {epoch}  loss {losses[-1]:.3f}", flush=True)
    if accelerator.is_main_process:
        accelerator.unwrap_model(model).model.save(args.out)
    return losses


if __name__ == "__main__":
    main()
