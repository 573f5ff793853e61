"""What the service is sent and answers, as pydantic models; ``description`` tells the world of them."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter

from ttt4rec.recsys.online import Batch
from ttt4rec.recsys.serving.limits import MAX_EVENTS, MAX_FOUND, MAX_ID, MAX_K, MAX_USERS

Id = Annotated[str, Field(min_length=1, max_length=MAX_ID)]
ID: TypeAdapter[str] = TypeAdapter(Id)


def _whole(number: Any) -> Any:
    """To JSON, 5.0 is an integer."""
    return int(number) if isinstance(number, float) and number.is_integer() else number


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


Time = Annotated[int, Field(ge=-(2**63), lt=2**63)] | Annotated[float, Field(allow_inf_nan=False)]


class EventIn(_Strict):
    """See ``Event``."""

    user_id: Id
    item_id: Id
    event_id: Id | None = None
    time: Time | None = None


class Events(_Strict):
    """What ``OnlineRecommender.observe`` takes."""

    events: Annotated[list[EventIn], Field(max_length=MAX_EVENTS)]

    def batch(self) -> Batch:
        """In columns."""
        events = self.events
        return Batch(
            [event.user_id for event in events],
            [event.item_id for event in events],
            [event.event_id for event in events],
            [event.time for event in events],
        )


class Recommending(_Strict):
    """What ``OnlineRecommender.recommend`` takes."""

    user_ids: Annotated[list[Id], Field(max_length=MAX_USERS)]
    k: Annotated[int, Field(ge=1, le=MAX_K), BeforeValidator(_whole)] = 10
    exclude_seen: bool = True
    at: Time | None = None


class Searching(_Strict):
    """What the demo's page looks for; no words find everything."""

    text: Annotated[str, Field(max_length=MAX_ID)] = ""
    k: Annotated[int, Field(ge=1, le=MAX_FOUND)] = 30


class Visiting(_Strict):
    """Whose state the demo's page shows, and how long a list. It tells of its own visitors, of nobody else."""

    user_id: Annotated[str, Field(pattern="^visitor-.", max_length=MAX_ID)]
    k: Annotated[int, Field(ge=1, le=MAX_FOUND)] = 30


class Observed(BaseModel):
    """For each event whether it was new."""

    new: list[bool]


class Item(BaseModel):
    """One recommendation."""

    item_id: str
    score: float


class Recommended(BaseModel):
    """For each user the best items."""

    recommendations: list[list[Item]]


class Named(BaseModel):
    """An item as people know it."""

    item_id: str
    name: str


class Read(Named):
    """An item of a history, and how much it surprised."""

    surprise: float


class Ranked(Named):
    """A recommendation with its name."""

    score: float


class Found(BaseModel):
    """Items that were looked for, and how many there are in all."""

    items: list[Named]
    total: int


class Clock(BaseModel):
    """The service's time in seconds, and how many units of events' times a second has."""

    now: float
    per_second: int


class Visitor(BaseModel):
    """Items of a history, the latest last, its length, the best items, and how far the state has moved.

    And of a model that reads times, the clock: the page tells when an event happens.
    """

    history: list[Read]
    length: int
    best: list[Ranked]
    moved: float
    clock: Clock | None


class Health(BaseModel):
    """The service is well."""

    status: str


class Refusal(BaseModel):
    """Why not."""

    detail: str


class Mistake(BaseModel):
    """A place in the request, and what is wrong there."""

    where: list[str | int]
    what: str


class Mistakes(BaseModel):
    """All of them."""

    detail: list[Mistake]
