"""Events in, recommendations out: logs of events, the states of users, snapshots."""

from ttt4rec.recsys.online.events import Event, EventLog, SQLiteEventLog, events_of
from ttt4rec.recsys.online.recommender import OnlineRecommender

__all__ = ["Event", "EventLog", "OnlineRecommender", "SQLiteEventLog", "events_of"]
