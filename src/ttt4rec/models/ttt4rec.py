"""TTT4Rec: the sequential recommender (Yang, Wang & Ge 2024, arXiv 2409.19142), and its baselines in the same frame."""

import copy
import dataclasses
import json
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..atomic_files import check_together, read_sealed, write_together
from ..layers.initialisation import STD, Device, draw
from ..layers.original_weights import load_release_block, load_release_model
from ..layers.ttt import TTTLayer
from ..layers.validation import check_cu_seqlens, check_mask
from ..operators.transforms import has_values
from . import full_softmax
from .blocks import Block, BlockPool, BlockState, make_norm
from .cloze import hide_next, hide_some
from .config import TTT4RecConfig
from .event_times import TIMES, EventTimes, check_times
from .item_features import FeaturedItems, ItemFeatures, from_saved
from .item_index import ItemIndex
from .mixers import MIXERS, Mixer
from .step_at_once import step_at_once

CONFIG_FILE, WEIGHTS_FILE, FEATURES_FILE = "config.json", "model.safetensors", "features.json"


def make_mixer(config: TTT4RecConfig, device: Device = None, dtype: torch.dtype | None = None) -> nn.Module:
    """The sequence mixer that the configuration names."""
    mixer = MIXERS[config.mixer]
    return mixer.make(**{name: getattr(config, name) for name in mixer.options}, device=device, dtype=dtype)


def register_mixer(name: str, mixer: Mixer) -> None:
    """Add a mixer for models, their configuration and the command line, before any of them is made or loaded.

    Raises:
        ValueError: there is one of that name, or the configuration has no field of the name of an option.
    """
    if name in MIXERS:
        raise ValueError(f"name must be new, not one of {', '.join(MIXERS)}; given {name!r}")
    fields = [field.name for field in dataclasses.fields(TTT4RecConfig)]
    unknown = [option for option in mixer.options if option not in fields]
    if unknown:
        raise ValueError(f"options must be fields of TTT4RecConfig, {', '.join(fields)}; given {', '.join(unknown)}")
    MIXERS[name] = mixer


class TTT4Rec(nn.Module):
    """Item ids → embedding → dropout → layer norm → residual blocks → final norm; scores are dot products with items.

    Args:
        config: the shape.
        mixer: makes a block's mixer from the configuration; replace it to run another sequence layer in the same
            model. It must take ``(x, mask=, cu_seqlens=, state=, return_state=)`` as ``TTTLayer`` does.
        device: of the parameters.
        dtype: of the parameters.
        features: what is known of the items, next to their ids, if anything is; see ``item_features``.

    Raises:
        ValueError: features are of another number of items.
    """

    def __init__(
        self,
        config: TTT4RecConfig,
        mixer: Callable[..., nn.Module] = make_mixer,
        device: Device = None,
        dtype: torch.dtype | None = None,
        features: ItemFeatures | None = None,
    ) -> None:
        super().__init__()
        factory: Any = {"device": device, "dtype": dtype}
        self.config = config
        if features is not None and features.num_items != config.num_items:
            raise ValueError(f"features must be of num_items, {config.num_items}; given {features.num_items}")
        self.embedding: Any = nn.Embedding(config.num_items + 1, config.width, padding_idx=0, **factory)
        self.dropout = nn.Dropout(config.dropout)
        self.embedding_norm = nn.LayerNorm(config.width, eps=1e-12, **factory)  # the release's
        self.blocks = nn.ModuleList(
            Block(
                config.width,
                mixer(config, **factory) if mixer is make_mixer else mixer(config).to(**factory),
                norm=config.norm,
                ffn=config.ffn,
                ffn_width=config.ffn_width,
                conv_kernel=config.conv_kernel if config.block_conv else None,
                gates=config.gates,
                **factory,
            )
            for _ in range(config.num_blocks)
        )
        self.norm = make_norm(config.norm, config.width, **factory)
        hides = not MIXERS[config.mixer].causal
        self.hidden_item = nn.Parameter(torch.empty(config.width, **factory)) if hides else None
        self.reset_parameters()
        self.apply(draw)
        self.features = None if features is None else FeaturedItems(features, config.width, **factory)
        if self.features is not None:  # last, so that the others' weights are as without them
            self.features.apply(draw)
        times = TIMES[config.times]
        self.event_times = EventTimes(config.width, times.query, **factory) if times.gaps else None

    def reset_parameters(self) -> None:
        """Draw what is the model's own, BERT4Rec's hidden item, from N(0, 0.02); its modules have their own."""
        if self.hidden_item is not None:
            nn.init.normal_(self.hidden_item, std=STD)

    def forward(
        self,
        ids: Tensor,
        *,
        gaps: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        states: Sequence[BlockState] | None = None,
        return_states: bool = False,
    ) -> Tensor | tuple[Tensor, list[BlockState]]:
        """Read histories.

        Args:
            ids: item ids, int64 ``[B, L]``; 0 pads, on the right or the left.
            gaps: of a model with times, the time since the event before ``[B, L]``, any dtype; infinity for the first
                event of a history: see ``event_times.gaps_of``. What is below 0 counts 0, at padding any number.
            cu_seqlens: int ``[N + 1]``: N histories packed one behind the other in ids ``[1, total]``, without padding.
            states: one per block, to continue the streams of an earlier call.
            return_states: also return the states after the last item.

        Returns:
            Hidden states ``[B, L, width]``, or (hidden states, states).

        Raises:
            ValueError: a wrong shape or number of states, a gap between a row's items, cu_seqlens that are no bounds
                of sequences, or gaps that are missing, not wanted or, on a CPU, NaN. TypeError: ids are not int64.
        """
        if ids.dim() != 2 or ids.dtype != torch.int64:
            raise TypeError(f"ids must be int64 [B, L]; given {ids.dtype} {list(ids.shape)}")
        if states is not None and len(states) != len(self.blocks):
            raise ValueError(f"states must hold one entry per block, {len(self.blocks)}; given {len(states)}")
        mask = ids != 0 if cu_seqlens is None else None
        if mask is not None:
            check_mask(mask, *ids.shape)
        if cu_seqlens is not None:
            check_cu_seqlens(cu_seqlens, *ids.shape)
        h = self._embed(ids, gaps)
        new_states = []
        for i, block in enumerate(self.blocks):
            state = None if states is None else states[i]
            h = block(h, mask=mask, cu_seqlens=cu_seqlens, state=state, return_state=return_states, gaps=gaps)
            if return_states:
                h, state = h
                new_states.append(state)
        h = self.norm(h)
        return (h, new_states) if return_states else h

    @torch.no_grad()
    def surprise(self, ids: Tensor, gaps: Tensor | None = None) -> Tensor:
        """How well each history's weights know its items, compared with the initial ones: see ``TTTLayer.surprise``.

        Args:
            ids: histories from their beginning, int64 ``[B, L]``, without padding.
            gaps: of a model with times, as in ``forward``.

        Returns:
            The mean over the blocks ``[B, L]``.

        Raises:
            TypeError: a block's mixer is no ``TTTLayer``.
        """
        h, found = self._embed(ids, gaps), []
        block: Any
        for block in self.blocks:
            if not isinstance(block.mixer, TTTLayer):
                raise TypeError(f"mixer must be ttt, whose weights learn; given {self.config.mixer}")
            found.append(block.surprise(h))
            h = block(h)
        return torch.stack(found).mean(0)

    def _embed(self, ids: Tensor, gaps: Tensor | None) -> Tensor:
        check_times("gaps", gaps, self.config.times, self.event_times is not None, tuple(ids.shape))
        h = self.item_rows(ids)
        if self.event_times is not None and gaps is not None:
            h = self.event_times.read(h, gaps)
        if self.hidden_item is not None:
            h = torch.where((ids == 0).unsqueeze(-1), self.hidden_item, h)
        y: Tensor = self.embedding_norm(self.dropout(h))
        return y

    def item_table(self) -> Tensor:
        """What items are read and scored by, ``[num_items + 1, width]``, row j of item j; row 0 is padding.

        The weights of the embedding, or with features ``FeaturedItems.table`` of them: to be read, not written.
        """
        weight: Tensor = self.embedding.weight
        return weight if self.features is None else self.features.table(weight)

    def served_items(self) -> Tensor:
        """``item_table`` as in evaluation mode, without a graph, and made once while nothing changes.

        Steps of PyTorch's optimizers, ``load_state_dict`` and operations under ``torch.no_grad`` are noticed. Writing
        through ``.data`` or NumPy is not, and leaves the old table.
        """
        weight: Tensor = self.embedding.weight
        return weight if self.features is None else self.features.served(weight)

    def item_rows(self, ids: Tensor) -> Tensor:
        """Rows of ``item_table``, ``[..., width]``, of ids ``[...]``."""
        rows: Tensor
        if self.features is None or not isinstance(self.embedding, nn.Embedding):
            rows = self.embedding(ids)
        else:
            rows = F.embedding(ids, self.item_table())
        return rows

    def one_item_table(self) -> AbstractContextManager[None]:
        """Within it items' features are encoded once: for one forward, its loss and one backward."""
        return nullcontext() if self.features is None else self.features.held()

    def at_request(self, h: Tensor, elapsed: Tensor | None) -> Tensor:
        """Hidden states as they are scored by: of a model with times="query" those for the time of a request.

        Args:
            h: what ``forward`` or ``step`` gives, ``[..., width]``.
            elapsed: the time from the last event to the request ``[...]``, any dtype; below 0 it counts 0. Models
                without that input look at nothing here.

        Raises:
            ValueError: the model has times="query" and elapsed is missing, of another shape or, on a CPU, NaN.
        """
        if self.event_times is None or not self.event_times.query:
            return h
        check_times("elapsed", elapsed, self.config.times, True, tuple(h.shape[:-1]))
        return h if elapsed is None else self.event_times.asked(h, elapsed)

    def predict(
        self,
        ids: Tensor,
        targets: Tensor,
        cu_seqlens: Tensor,
        gaps: Tensor | None = None,
        elapsed: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Hidden states from which targets are to be predicted.

        BERT4Rec predicts hidden items. In training mode they are some of the targets, drawn by torch's global
        generator; in evaluation mode every target is predicted from the at most ``max_len`` items before it, alone.

        Args:
            ids: packed histories, int64 ``[1, total]``.
            targets: the item after each input, int64 ``[total]``; 0 where none is to be predicted. The last input of
                every history has one.
            cu_seqlens: where the histories begin and the last one ends, int64 ``[N + 1]``.
            gaps: of a model with times, as in ``forward``, ``[1, total]``.
            elapsed: of one with times="query", the time from each input to its target ``[total]``; see ``at_request``.

        Returns:
            Hidden states ``[P, width]`` and the items to predict from them, int64 ``[P]``, in the order of targets.
        """
        if self.hidden_item is None:
            scored = targets != 0
            h = self(ids, gaps=gaps, cu_seqlens=cu_seqlens)[0, scored]
            return self.at_request(h, None if elapsed is None else elapsed[scored]), targets[scored]
        if self.training:
            parts = [hide_some(ids, targets, cu_seqlens, self.config.hide_rate)]
        else:
            parts = list(hide_next(ids, targets, cu_seqlens, self.config.max_len))
        hidden = [self(part.ids, cu_seqlens=part.cu_seqlens)[0, part.places] for part in parts]
        return torch.cat(hidden), torch.cat([part.items for part in parts])

    def make_pools(self, num_slots: int) -> list[BlockPool]:
        """A pool of new streams for each block, for ``step``.

        Raises:
            ValueError: a block's mixer is a baseline's.
        """
        return [block.make_pool(num_slots) for block in self.blocks]  # type: ignore[operator]

    def step(self, ids: Tensor, pools: Sequence[BlockPool], slots: Tensor, gaps: Tensor | None = None) -> Tensor:
        """Read one item more of each of B streams, whose states in the pools change in place; see ``TTTLayer.step``.

        Args:
            ids: the streams' next items, int64 ``[B]``, none of them 0.
            pools: made by ``make_pools``.
            slots: the streams' places in the pools, int64 ``[B]``, all different.
            gaps: of a model with times, as in ``forward``, ``[B]``.

        Returns:
            Hidden states ``[B, width]``.

        Raises:
            ValueError: a wrong shape or number of pools, another model's, a slot out of range or given twice, gaps as
                in ``forward``, or, on a CPU, an id of 0. The pools are as before.
            TypeError: ids or slots are not int64.
        """
        y = step_at_once(self, ids, pools, slots, gaps) if type(self) is TTT4Rec else None
        return self._step_by_parts(ids, pools, slots, gaps) if y is None else y

    @torch.no_grad()
    def _step_by_parts(
        self, ids: Tensor, pools: Sequence[BlockPool], slots: Tensor, gaps: Tensor | None = None
    ) -> Tensor:
        if ids.dim() != 1 or ids.dtype != torch.int64:
            raise TypeError(f"ids must be int64 [B]; given {ids.dtype} {list(ids.shape)}")
        if slots.shape != ids.shape:
            raise ValueError(f"slots must have a place for each of {len(ids)} ids; given {list(slots.shape)}")
        if len(pools) != len(self.blocks):
            raise ValueError(f"pools must hold one entry per block, {len(self.blocks)}; given {len(pools)}")
        for block, pool in zip(self.blocks, pools, strict=True):  # all of them, before the first one changes
            foreign = isinstance(block.mixer, TTTLayer) and pool.mixer.layer is not block.mixer
            if foreign or pool.mixer.num_slots != pools[0].mixer.num_slots:
                raise ValueError("pools must come from one make_pools; given one of another model, block or size")
        if ids.is_cpu and has_values(ids) and not bool(ids.all()):
            raise ValueError("ids must be of items, from 1; given a 0, which pads")
        h = self._embed(ids, gaps)
        for block, pool in zip(self.blocks, pools, strict=True):
            h = block.step(h, pool, slots)  # type: ignore[operator]
        y: Tensor = self.norm(h)
        return y

    def scores(self, h: Tensor) -> Tensor:
        """Scores of all items, ``[..., num_items]``, for hidden states ``[..., width]``; column j is item j + 1."""
        return F.linear(h, self.item_table()[1:])

    def nll(self, h: Tensor, items: Tensor, reduction: full_softmax.Reduction = "none") -> Tensor:
        """Negative log-likelihood of items, int64 ``[N]`` from 1, for hidden states ``[N, width]``.

        The softmax runs over all items, in blocks; nothing of size N times num_items is held. What comes back is
        ``[N]``, or with reduction ``"sum"`` or ``"mean"``, which train faster, a scalar. See ``full_softmax.nll``.
        """
        if isinstance(self.embedding, nn.Embedding):
            return full_softmax.nll(h, self.item_table(), items, reduction)
        return full_softmax.reduced(self.embedding.nll(h, items), reduction)  # a table of many processes

    def ranks(self, h: Tensor, items: Tensor, seen: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Ranks ``[N]`` of items among all items, 1 being the best; float64. See ``full_softmax.ranks``."""
        return full_softmax.ranks(h, self.served_items(), items, seen)

    def top_k(
        self, h: Tensor, k: int, seen: tuple[Tensor, Tensor] | None = None, *, index: ItemIndex | None = None
    ) -> tuple[Tensor, Tensor]:
        """Scores and ids ``[N, k]`` of the best items for hidden states ``[N, width]``. See ``full_softmax.top_k``.

        Who asks often while the items stay as they are keeps an ``ItemIndex`` and gives it here, which is faster.
        """
        best = full_softmax.top_k if index is None else index.top_k
        return best(h, self.served_items(), k, seen)

    def with_items(self, num_items: int) -> "TTT4Rec":
        """A copy for a larger catalogue: items 1 to the old number as they are, the others as in a new model.

        Of a model with features the others have none yet, and no id that counts, until ``features.replace`` and
        ``features.learn`` give them some.

        Raises:
            ValueError: fewer items than the model has.
        """
        if num_items < self.config.num_items:
            raise ValueError(f"num_items must be at least the model's {self.config.num_items}; given {num_items}")
        larger = copy.deepcopy(self)
        larger.config = dataclasses.replace(self.config, num_items=num_items)
        old = self.embedding.weight
        larger.embedding = nn.Embedding(
            num_items + 1, self.config.width, padding_idx=0, device=old.device, dtype=old.dtype
        )
        draw(larger.embedding)
        with torch.no_grad():
            larger.embedding.weight[: len(old)] = old
        larger.embedding.weight.requires_grad_(old.requires_grad)
        if larger.features is not None:
            larger.features.replace(larger.features.given().extended(num_items))
        return larger

    def load_release_state_dict(self, state_dict: dict[str, Tensor], block: int = 0) -> None:
        """Load one block's weights from the original ``ttt-lm-pytorch`` Block.

        Raises:
            ValueError: keys or shapes do not fit; nothing is loaded then.
        """
        load_release_block(self.blocks[block], state_dict)

    def load_release_checkpoint(self, state_dict: dict[str, Tensor]) -> None:
        """Load all weights of a recommender that the original TTT4Rec release trained, which RecBole saved.

        Its file is read with ``torch.load(path, weights_only=False)["state_dict"]`` where RecBole is installed:
        besides the weights it holds objects of RecBole's. Items keep the codes that RecBole gave them, so that
        ``num_items`` is the number of rows of its table less one. The row of padding, random there, becomes zero here.

        Raises:
            ValueError: keys or shapes do not fit; nothing is loaded then.
        """
        load_release_model(self, state_dict, len(self.blocks))
        with torch.no_grad():
            self.embedding.weight[0] = 0

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write ``config.json`` and ``model.safetensors``, with checksums (needs the extra ``ttt4rec[recsys]``)."""
        write_together(Path(folder), WEIGHTS_FILE, self.state_dict(), self.descriptions())

    def descriptions(self) -> dict[str, Any]:
        """What is saved with the weights, by the names of files: the configuration and, if it has some, features."""
        own: dict[str, Any] = {CONFIG_FILE: dataclasses.asdict(self.config)}
        return own if self.features is None else own | {FEATURES_FILE: self.features.as_json()}

    @staticmethod
    def load(folder: str | os.PathLike[str], device: str = "cpu") -> "TTT4Rec":
        """Read what ``save`` wrote, in evaluation mode and in the type that it was saved in.

        Weights without a checksum, of an older version or another program, are read with a warning.

        Raises:
            FileNotFoundError: there is no saved model in the folder.
            ValueError: its files are damaged, belong to something else, or are not of one save.
        """
        folder = Path(folder)
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder} holds no saved model: {name} is missing")
        try:
            weights = read_sealed(folder / WEIGHTS_FILE)
            check_together(folder, WEIGHTS_FILE, [CONFIG_FILE])
            settings: Any = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
            features = _saved_features(folder, weights)
            model = TTT4Rec(TTT4RecConfig(**settings), features=features).to(weights["embedding.weight"].dtype)
            model.load_state_dict(weights)
        except (RuntimeError, TypeError, KeyError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"{folder} does not hold a TTT4Rec model that this version can read: {reason}") from error
        return model.to(device).eval()


def _saved_features(folder: Path, weights: dict[str, Tensor]) -> ItemFeatures | None:
    """The features that a model was saved with, if it was; the weights decide, as the file may be of an older save."""
    if "features.known" not in weights:
        return None
    if not (folder / FEATURES_FILE).is_file():
        raise FileNotFoundError(f"{folder} holds no saved model: {FEATURES_FILE} is missing")
    check_together(folder, WEIGHTS_FILE, [FEATURES_FILE])
    return from_saved(json.loads((folder / FEATURES_FILE).read_text(encoding="utf-8")), weights, "features.")
