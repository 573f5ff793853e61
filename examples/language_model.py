"""A small causal language model over characters, whose attention is swapped for TTTLayer by one argument.

    python examples/language_model.py --mixer ttt         (or attention, for comparison)

Without --text it reads the language reference that comes with Python (``pydoc_data.topics``).
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from pydoc_data.topics import topics

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ttt4rec import TTTLayer


class Attention(nn.Module):
    """What a language model usually has here: causal multi-head self-attention over learned positions."""

    def __init__(self, width: int, num_heads: int, max_len: int = 1024) -> None:
        super().__init__()
        self.position = nn.Parameter(0.02 * torch.randn(max_len, width))
        self.attention = nn.MultiheadAttention(width, num_heads, bias=False, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.position[: x.shape[1]]
        future = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
        return self.attention(x, x, x, attn_mask=future, need_weights=False)[0]


def feed_forward(width: int) -> nn.Module:
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))


class LanguageModel(nn.Module):
    """Characters -> blocks of mixer and feed-forward network -> logits of the next character."""

    def __init__(self, vocabulary: int, mixer: str, width: int, num_heads: int, num_blocks: int) -> None:
        super().__init__()
        make_mixer = {"ttt": TTTLayer, "attention": Attention}[mixer]  # the one line that swaps them
        self.embedding = nn.Embedding(vocabulary, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(num_blocks))
        self.mixers = nn.ModuleList(make_mixer(width, num_heads) for _ in range(num_blocks))
        self.ffns = nn.ModuleList(feed_forward(width) for _ in range(num_blocks))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, vocabulary))

    def forward(self, ids: Tensor) -> Tensor:  # [B, L] -> [B, L, vocabulary]
        h = self.embedding(ids)
        for norm, mixer, ffn in zip(self.norms, self.mixers, self.ffns, strict=True):
            h = h + mixer(norm(h))
            h = h + ffn(h)
        return self.head(h)


@torch.no_grad()
def sample(model: LanguageModel, ids: list[int], count: int, context: int) -> list[int]:
    """Draw characters one by one, each from the model's prediction after the last ``context`` ones."""
    for _ in range(count):
        logits = model(torch.tensor([ids[-context:]]))[0, -1]
        ids = [*ids, int(torch.multinomial((logits / 0.7).softmax(0), 1))]
    return ids


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mixer", choices=("ttt", "attention"), default="ttt")
    parser.add_argument("--text", type=Path, help="a UTF-8 text file to learn from")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=16, help="sequences in a step")
    parser.add_argument("--length", type=int, default=128, help="characters in a sequence")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--sample", type=int, default=200, help="characters to write at the end")
    args = parser.parse_args(argv)

    torch.manual_seed(0)
    text = args.text.read_text(encoding="utf-8") if args.text else "\n".join(topics.values())
    if len(text) <= args.length:
        parser.error(f"the text must be longer than --length, {args.length}; it has {len(text)} characters")
    characters = sorted(set(text))
    code = {character: i for i, character in enumerate(characters)}
    data = torch.tensor([code[character] for character in text])
    model = LanguageModel(len(characters), args.mixer, args.width, num_heads=4, num_blocks=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(1, args.steps + 1):
        starts = torch.randint(len(data) - args.length, (args.batch, 1))
        window = data[starts + torch.arange(args.length + 1)]
        loss = F.cross_entropy(model(window[:, :-1]).flatten(0, 1), window[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % max(1, args.steps // 10) == 0:
            print(f"step {step:4d}  loss {loss.item():.3f}", flush=True)
    start = [code[character] for character in text[: args.length]]
    print("".join(characters[i] for i in sample(model, start, args.sample, args.length)[len(start) :]))


if __name__ == "__main__":
    main()
