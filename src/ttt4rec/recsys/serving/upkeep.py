"""What is done besides requests: states are saved and the event log is checked now and then."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from ttt4rec.recsys.online import OnlineRecommender
from ttt4rec.recsys.online.events import CheckedEventLog
from ttt4rec.recsys.serving.limits import CHECK_SECONDS, SNAPSHOT_SECONDS

logger = logging.getLogger(__name__)


class Upkeep:
    """Threads that keep a recommender in order from ``begin`` to ``end``.

    Args:
        online: its log is checked if it is a ``CheckedEventLog``.
        saved: called after every snapshot.
    """

    def __init__(self, online: OnlineRecommender, saved: Callable[[], None]) -> None:
        self._online, self._saved = online, saved
        self._ending = threading.Event()
        self._threads: list[threading.Thread] = []

    def begin(self) -> None:
        """Start."""
        self._ending.clear()
        works = self._save_now_and_then, self._check_now_and_then
        self._threads = [threading.Thread(target=work) for work in works]
        for thread in self._threads:
            thread.start()

    def end(self) -> None:
        """Stop, and save the states a last time."""
        self._ending.set()
        for thread in self._threads:
            thread.join()
        self._save()

    def _save_now_and_then(self) -> None:
        while not self._ending.wait(SNAPSHOT_SECONDS):
            self._save()

    def _check_now_and_then(self) -> None:
        log = self._online.log
        while isinstance(log, CheckedEventLog) and not self._ending.wait(CHECK_SECONDS):
            try:
                log.check(self._ending.is_set)
            except OSError as error:  # /health tells it from now on
                logger.error("%s", error)

    def _save(self) -> None:
        try:
            logger.info("snapshot of %d users", self._online.save_snapshot())
            self._saved()
        except Exception:  # whatever it is, the next one may succeed
            logger.exception("no snapshot, the old one stays")
