"""Train a next-item model with a TTTLayer inside by PyTorch Lightning, which brings loop, logging and checkpoints.

    pip install "ttt4rec[lightning]"
    python examples/train_with_lightning.py --epochs 5 --out runs/lightning

The data are made up: everybody walks round a ring of items. The checkpoint that Lightning wrote is loaded at the end.
"""

import argparse
from collections.abc import Sequence

import lightning
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ttt4rec import TTTLayer


class NextItem(lightning.LightningModule):
    """Embedding, one TTT layer with a residual connection, scores of all items."""

    def __init__(self, num_items: int, width: int = 32, num_heads: int = 2) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.embedding = nn.Embedding(num_items, width)
        self.norm = nn.LayerNorm(width)
        self.mixer = TTTLayer(width, num_heads, inner="mlp", mini_batch_size=8)
        self.head = nn.Linear(width, num_items)

    def forward(self, ids: Tensor) -> Tensor:  # [B, L] -> [B, L, num_items]
        h = self.embedding(ids)
        return self.head(h + self.mixer(self.norm(h)))

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        loss = self._loss(batch[0])
        self.log("train_loss", loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        self.log("valid_loss", self._loss(batch[0]))

    def _loss(self, ids: Tensor) -> Tensor:
        return F.cross_entropy(self(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-2)


def walks(count: int, length: int, num_items: int) -> TensorDataset:
    """Each user goes round the ring of items by a step of his own, 1 to 3, which a model must find out."""
    starts, steps = torch.randint(num_items, (count, 1)), torch.randint(1, 4, (count, 1))
    return TensorDataset((starts + steps * torch.arange(length)) % num_items)


def main(argv: Sequence[str] | None = None) -> float:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--users", type=int, default=512)
    parser.add_argument("--length", type=int, default=33)
    parser.add_argument("--out", default="runs/lightning", help="folder of logs and checkpoints")
    args = parser.parse_args(argv)

    lightning.seed_everything(0, verbose=False)
    train, valid = (walks(count, args.length, num_items=20) for count in (args.users, args.users // 4))
    best = ModelCheckpoint(args.out, monitor="valid_loss")
    trainer = lightning.Trainer(
        max_epochs=args.epochs,
        accelerator="cpu",
        logger=CSVLogger(args.out),
        callbacks=[best],
        enable_progress_bar=False,
        enable_model_summary=False,
        gradient_clip_val=1.0,
        log_every_n_steps=1,
    )
    trainer.fit(NextItem(num_items=20), DataLoader(train, 64, shuffle=True), DataLoader(valid, 64))
    model = NextItem.load_from_checkpoint(best.best_model_path)
    loss = trainer.validate(model, DataLoader(valid, 64), verbose=False)[0]["valid_loss"]
    print(f"valid loss {loss:.3f} of {best.best_model_path}")
    return loss


if __name__ == "__main__":
    main()
