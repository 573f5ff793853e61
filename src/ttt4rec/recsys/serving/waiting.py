"""Who waits for what: places for requests at work, and groups of requests that are answered together."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

from ttt4rec.recsys.serving.answers import Answer, too_much
from ttt4rec.recsys.serving.limits import GROUP_BYTES

T = TypeVar("T")


@dataclass(frozen=True)
class _Waiting(Generic[T]):
    """A turn, what it is for, and the time when it has been waited for enough."""

    body: bytes
    turn: asyncio.Future[T | None]
    end: float


class Line(Generic[T]):
    """Those who wait, in the order of their coming; whoever has waited enough is told None.

    That a turn never comes costs little, so that who is turned away takes no time from the others.

    Args:
        seconds: enough.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._waiting: deque[_Waiting[T]] = deque()
        self._timer: asyncio.TimerHandle | None = None  # for the first of them

    def join(self, body: bytes = b"") -> asyncio.Future[T | None]:
        """A turn to wait for."""
        loop = asyncio.get_running_loop()
        one: _Waiting[T] = _Waiting(body, loop.create_future(), loop.time() + self._seconds)
        self._waiting.append(one)
        self._timer = self._timer or loop.call_later(self._seconds, self._turn_away)
        return one.turn

    def next(self, most: float = float("inf")) -> _Waiting[T] | None:
        """The first that came, if its body has at most ``most`` bytes; it waits no more."""
        while self._waiting:
            one = self._waiting[0]
            if not one.turn.done() and len(one.body) > most:
                return None
            self._waiting.popleft()
            if not one.turn.done():  # else he is gone
                return one
        return None

    def _turn_away(self) -> None:
        """All who have waited enough."""
        loop, self._timer = asyncio.get_running_loop(), None
        while self._waiting:
            one = self._waiting[0]
            if one.end > loop.time() and not one.turn.done():
                self._timer = loop.call_at(one.end, self._turn_away)
                return
            self._waiting.popleft()
            if not one.turn.done():
                one.turn.set_result(None)


class Places:
    """Places for requests at work; who comes while all are taken waits in line.

    Args:
        free: how many.
        seconds: how long one waits at most.
    """

    def __init__(self, free: int, seconds: float) -> None:
        self._free = free
        self._line: Line[bool] = Line(seconds)

    async def take(self) -> None:
        """RefusedError if none became free."""
        if self._free:
            self._free -= 1
        elif not await self._line.join():
            raise too_much("requests")

    def give_back(self) -> None:
        """To the one who came first."""
        if following := self._line.next():
            following.turn.set_result(True)
        else:
            self._free += 1


class Groups:
    """Requests answered by one thread, which each time takes all that wait: no request waits for more to come.

    Args:
        answer: gives the answers to some bodies; should it raise, all of them get the error.
        seconds: how long one waits for his group to begin.
    """

    def __init__(self, answer: Callable[[Sequence[bytes]], list[Answer]], seconds: float) -> None:
        self._answer = answer
        self._line: Line[Answer] = Line(seconds)
        self._thread = ThreadPoolExecutor(1)
        self._working = False

    async def answer(self, body: bytes) -> Answer:
        """RefusedError if the group did not begin in time."""
        turn = self._line.join(body)
        if not self._working:
            self._working = True
            asyncio.get_running_loop().call_soon(self._begin)  # after what else has come at the same moment
        answer = await turn
        if answer is None:
            raise too_much("requests")
        return answer

    def _begin(self) -> None:
        group = []
        left: float = float("inf")  # the first may have any size
        while one := self._line.next(left):
            group.append(one)
            left = (GROUP_BYTES if len(group) == 1 else left) - len(one.body)
        self._working = bool(group)
        if group:
            loop = asyncio.get_running_loop()
            done = self._thread.submit(self._answer, [one.body for one in group])
            done.add_done_callback(lambda done: loop.call_soon_threadsafe(self._end, group, done))

    def _end(self, group: list[_Waiting[Answer]], done: Future[list[Answer]]) -> None:
        self._begin()  # the next, before the answers of this one are sent
        error = done.exception()
        answers = [None] * len(group) if error else done.result()
        for one, answer in zip(group, answers, strict=True):
            if one.turn.done():  # he is gone
                continue
            if error:
                one.turn.set_exception(error)
            else:
                one.turn.set_result(answer)
