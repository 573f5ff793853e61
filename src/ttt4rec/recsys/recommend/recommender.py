"""Recommending: a trained model together with the ids and histories it was trained on."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np
import torch

from ttt4rec.atomic_files import check_together, write_together
from ttt4rec.checks import check_integer
from ttt4rec.models.item_index import ItemIndex
from ttt4rec.models.ttt4rec import CONFIG_FILE, WEIGHTS_FILE, TTT4Rec
from ttt4rec.recsys.data import DataError, Histories, Id, IntArray
from ttt4rec.recsys.data.feature_table import FeatureTable, read_item_features
from ttt4rec.recsys.recommend.candidates import Chooser, Rerank, Scores, Wanted
from ttt4rec.recsys.recommend.folder import HISTORIES_FILE, IDS_FILE, as_files, is_consistent, read_histories
from ttt4rec.recsys.recommend.histories import History, as_times, find, hidden_after, history_of
from ttt4rec.recsys.recommend.new_items import feature_names, with_new_items

_HISTORIES_AT_ONCE = 512


@dataclass(frozen=True)
class Recommendations:
    """What to offer a user.

    Attributes:
        items: original item ids and scores, best first; equal scores in the order of the catalogue. A model's score is
            a logit: the probability that the item comes next is in proportion to its exponential, by the model and for
            this user, so that scores of two users are not to be compared. What is popular has the number of
            interactions for a score. None for a history without any known item, unless what is popular was asked for.
        unknown: ids of the given history that the catalogue does not know; they were left out.
        source: ``"model"``, or ``"popular"`` for what anybody would be offered.
    """

    items: list[tuple[Id, float]]
    unknown: tuple[Id, ...] = ()
    source: Literal["model", "popular"] = "model"


@dataclass(frozen=True)
class Recommender:
    """A trained model, and the histories that give its items and users their names.

    Raises:
        ValueError: the model was made for another number of items.
    """

    model: TTT4Rec
    histories: Histories
    _index: ItemIndex = field(default_factory=ItemIndex, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Check that the two belong together."""
        if self.model.config.num_items != self.histories.num_items:
            raise ValueError(
                f"the model knows {self.model.config.num_items} items and the histories {self.histories.num_items}; "
                "they must come from the same data"
            )

    @overload
    def recommend(
        self,
        user_id: Id | None = ...,
        history: Sequence[Id] | None = ...,
        *,
        users: None = ...,
        k: int = ...,
        exclude_seen: bool = ...,
        allow: Collection[Id] | None = ...,
        deny: Collection[Id] = ...,
        min_score: float | None = ...,
        popular: bool = ...,
        rerank: Rerank | None = ...,
        times: Sequence[float] | None = ...,
        at: float | None = ...,
    ) -> Recommendations: ...

    @overload
    def recommend(
        self,
        user_id: None = ...,
        history: None = ...,
        *,
        users: Sequence[Id],
        k: int = ...,
        exclude_seen: bool = ...,
        allow: Collection[Id] | None = ...,
        deny: Collection[Id] = ...,
        min_score: float | None = ...,
        popular: bool = ...,
        rerank: Rerank | None = ...,
        times: None = ...,
        at: float | None = ...,
    ) -> list[Recommendations]: ...

    def recommend(
        self,
        user_id: Id | None = None,
        history: Sequence[Id] | None = None,
        *,
        users: Sequence[Id] | None = None,
        k: int = 10,
        exclude_seen: bool = True,
        allow: Collection[Id] | None = None,
        deny: Collection[Id] = (),
        min_score: float | None = None,
        popular: bool = False,
        rerank: Rerank | None = None,
        times: Sequence[float] | None = None,
        at: float | None = None,
    ) -> Recommendations | list[Recommendations]:
        """The k best items for a known user, for anybody with a history of known items, or for each of many users.

        Args:
            user_id: a user of the data.
            history: original item ids, oldest first; the last ``max_len`` known ones are read.
            users: several users; one without history, or unknown to the data, gets no items.
            k: how many; fewer come back when fewer are left.
            exclude_seen: leave out every item of the history.
            allow: offer nothing but these items, such as what is in stock; ids that the model does not know are passed
                over.
            deny: offer none of these.
            min_score: offer nothing of a lower score.
            popular: offer who has no history with a known item, or is unknown, what is popular of late: see
                ``popular_items``. These are marked, and min_score does not apply to them.
            rerank: chooses k of five times as many candidates, such as ``rerank.MaximalMarginalRelevance``.
            times: when the events of the history happened, in the unit of the data's times; a model with times needs
                them. Of users the data has them.
            at: the time of the request, for a model with ``times="query"``; others recommend the same at all times.
                None: the time of the last event. What is earlier counts as that time too.

        Raises:
            ValueError: not exactly one of user_id, history and users is given, k is below 1, no item is allowed, or the
                model's scores are NaN. Also, unless what is popular is asked for: the user is unknown, or the history
                holds no known item. DataError: times are missing, not one for each item, or no finite numbers.
        """
        given = [name for name, x in (("user_id", user_id), ("history", history), ("users", users)) if x is not None]
        if len(given) != 1:
            raise ValueError(
                "either a user id, a history or users must be given; given "
                + (" and ".join(given) if given else "none of them")
            )
        wanted = Wanted(k, exclude_seen, allow, deny, min_score, popular, rerank)
        if times is not None and history is None:
            raise DataError("times must come with the history that they are of; given times alone")
        if at is not None:
            at = float(as_times("at", at, dims=0))
        if users is not None:
            if isinstance(users, str):
                raise DataError(f"users must be a sequence of user ids; given the string {users!r}")
            return self._best([history_of(self.histories, user, at) for user in users], wanted)
        if user_id is None:
            found = find(self.histories, history, times, at)
        else:
            found = history_of(self.histories, user_id, at)
        if not len(found.codes) and not popular:
            advice = "; offer what is popular of late by popular=True (--popular)"
            if user_id is None:
                raise DataError(f"history must have at least one known item; given {list(history or ())[:5]}{advice}")
            try:
                self.histories.user_code(user_id)
            except DataError as error:
                raise DataError(f"{error}{advice}, or give a history (--history)") from None
            raise DataError(
                f"the history of user {user_id!r} must have at least one item to go on from; given none{advice}"
            )
        return self._best([found], wanted)[0]

    def recommend_batch(
        self,
        histories: Sequence[Sequence[Id]],
        *,
        k: int = 10,
        exclude_seen: bool = True,
        allow: Collection[Id] | None = None,
        deny: Collection[Id] = (),
        min_score: float | None = None,
        popular: bool = False,
        rerank: Rerank | None = None,
        times: Sequence[Sequence[float]] | None = None,
        at: float | None = None,
    ) -> list[Recommendations]:
        """The k best items for each of several histories of original item ids, in their order; see ``recommend``.

        A history without any known item gets no items, or what is popular.

        Raises:
            ValueError: a history is a string, k is below 1, no item is allowed, or the model's scores are NaN.
                DataError: times as of ``recommend``.
        """
        wanted = Wanted(k, exclude_seen, allow, deny, min_score, popular, rerank)
        if times is not None and len(times) != len(histories):
            raise DataError(f"times must be given for each of {len(histories)} histories; given {len(times)}")
        if at is not None:
            at = float(as_times("at", at, dims=0))
        of_each = [None] * len(histories) if times is None else times
        found = [find(self.histories, items, own, at) for items, own in zip(histories, of_each, strict=True)]
        return self._best(found, wanted)

    def similar_items(self, item_id: Id, *, k: int = 10) -> list[tuple[Id, float]]:
        """The k items whose embeddings are most like an item's, and the cosines, most alike first.

        They come next after the same histories: they are alike in use, not in content.

        Raises:
            ValueError: the model does not know the item, or k is below 1.
        """
        check_integer("k", k)
        codes, _ = self.histories.item_codes([item_id])
        if not len(codes):
            raise DataError(f"item_id must be one of the data's {self.histories.num_items} items; given {item_id!r}")
        table = torch.nn.functional.normalize(self.model.served_items().detach().float(), dim=1)
        code = int(codes[0])
        likeness = table[1:] @ table[code]
        likeness[code - 1] = -torch.inf
        order = torch.argsort(likeness, descending=True, stable=True)[: min(k, len(likeness) - 1)].tolist()
        return [(self.histories.item_ids[place], float(likeness[place])) for place in order]

    def add_items(self, source: object, **options: Any) -> Recommender:
        """A recommender that offers items too that training never saw, by what their features say; nothing is trained.

        Items that the model knows keep their rows and all their scores. ``OnlineRecommender.refresh`` takes
        the new one's model and item ids.

        Args:
            source: a table of features with the columns that the model was trained with, or what ``read_item_features``
                reads.
            options: for ``read_item_features``; other columns than the model's are not read.

        Raises:
            ValueError: the model was trained without features. DataError: the source cannot be read, a column is
                missing or of another kind than in training, or a new item has no value that training saw.
        """
        options = {"columns": feature_names(self.model)} | options
        table = source if isinstance(source, FeatureTable) else read_item_features(source, **options)
        return Recommender(*with_new_items(self.model, self.histories, table))

    def popular_items(self, k: int = 10, *, window: float = 0.1) -> list[tuple[Id, int]]:
        """The k items with most interactions of late, and how many; equal ones in the order of the catalogue.

        Args:
            k: how many; fewer come back when fewer items have been taken of late.
            window: the share of all interactions that is of late, the latest ones; others of the same time count too.

        Raises:
            ValueError: k is below 1, or window not above 0 and at most 1.
        """
        check_integer("k", k)
        codes, counts = self._popular(window)
        return [(self.histories.item_ids[c - 1], n) for c, n in zip(codes[:k].tolist(), counts.tolist(), strict=False)]

    def _popular(self, window: float = 0.1) -> tuple[IntArray, IntArray]:
        """Codes of the items of late, those with most interactions first, and how many each has."""
        if not 0 < window <= 1:
            raise ValueError(f"window must be above 0 and at most 1; given {window!r}")
        times = self.histories.times
        if not len(times):
            return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
        first = np.partition(times, len(times) - max(1, round(window * len(times))))
        late = times >= first[len(times) - max(1, round(window * len(times)))]
        counts = np.bincount(self.histories.items[late], minlength=self.histories.num_items + 1)
        order = np.argsort(-counts, kind="stable")
        order = order[counts[order] > 0]
        return order, counts[order]

    def _best(self, found: Sequence[History], wanted: Wanted) -> list[Recommendations]:
        """Recommendations for histories, each with the unknown ids that stood among its items."""
        results = self.best_codes([history for history in found if len(history.codes)], wanted)
        fallback = Recommendations([])
        if wanted.popular and any(not len(history.codes) for history in found):
            best = wanted.first_of(*self._popular(), self.histories)
            fallback = Recommendations(self._named(*best), (), "popular")
        return [
            Recommendations(self._named(*next(results)), history.unknown)
            if len(history.codes)
            else Recommendations(fallback.items, history.unknown, fallback.source)
            for history in found
        ]

    def best_codes(self, histories: Sequence[History], wanted: Wanted) -> Iterator[tuple[IntArray, Scores]]:
        """Item codes and scores, best first, for each of several histories, of which none is empty.

        Raises:
            ValueError: no item is allowed, the model's scores are NaN, or times are missing that it reads.
        """
        chooser = Chooser(self.model, self._index, self.histories, wanted)
        for start in range(0, len(histories), _HISTORIES_AT_ONCE):
            part = histories[start : start + _HISTORIES_AT_ONCE]
            yield from chooser.best(hidden_after(self.model, part), [history.codes for history in part])

    def _named(self, codes: IntArray, scores: Scores) -> list[tuple[Id, float]]:
        ids = self.histories.item_ids
        return [(ids[code - 1], score) for code, score in zip(codes.tolist(), scores.tolist(), strict=True)]

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the model, ``ids.json`` and ``histories.safetensors``.

        A full disk leaves the folder as it was. A kill while the files take their places may leave some of an older
        save, which ``load`` refuses.
        """
        files = self.model.descriptions() | as_files(self.histories)
        write_together(Path(folder), WEIGHTS_FILE, self.model.state_dict(), files)

    @staticmethod
    def load(folder: str | os.PathLike[str], device: str = "cpu") -> Recommender:
        """Read what ``save`` wrote.

        Raises:
            FileNotFoundError: the folder holds no saved recommender.
            ValueError: its files are damaged or do not belong together.
        """
        folder = Path(folder)
        for name in (CONFIG_FILE, WEIGHTS_FILE, IDS_FILE, HISTORIES_FILE):
            if not (folder / name).is_file():
                given = "is missing" if folder.is_dir() else "is missing, as is the folder"
                advice = "; Recommender(model, histories).save(folder) writes it" if folder.is_dir() else ""
                raise FileNotFoundError(f"{folder} holds no saved recommender: {name} {given}{advice}")
        model = TTT4Rec.load(folder, device)
        check_together(folder, WEIGHTS_FILE, [IDS_FILE, HISTORIES_FILE])
        histories = read_histories(folder)
        consistent = is_consistent(histories)
        recommender = Recommender(model, histories)
        if not consistent:
            raise ValueError(f"{folder / HISTORIES_FILE} and {IDS_FILE} do not belong together")
        return recommender
