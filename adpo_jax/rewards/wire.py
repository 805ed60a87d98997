"""Messages between the run and its workers: a length, then a pickle or JSON.

Workers are sent pickles, for a column may hold anything; they answer in JSON, so that nothing a
worker says can make the run load code.
"""

import json
import pickle
import socket
import struct
import time

_LENGTH = struct.Struct("!Q")
_MAX_REPLY = 1 << 26


class Closed(ConnectionError):
    """The other side is gone."""


def send_pickle(connection: socket.socket, message: object, timeout_s: float | None = None) -> None:
    _send(connection, pickle.dumps(message, pickle.HIGHEST_PROTOCOL), timeout_s)


def send_json(connection: socket.socket, message: object) -> None:
    _send(connection, json.dumps(message).encode(), None)


def receive_pickle(connection: socket.socket) -> object:
    return pickle.loads(_receive(connection, None))


def receive_json(connection: socket.socket, timeout_s: float) -> dict:
    """Raises TimeoutError when the whole message has not come within the time."""
    return json.loads(_receive(connection, time.monotonic() + timeout_s))


def _send(connection: socket.socket, data: bytes, timeout_s: float | None) -> None:
    connection.settimeout(timeout_s)
    connection.sendall(_LENGTH.pack(len(data)) + data)


def _receive(connection: socket.socket, deadline: float | None) -> bytes:
    (length,) = _LENGTH.unpack(_read(connection, _LENGTH.size, deadline))
    if deadline is not None and length > _MAX_REPLY:
        raise Closed("a reply too long to be one")
    return _read(connection, length, deadline)


def _read(connection: socket.socket, count: int, deadline: float | None) -> bytes:
    data = bytearray()
    while len(data) < count:
        left = None if deadline is None else deadline - time.monotonic()
        if left is not None and left <= 0:
            raise TimeoutError
        connection.settimeout(left)
        piece = connection.recv(min(count - len(data), 1 << 20))
        if not piece:
            raise Closed
        data += piece
    return bytes(data)
