"""What a request is answered: results, the client's mistakes, and ours."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from typing import NamedTuple

from pydantic import ValidationError

from ttt4rec.recsys.data import DataError

logger = logging.getLogger(__name__)


class Answer(NamedTuple):
    """Status, body and headers."""

    status: int
    body: bytes = b""
    kind: str = "application/json"
    headers: Sequence[tuple[bytes, bytes]] = ()


class RefusedError(Exception):
    """A request is answered before it gets to work."""

    def __init__(self, status: int, why: str, *headers: tuple[bytes, bytes]) -> None:
        super().__init__(why)
        self.answer = refusal(status, why, *headers)


def refusal(status: int, why: str, *headers: tuple[bytes, bytes]) -> Answer:
    """One sentence."""
    return Answer(status, json.dumps({"detail": why}).encode(), headers=headers)


def too_much(what: str) -> RefusedError:
    """To be sent again."""
    return RefusedError(503, f"too many {what} wait; send it again later", (b"retry-after", b"1"))


def mistaken(*wrong: tuple[Sequence[str | int], str]) -> Answer:
    """Where and what, without what was sent."""
    detail = [{"where": list(where), "what": what} for where, what in wrong[:10]]
    return Answer(422, json.dumps({"detail": detail}).encode())


def answer_to(error: Exception, where: Sequence[str] = ("body",)) -> Answer:
    """What a client is told of an error; nothing of what is nobody's business.

    Args:
        error: of work on a request.
        where: in the request the form stands that was not understood.
    """
    match error:
        case RefusedError():
            return error.answer
        case ValidationError():
            return mistaken(*(([*where, *e["loc"]], e["msg"]) for e in error.errors()))
        case DataError():
            return refusal(409, str(error))
        case OSError():
            logger.error("the event log: %s", error)
            return refusal(503, "the event log is not available")
    logger.error("a request failed", exc_info=error)
    return refusal(500, "the service failed; its log says why")
