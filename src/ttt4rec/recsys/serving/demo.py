"""The demo: a page where one takes items and watches the list and the state follow, and what it asks for."""

from __future__ import annotations

import time
from collections.abc import Mapping
from importlib.resources import files

import numpy as np

from ttt4rec.recsys.data import Histories
from ttt4rec.recsys.online import OnlineRecommender
from ttt4rec.recsys.serving.answers import Answer
from ttt4rec.recsys.serving.forms import Clock, Found, Named, Ranked, Read, Searching, Visiting, Visitor

_PAGE = {
    "/": ("page.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}
_HEADERS = (
    (
        b"content-security-policy",
        b"default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
        b"base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    ),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-cache"),
)
"""The page loads nothing from elsewhere, and stands in no other page."""
_LATEST = 100
"""Items of a history that are told."""


class Demo:
    """A page that ``Service`` shows at ``/``.

    What is taken there is logged like every other event.

    Args:
        online: what is served.
        histories: what tells how often items were taken; in a search, those come first that most took.
        titles: names of items by the texts of their ids; an item without one is shown by its id.
        per_second: units of the events' times in a second.
    """

    def __init__(
        self,
        online: OnlineRecommender,
        histories: Histories,
        titles: Mapping[str, str] | None = None,
        per_second: int = 1,
    ) -> None:
        self._online, self._titles, self._per_second = online, titles or {}, per_second
        taken = np.bincount(histories.items, minlength=histories.num_items + 1)[1:]
        self._taken = dict(zip(map(str, histories.item_ids), taken.tolist(), strict=True))
        self._searched = self._listed()

    def page(self) -> dict[str, Answer]:
        """The files of the page, by their paths."""
        folder = files("ttt4rec.recsys.serving") / "page"
        return {
            path: Answer(200, (folder / name).read_bytes(), f"{kind}; charset=utf-8", _HEADERS)
            for path, (name, kind) in _PAGE.items()
        }

    def find(self, body: bytes) -> Answer:
        """Items whose names or ids have all words of a search."""
        form = Searching.model_validate_json(body)
        words = form.text.casefold().split()
        if self._searched[0] is not self._online.item_ids:  # of a model that came by a refresh
            self._searched = self._listed()
        found = [item for item, text in self._searched[1] if all(word in text for word in words)]
        named = [Named(item_id=item, name=self._name(item)) for item in found[: form.k]]
        return Answer(200, Found(items=named, total=len(found)).model_dump_json().encode())

    def visit(self, body: bytes) -> Answer:
        """A visitor's history, state and recommendations."""
        form = Visiting.model_validate_json(body)
        (best,) = self._online.recommend([form.user_id], form.k)
        (moved,) = self._online.moved([form.user_id])
        history = self._online.surprise(form.user_id)
        visitor = Visitor(
            length=len(history),
            history=[
                Read(item_id=item, name=self._name(item), surprise=surprise) for item, surprise in history[-_LATEST:]
            ],
            best=[Ranked(item_id=item, name=self._name(item), score=score) for item, score in best],
            moved=moved,
            clock=Clock(now=time.time(), per_second=self._per_second) if self._online.reads_times else None,
        )
        return Answer(200, visitor.model_dump_json().encode())

    def _listed(self) -> tuple[tuple[str, ...], list[tuple[str, str]]]:
        """Items of the model that serves, and each with the text that a search reads, those first that most took."""
        items = self._online.item_ids
        by_taken = sorted(items, key=lambda item: -self._taken.get(item, 0))
        return items, [(item, f"{self._name(item)} {item}".casefold()) for item in by_taken]

    def _name(self, item: str) -> str:
        return self._titles.get(item) or item
