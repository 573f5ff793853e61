"""Users shared out among several services on one event log."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b


def service_of(user_id: str, services: Sequence[str]) -> str:
    """The service that keeps a user's state, by a hash of both.

    Any service on the log answers rightly for any user; one that is asked for the same users again has their states.
    When a service is gone, its users are spread over the others, and everybody else stays where he is.

    Args:
        user_id: who.
        services: names or addresses of those that are alive; their order does not matter.

    Raises:
        ValueError: there are none.
    """
    if not services:
        raise ValueError("services must have at least one name; given none")

    def weight(service: str) -> tuple[bytes, str]:
        key = blake2b(service.encode(), digest_size=32).digest()
        return blake2b(user_id.encode(), key=key, digest_size=8).digest(), service

    return max(services, key=weight)
