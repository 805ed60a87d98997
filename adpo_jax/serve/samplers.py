"""The HTTP by which samplers in other processes work for a trainer.

    POST /sampler/hello         what a sampler is: {"name", "fits"}; 409 where it fits another run
    POST /sampler/order         {"name", "run", "holds", "room", "version"} -> what to do next
    POST /sampler/alive         {"name", "run"}: a sign of life
    POST /sampler/groups        whole groups as arrays (`rollouts.wire`)
    GET  /sampler/weights/{v}   the manifest of version v of the weights (`rollouts.weights`), its
                                digest as ETag
    POST /sampler/tensors/{v}   {"names"} -> the bytes of these tensors, one after the other

Everybody needs the run's key. A run's name is another one each time that the trainer starts, and
whoever works for an earlier start is told so (410).
"""

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import uvicorn
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from adpo_jax.serve.access import bears
from adpo_jax.serve.connections import Connections
from adpo_jax.serve.fields import ApiError, parse_object
from adpo_jax.serve.hosting import KEEP_ALIVE_S, listening

MAX_JSON_BYTES = 4 << 20
# Questions for orders that wait at once; each keeps a thread.
MAX_SAMPLERS = 256
# Threads for everything else, which waits for nobody.
_THREADS = 16
# A sampler has two connections, and all of them may come through one address.
_CONNECTIONS, _CONNECTIONS_EACH = 2 * MAX_SAMPLERS + 64, 2 * MAX_SAMPLERS
_HEAD_S = 10.0
_BODY_S = _READING_S = 120.0
# Bytes of tensors that are sent at a time.
_PART = 1 << 20


class Refused(Exception):
    """A request that is answered with a status and a sentence."""

    def __init__(self, message: str, status: int = 400):
        super().__init__(message)
        self.status = status


class Desk(Protocol):
    """What the trainer does for samplers; its methods are called from threads."""

    def hello(self, fits: dict[str, Any]) -> dict[str, Any]:
        """What a sampler needs to know; raises `Refused` for one of another run."""

    def order(self, asked: dict[str, Any]) -> dict[str, Any]:
        """What a sampler is to do next; it may wait for it, in a thread of its own."""

    def alive(self, asked: dict[str, Any]) -> dict[str, Any]:
        """Takes note that a sampler lives."""

    def deliver(self, name: str, run: str, content: bytes) -> dict[str, Any]:
        """Takes groups."""

    def weights(self, version: int) -> tuple[bytes, str]:
        """The manifest of a version of the weights and its digest.

        Raises `Refused` where the version is not there any more, as `tensors` does.
        """

    def tensors(self, version: int, names: list[str]) -> list[memoryview]:
        """The bytes of tensors of a version."""


class SamplersHost:
    """A server for samplers, in a thread of its own.

    Args:
      host, port: where it listens; port 0 for any that is free.
      key: what samplers must send as `Authorization: Bearer ...`.
      max_group_bytes: the most bytes of a group.

    Attributes:
      address: "host:port".

    Raises:
      ValueError: for an address at which this machine cannot listen.
    """

    def __init__(
        self, desk: Desk, *, host: str, port: int, key: str, max_group_bytes: int = 512 << 20
    ):
        self._desk, self._key, self._max_group_bytes = desk, key, max_group_bytes
        self._threads = ThreadPoolExecutor(_THREADS, "samplers")
        self._waiting = ThreadPoolExecutor(MAX_SAMPLERS, "orders")
        self._num_waiting = 0  # counted on the loop alone
        self._socket, self.address = listening(host, port, "--listen")
        routes = [
            Route("/sampler/hello", self._guarded(self._hello), methods=["POST"]),
            Route("/sampler/order", self._guarded(self._order), methods=["POST"]),
            Route("/sampler/alive", self._guarded(self._alive), methods=["POST"]),
            Route("/sampler/groups", self._guarded(self._groups), methods=["POST"]),
            Route("/sampler/weights/{version:int}", self._guarded(self._weights)),
            Route("/sampler/tensors/{version:int}", self._guarded(self._tensors), methods=["POST"]),
        ]
        connections = Connections(
            _CONNECTIONS,
            _CONNECTIONS_EACH,
            head_timeout_s=_HEAD_S,
            reading_timeout_s=_READING_S,
        )
        config = uvicorn.Config(
            Starlette(routes=routes),
            http=connections.protocol,
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=3,
            timeout_keep_alive=KEEP_ALIVE_S,
            ws="none",
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(
            target=self._server.run, args=([self._socket],), name="samplers", daemon=True
        )

    def start(self) -> None:
        """Begins to answer."""
        self._thread.start()

    def close(self) -> None:
        """Ends the server."""
        self._server.should_exit = True
        if self._thread.is_alive():
            self._thread.join()
        with contextlib.suppress(OSError):
            self._socket.close()
        for threads in (self._threads, self._waiting):
            threads.shutdown(wait=False, cancel_futures=True)

    def _guarded(self, endpoint):
        async def guarded(request: Request) -> Response:
            if not bears(request.headers.get("authorization", ""), self._key):
                return JSONResponse({"error": "the key is missing or wrong"}, 401)
            try:
                return await endpoint(request)
            except Refused as refusal:
                return JSONResponse({"error": str(refusal)}, refusal.status)

        return guarded

    async def _in_thread(self, function, *args):
        return await asyncio.get_running_loop().run_in_executor(self._threads, function, *args)

    async def _when_there_is_news(self, function, *args):
        """As `_in_thread`, for what may wait; it keeps nothing else waiting."""
        if self._num_waiting >= MAX_SAMPLERS:
            raise Refused(f"{MAX_SAMPLERS} samplers wait for orders; come back later", 503)
        loop = asyncio.get_running_loop()
        work = self._waiting.submit(function, *args)
        self._num_waiting += 1

        def ended(_):
            with contextlib.suppress(RuntimeError):  # the loop is closed, and nobody counts
                loop.call_soon_threadsafe(self._count_down)

        work.add_done_callback(ended)
        return await asyncio.wrap_future(work)

    def _count_down(self) -> None:
        self._num_waiting -= 1

    async def _hello(self, request: Request) -> Response:
        return JSONResponse(await self._in_thread(self._desk.hello, await _object(request)))

    async def _order(self, request: Request) -> Response:
        asked = await _object(request)
        return JSONResponse(await self._when_there_is_news(self._desk.order, asked))

    async def _alive(self, request: Request) -> Response:
        return JSONResponse(await self._in_thread(self._desk.alive, await _object(request)))

    async def _groups(self, request: Request) -> Response:
        name, run = (request.headers.get(f"x-{what}", "") for what in ("sampler", "run"))
        content = await _body(request, self._max_group_bytes)
        return JSONResponse(await self._in_thread(self._desk.deliver, name, run, content))

    async def _weights(self, request: Request) -> Response:
        version = request.path_params["version"]
        content, digest = await self._in_thread(self._desk.weights, version)
        return Response(content, media_type="application/json", headers={"ETag": f'"{digest}"'})

    async def _tensors(self, request: Request) -> Response:
        version, asked = request.path_params["version"], await _object(request)
        names = asked.get("names")
        ok = isinstance(names, list) and all(isinstance(name, str) for name in names)
        if not ok or len(names) != len(set(names)):
            raise Refused("tensors are asked for by a list of different names")
        tensors = await self._in_thread(self._desk.tensors, version, names)
        size = sum(tensor.nbytes for tensor in tensors)
        return StreamingResponse(
            _parts(tensors),
            media_type="application/octet-stream",
            headers={"content-length": str(size)},
        )


async def _parts(tensors: list[memoryview]) -> AsyncIterator[memoryview]:
    """The bytes of tensors, in parts that are sent before the next one is copied."""
    for tensor in tensors:
        for at in range(0, tensor.nbytes, _PART):
            yield tensor[at : at + _PART]


async def _object(request: Request) -> dict[str, Any]:
    try:
        return parse_object(await _body(request, MAX_JSON_BYTES))
    except ApiError as error:
        raise Refused(error.message) from None


async def _body(request: Request, most: int) -> bytes:
    made = bytearray()
    try:
        async with asyncio.timeout(_BODY_S):
            async for part in request.stream():
                made += part
                if len(made) > most:
                    raise Refused(f"the body is larger than {most} bytes", 413)
    except TimeoutError:
        raise Refused("the body took too long to arrive", 408) from None
    except ClientDisconnect:
        raise Refused("the client has gone", 408) from None
    return bytes(made)
