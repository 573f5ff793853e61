"""Interactions, filtered to a k-core and grouped into per-user histories."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from ttt4rec.checks import check_integer
from ttt4rec.recsys.data.ids import Id, all_as_kind, as_kind, kind_of
from ttt4rec.recsys.data.text import DataError

IntArray: TypeAlias = NDArray[np.int64]
TimeArray: TypeAlias = NDArray[np.int64] | NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Interactions:
    """Who took what when, one row an interaction, in file order.

    Attributes:
        users: int64 [n], 0-based codes into ``user_ids``.
        items: int64 [n], 0-based codes into ``item_ids``.
        times: int64 or float64 [n]: numbers as in the data, or seconds since 1970 of its dates.
        user_ids: original id of every user code: texts, whole numbers or UUIDs, all of one type.
        item_ids: original id of every item code.
    """

    users: IntArray
    items: IntArray
    times: TimeArray
    user_ids: tuple[Id, ...]
    item_ids: tuple[Id, ...]

    def __len__(self) -> int:
        return len(self.users)

    def __repr__(self) -> str:
        arrays = (self.users, self.items, self.times)
        counts = f"{len(self):,} of {len(self.user_ids):,} users with {len(self.item_ids):,} items"
        return f"Interactions({counts}, times {self.times.dtype}, {sum(x.nbytes for x in arrays):,} bytes)"

    def take(self, rows: IntArray) -> Interactions:
        """Some of the rows, with codes closed up in their old order."""
        users, user_ids = _close_up(self.users[rows], self.user_ids)
        items, item_ids = _close_up(self.items[rows], self.item_ids)
        return Interactions(users, items, self.times[rows], user_ids, item_ids)


@dataclass(frozen=True, eq=False)
class Histories:
    """Every user's items in time order, all users in one flat array.

    Attributes:
        items: int64 [n], item codes 1..num_items; 0 is left for padding.
        offsets: int64 [num_users + 1]; user u owns the slice offsets[u]:offsets[u + 1].
        times: int64 or float64 [n], never decreasing within a user.
        user_ids: original id of every user code 0..num_users - 1.
        item_ids: ``item_ids[j]`` is the original id of item code j + 1.
    """

    items: IntArray
    offsets: IntArray
    times: TimeArray
    user_ids: tuple[Id, ...]
    item_ids: tuple[Id, ...]

    def __repr__(self) -> str:
        arrays = (self.items, self.offsets, self.times)
        counts = f"{self.num_users:,} users, {self.num_items:,} items, {len(self.items):,} interactions"
        return f"Histories({counts}, times {self.times.dtype}, {sum(x.nbytes for x in arrays):,} bytes)"

    @property
    def num_users(self) -> int:
        """Number of users."""
        return len(self.user_ids)

    @property
    def num_items(self) -> int:
        """Number of items, padding not counted."""
        return len(self.item_ids)

    def history(self, user_code: int) -> IntArray:
        """Item codes of one user, oldest first, int64 [length]; IndexError for a code that does not exist."""
        if not 0 <= user_code < self.num_users:
            raise IndexError(f"user_code must be from 0 to {self.num_users - 1}; given {user_code}")
        return self.items[self.offsets[user_code] : self.offsets[user_code + 1]]

    def first_places(self) -> IntArray:
        """Where a user has an item for the first time: indices into items, int64."""
        users = np.repeat(np.arange(self.num_users), np.diff(self.offsets))
        places: IntArray = np.unique(users * (self.num_items + 1) + self.items, return_index=True)[1]
        return places

    def user_code(self, user_id: Id) -> int:
        """Code of an original user id; DataError when the data has no user of that id.

        A text finds the number or UUID that is written so, and a number or UUID the text.
        """
        code = self.find_user(user_id)
        if code is None:
            raise DataError(f"user_id must be one of the data's {self.num_users} users; given {user_id!r}")
        return code

    def find_user(self, user_id: Id) -> int | None:
        """Code of an original user id, as ``user_code`` finds it; None when the data does not have it."""
        return _code(self._user_codes, user_id, kind_of(self.user_ids))

    def item_codes(self, item_ids: Sequence[Id]) -> tuple[IntArray, tuple[Id, ...]]:
        """Codes (int64, 1-based, in the order given) of the known ids, and the ids that are unknown.

        Ids of another type are found as by ``user_code``.
        """
        kind = kind_of(self.item_ids)
        found = [(item, _code(self._item_codes, item, kind)) for item in item_ids]
        codes = [code for _, code in found if code is not None]
        return np.array(codes, dtype=np.int64), tuple(item for item, code in found if code is None)

    @cached_property
    def _user_codes(self) -> dict[Id, int]:
        return {user: code for code, user in enumerate(self.user_ids)}

    @cached_property
    def _item_codes(self) -> dict[Id, int]:
        return {item: code for code, item in enumerate(self.item_ids, start=1)}


def _code(codes: dict[Id, int], value: Id, kind: type[Id]) -> int | None:
    """The code of an id, or else of the one of the data's type that is written alike."""
    code = codes.get(value)
    if code is None and not isinstance(value, kind) and (other := as_kind(value, kind)) is not None:
        code = codes.get(other)
    return code


def filter_k_core(interactions: Interactions, *, min_user: int, min_item: int) -> Interactions:
    """Drop users with fewer than ``min_user`` interactions and items with fewer than ``min_item``.

    Repeated until every remaining user and item has enough. Codes are closed up, keeping their order, and the
    interactions keep theirs.

    Raises:
        ValueError: a minimum is not a whole number of at least 0, or (DataError) nothing is left.
    """
    kept = k_core_rows(interactions.users, interactions.items, min_user=min_user, min_item=min_item)
    if not len(kept):
        raise DataError(
            f"there must be users with >= {min_user} and items with >= {min_item} interactions among themselves; "
            f"given none of {len(interactions)} interactions that are left after that filter; lower the bounds"
        )
    return interactions.take(kept)


def k_core_rows(users: IntArray, items: IntArray, *, min_user: int, min_item: int) -> IntArray:
    """Which rows ``filter_k_core`` keeps, int64, ascending; ValueError for a negative minimum."""
    check_integer("min_user", min_user, least=0)
    check_integer("min_item", min_item, least=0)
    kept = np.arange(len(users))
    while True:
        enough_user = np.bincount(users[kept], minlength=1) >= min_user
        enough_item = np.bincount(items[kept], minlength=1) >= min_item
        still = kept[enough_user[users[kept]] & enough_item[items[kept]]]
        if len(still) == len(kept):
            return kept
        kept = still


def _close_up(codes: IntArray, ids: tuple[Id, ...]) -> tuple[IntArray, tuple[Id, ...]]:
    """Codes without gaps, and the ids of those that occur."""
    occurs = np.bincount(codes, minlength=len(ids)) > 0
    return (np.cumsum(occurs) - 1)[codes], tuple(ids[code] for code in np.flatnonzero(occurs))


def build_histories(interactions: Interactions) -> Histories:
    """Group interactions by user, oldest first; equal times keep the order of the file."""
    order = np.lexsort((interactions.times, interactions.users))
    lengths = np.bincount(interactions.users, minlength=len(interactions.user_ids))
    return Histories(
        interactions.items[order] + 1,
        np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths, dtype=np.int64)]),
        interactions.times[order],
        interactions.user_ids,
        interactions.item_ids,
    )


def keep_item_codes(histories: Histories, item_ids: Sequence[Id]) -> Histories:
    """The histories with items coded as an earlier model knows them: its ids first, then those that are new.

    Ids of another type than the model's become ids of its type that are written alike; DataError if there are none.
    """
    own = all_as_kind(histories.item_ids, kind_of(item_ids)) if item_ids else histories.item_ids
    codes = {item: code for code, item in enumerate(dict.fromkeys((*item_ids, *own)), start=1)}
    lookup = np.array([0, *(codes[item] for item in own)], dtype=np.int64)
    return dataclasses.replace(histories, items=lookup[histories.items], item_ids=tuple(codes))
