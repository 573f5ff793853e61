"""Connections that do not keep the service waiting."""

from __future__ import annotations

import asyncio
from typing import ClassVar

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from ttt4rec.recsys.serving.limits import (
    MAX_CONNECTIONS,
    MAX_HEADER_BYTES,
    PATIENCE_SECONDS,
    SECOND_LOOK_SECONDS,
)


class Connection(HttpToolsProtocol):
    """uvicorn's, which is cut off if the client keeps it waiting, or has done so for the longest of too many.

    A client does so until a whole header has come, and while it does not read its answer.
    """

    idle: ClassVar[dict[Connection, asyncio.TimerHandle]] = {}
    """Those who keep it waiting, the longest first."""
    header_bytes = 0  # that have come of a header that is not whole

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client has come."""
        super().connection_made(transport)
        self.begin_to_wait()
        if len(self.connections) > MAX_CONNECTIONS:
            longest = next(iter(self.idle))
            longest.end_to_wait()  # at once: of several that come together, each has another one cut off
            longest.transport.abort()

    def begin_to_wait(self) -> None:
        """The client has something to do from now on."""
        self.end_to_wait()
        self.idle[self] = self.loop.call_later(PATIENCE_SECONDS, self.look_again)

    def look_again(self) -> None:
        """Cut it off, unless something comes of it now: the whole machine may have slept."""
        self.idle[self] = self.loop.call_later(SECOND_LOOK_SECONDS, self.transport.abort)

    def timeout_keep_alive_handler(self) -> None:
        """Leave it: uvicorn would cut off one that is idle, but does not look again."""

    def end_to_wait(self) -> None:
        """The client has done it."""
        if self in self.idle:
            self.idle.pop(self).cancel()

    def end_if_at_work(self) -> None:
        """Nothing is the client's to do while its request is worked on and its answer is taken."""
        if self.cycle is not None and not self.cycle.response_complete and not self.flow.write_paused:
            self.end_to_wait()

    def data_received(self, data: bytes) -> None:
        """Some of a request."""
        super().data_received(data)
        if self.header_bytes:
            self.header_bytes += len(data)
            if self.header_bytes > MAX_HEADER_BYTES and not self.transport.is_closing():
                self.send_400_response(f"A header must have at most {MAX_HEADER_BYTES} bytes.")

    def on_message_begin(self) -> None:
        """A header begins."""
        super().on_message_begin()
        self.header_bytes = 1

    def on_headers_complete(self) -> None:
        """A header is there as a whole."""
        self.header_bytes = 0
        super().on_headers_complete()
        self.end_if_at_work()

    def pause_writing(self) -> None:
        """The client does not read."""
        super().pause_writing()
        self.begin_to_wait()

    def resume_writing(self) -> None:
        """It has read."""
        super().resume_writing()
        self.end_if_at_work()

    def on_response_complete(self) -> None:
        """The answer is on its way, and another may be worked on already."""
        if not self.transport.is_closing():
            self.begin_to_wait()
        super().on_response_complete()
        self.end_if_at_work()

    def connection_lost(self, exc: Exception | None) -> None:
        """The client is gone."""
        self.end_to_wait()
        super().connection_lost(exc)
