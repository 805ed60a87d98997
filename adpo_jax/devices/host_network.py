"""Bytes that processes exchange over the network of their hosts, past their devices.

The processes form a ring. Each holds a connection to the next one and one from the process before,
and what it has goes round until all have all of it: every process sends and receives the bytes of
the others once, whatever their sizes.
"""

import contextlib
import hmac
import socket
import struct
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

SECRET_BYTES = 16
_NOBODY = "192.0.2.1"  # kept for documentation: the way there is the default route
_CONNECT_S = 20.0
_HANDSHAKE_S = 5.0  # a stranger that connects and says nothing keeps the ring waiting no longer
_LENGTH = struct.Struct("!Q")
_GREETING = struct.Struct(f"!{SECRET_BYTES}sI")
_WELCOME = b"welcome"


class HostLost(RuntimeError):
    """Another process has stopped, or cannot be reached any more."""


class Address(NamedTuple):
    """Where a process listens."""

    host: str
    port: int


class Listener:
    """A process' end of the ring, before the others are known.

    Args:
      near: an address of the network that connects the hosts, e.g. that of process 0; "" for the
        network of the default route. Nothing is sent there.
    """

    def __init__(self, near: str = ""):
        host = _own_address(near)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._socket = socket.create_server((host, 0), family=family, backlog=8)
        self.address = Address(host, self._socket.getsockname()[1])

    def ring(
        self, addresses: Sequence[Address], rank: int, secret: bytes, timeout_s: float
    ) -> "Ring":
        """Connects to the next process and waits for the one before.

        Args:
          addresses: of all processes, of which this is number `rank`.
          secret: the same on all processes, `SECRET_BYTES` long; a connection without it is closed.
          timeout_s: a host that says nothing for about so long counts as lost.

        Raises:
          OSError: where a process cannot be reached.
        """
        following = (rank + 1) % len(addresses)
        with contextlib.ExitStack() as opened:
            to_next = socket.create_connection(addresses[following], timeout=_CONNECT_S)
            opened.enter_context(to_next)
            to_next.sendall(_GREETING.pack(secret, rank))
            from_last = self._accepted((rank - 1) % len(addresses), secret)
            opened.enter_context(from_last)
            if _received(to_next, len(_WELCOME)) != _WELCOME:
                raise ConnectionError(f"process {following} did not answer as one of this run")
            for connection in (to_next, from_last):
                _keep_alive(connection, timeout_s)
            opened.pop_all()
        return Ring(to_next, from_last, rank, len(addresses))

    def __enter__(self) -> "Listener":
        return self

    def __exit__(self, *_) -> None:
        self._socket.close()

    def _accepted(self, rank: int, secret: bytes) -> socket.socket:
        """The connection of the process with this number."""
        self._socket.settimeout(_CONNECT_S)
        while True:
            connection, _ = self._socket.accept()
            connection.settimeout(_HANDSHAKE_S)
            try:
                said, number = _GREETING.unpack(_received(connection, _GREETING.size))
                if hmac.compare_digest(said, secret) and number == rank:
                    connection.sendall(_WELCOME)
                    return connection
            except OSError:  # a stranger's
                pass
            connection.close()


class Ring:
    """Connections of a process to the one behind it and the one before it."""

    def __init__(self, to_next: socket.socket, from_last: socket.socket, rank: int, size: int):
        self._to_next, self._from_last = to_next, from_last
        self._rank, self._size = rank, size
        self._sender = ThreadPoolExecutor(1, thread_name_prefix="host-network")
        self._is_closed = False
        self.bytes_sent = 0

    def all_gather(self, mine: bytes) -> list[bytes | bytearray]:
        """The bytes of all processes, in their order. All call it equally often, in one order.

        Raises:
          HostLost: when a connection breaks.
        """
        if self._is_closed:
            raise HostLost("the connection to another process broke before")
        blocks: list[bytes | bytearray] = [b""] * self._size
        blocks[self._rank] = mine
        try:
            for step in range(self._size - 1):
                block = blocks[(self._rank - step) % self._size]
                sending = self._sender.submit(self._send, block)
                blocks[(self._rank - step - 1) % self._size] = self._receive()
                sending.result()
        except OSError as error:
            self.close()
            raise HostLost(f"the connection to another process broke: {error}") from error
        return blocks

    def _send(self, block) -> None:
        self._to_next.sendall(_LENGTH.pack(len(block)))
        self._to_next.sendall(block)
        self.bytes_sent += _LENGTH.size + len(block)

    def _receive(self) -> bytearray:
        (length,) = _LENGTH.unpack(_received(self._from_last, _LENGTH.size))
        return _received(self._from_last, length)

    def close(self) -> None:
        """Closes both connections; others that wait for this process are told."""
        self._is_closed = True
        for connection in (self._to_next, self._from_last):
            with contextlib.suppress(OSError):  # the other end has closed it
                connection.shutdown(socket.SHUT_RDWR)  # wakes a thread that sends
            connection.close()
        self._sender.shutdown(wait=False)


def _received(connection: socket.socket, length: int) -> bytearray:
    """So many bytes.

    Raises:
      ConnectionError: when the connection ends before.
    """
    data = bytearray(length)
    rest = memoryview(data)
    while rest:
        count = connection.recv_into(rest)
        if not count:
            raise ConnectionError("it was closed at the other end")
        rest = rest[count:]
    return data


def _own_address(near: str) -> str:
    """This host's address on the network that leads to another one."""
    for target in (near, _NOBODY):
        if not target:
            continue
        try:
            family, *_, to = socket.getaddrinfo(target, 9, type=socket.SOCK_DGRAM)[0]
            with socket.socket(family, socket.SOCK_DGRAM) as probe:
                probe.connect(to)  # of UDP: sends nothing
                host = probe.getsockname()[0]
        except OSError:
            continue
        # Many a host knows itself by a loopback address, which leads no other host to it.
        if _is_loopback(target) or not _is_loopback(host):
            return host
    return "127.0.0.1"


def _is_loopback(host: str) -> bool:
    return host in ("localhost", "::1") or host.startswith("127.")


def _keep_alive(connection: socket.socket, timeout_s: float) -> None:
    """Lets a process wait for the other end as long as its host answers.

    A host that falls silent while it has bytes to take is noticed by JAX's own signs of life.
    """
    connection.settimeout(None)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    probes = 5
    every = max(int(timeout_s / (probes + 1)), 1)
    for name, value in (("TCP_KEEPIDLE", every), ("TCP_KEEPINTVL", every), ("TCP_KEEPCNT", probes)):
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
