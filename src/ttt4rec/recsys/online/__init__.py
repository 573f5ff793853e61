"""Events in, recommendations out: logs of events, the states of users, snapshots."""

from ttt4rec.recsys.online.events import Event, EventLog, SQLiteEventLog, events_of
from ttt4rec.recsys.online.recommender import Batch, OnlineRecommender

__all__ = ["Batch", "Event", "EventLog", "OnlineRecommender", "SQLiteEventLog", "events_of"]
