"""Connections that mean no good: half-sent requests, answers that nobody reads, too many at once.

uvicorn's own protocol waits for the head of a request, and for a client that reads, without end.
This one gives up. The bodies of requests have a limit of time of their own, in `app`.
"""

import asyncio
import collections
import dataclasses
import json
from collections.abc import Container

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from adpo_jax.serve.access import client_key, is_loopback
from adpo_jax.serve.fields import ApiError

# Looks at how much a client has read, within the time in which it must read something.
_LOOKS = 4


def _answer(status: str, error: ApiError) -> bytes:
    """A whole response, after which the connection is closed."""
    body = json.dumps(error.body()).encode()
    head = f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nConnection: close\r\n"
    if error.status == 503:
        head += "Retry-After: 1\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


BUSY = _answer(
    "503 Service Unavailable",
    ApiError("there are too many connections; come back later", status=503, kind="server_error"),
)
NO_HTTP = _answer("400 Bad Request", ApiError("this is no HTTP request"))


@dataclasses.dataclass
class Connections:
    """The limits of connections, and how many each client has.

    Attributes:
      most: connections of all clients.
      most_each: connections of one client; a proxy, behind which there are many, may have all.
      head_timeout_s: seconds for a request to begin and for its head to arrive.
      reading_timeout_s: seconds in which a client must read something of what it is sent.
      proxies: addresses of proxies, beside those of this machine.
    """

    most: int
    most_each: int
    head_timeout_s: float = 10.0
    reading_timeout_s: float = 60.0
    proxies: Container[str] = ()
    open: collections.Counter = dataclasses.field(default_factory=collections.Counter)

    def most_of(self, address: str | None) -> int:
        """Connections that a peer may have."""
        is_proxy = address in self.proxies or is_loopback(address)
        return self.most if is_proxy else self.most_each

    def protocol(self, *args, **kwargs) -> "Protocol":
        """A protocol for one connection; `uvicorn.Config(http=...)` takes this method."""
        return Protocol(self, *args, **kwargs)


class Protocol(H11Protocol):
    """HTTP/1.1 of one connection, with limits of time."""

    def __init__(self, connections: Connections, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._limits, self._key = connections, None
        self._head_timer: asyncio.TimerHandle | None = None
        self._reading_timer: asyncio.TimerHandle | None = None
        self._unread, self._read_at = 0, 0.0  # bytes that wait, and when they became fewer

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        address = self.client[0] if self.client else None
        self._key = client_key(address)
        limits, counts = self._limits, self._limits.open
        counts[self._key] += 1
        if counts.total() > limits.most or counts[self._key] > limits.most_of(address):
            transport.write(BUSY)
            transport.close()
            return
        self._watch_head()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._limits.open[self._key] -= 1
        if not self._limits.open[self._key]:
            del self._limits.open[self._key]
        self._head_timer = _stopped(self._head_timer)
        self._reading_timer = _stopped(self._reading_timer)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        super().data_received(data)
        self._watch_head()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self.transport.is_closing() and self.conn.their_state is not h11.IDLE:
            # The client was answered before it had sent the whole of its request.
            self._watch_head()

    def _watch_head(self) -> None:
        """Runs a timer, which no further byte restarts, while no request is being answered."""
        answering = self.cycle is not None and not self.cycle.response_complete
        if answering:
            self._head_timer = _stopped(self._head_timer)
        elif self._head_timer is None:
            seconds = self._limits.head_timeout_s
            self._head_timer = self.loop.call_later(seconds, self.transport.abort)

    def send_400_response(self, msg: str) -> None:
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE, h11.ERROR):
            self.transport.write(NO_HTTP)
        # Else a response has begun, and nothing else can be said.
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True  # its answer would follow this one
            self.cycle.message_event.set()
        self.transport.close()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unread = self.transport.get_write_buffer_size()
        self._read_at = self.loop.time()
        self._look_again()

    def _look_again(self) -> None:
        seconds = self._limits.reading_timeout_s / _LOOKS
        self._reading_timer = self.loop.call_later(seconds, self._check_reading)

    def _check_reading(self) -> None:
        """Lets a client go that has read nothing for as long as it may."""
        unread, now = self.transport.get_write_buffer_size(), self.loop.time()
        if unread < self._unread:
            self._unread, self._read_at = unread, now
        if now - self._read_at >= self._limits.reading_timeout_s:
            self.transport.abort()
        else:
            self._look_again()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._reading_timer = _stopped(self._reading_timer)


def _stopped(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()
