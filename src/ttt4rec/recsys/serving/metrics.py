"""What Prometheus may know."""

from __future__ import annotations

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from ttt4rec.recsys.online import OnlineRecommender
from ttt4rec.recsys.serving.answers import Answer


class Metrics:
    """Counters of one service, and what ``OnlineRecommender.stats`` says."""

    def __init__(self, online: OnlineRecommender) -> None:
        self._registry = CollectorRegistry()
        events = Counter("ttt4rec_events", "Events taken", ["new"], registry=self._registry)
        self._events = {is_new: events.labels(str(is_new).lower()) for is_new in (True, False)}
        self._recommended = Counter("ttt4rec_recommendations", "Users recommended to", registry=self._registry)
        self._seconds = Histogram("ttt4rec_request_seconds", "By route", ["route", "status"], registry=self._registry)
        self._saved = Gauge("ttt4rec_snapshot_timestamp_seconds", "Of the last one", registry=self._registry)
        for name in online.stats():
            gauge = Gauge(f"ttt4rec_{name}", "See OnlineRecommender.stats", registry=self._registry)
            gauge.set_function(lambda name=name: online.stats()[name])  # type: ignore[misc]

    def observed(self, new: list[bool]) -> None:
        """Events were logged, or were there before."""
        for is_new, events in self._events.items():
            events.inc(new.count(is_new))

    def recommended(self, users: int) -> None:
        """To so many."""
        self._recommended.inc(users)

    def answered(self, route: str, status: int, seconds: float) -> None:
        """A request, by its route, not by its path, which anybody may make up."""
        self._seconds.labels(route, status).observe(seconds)

    def saved(self) -> None:
        """A snapshot, just now."""
        self._saved.set_to_current_time()

    def shown(self) -> Answer:
        """As Prometheus reads them."""
        return Answer(200, generate_latest(self._registry), CONTENT_TYPE_LATEST)
