"""The HTTP of the server: routes, access, and the answers to requests that are wrong."""

import asyncio
import base64
import contextlib
import functools
import hashlib
import json
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

from absl import logging
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from adpo_jax.serve import metrics as metrics_lib
from adpo_jax.serve.access import ANY, Clients, Hosts, bears
from adpo_jax.serve.decoding import Pause
from adpo_jax.serve.fields import ApiError, Fields, parse_object
from adpo_jax.serve.protocol import CompletionRequest, parse
from adpo_jax.serve.service import Service
from adpo_jax.serve.tokens import parse_tokens

# What is written down at once of an answer: what is so deep in it, or so many entries of a list.
_SMALL_DEPTH, _PART = 4, 32


class App:
    """The server as a Starlette application.

    Args:
      make_service: called when the server starts, on its event loop.
      model_name: the name that clients ask for.
      hosts: the names that the server answers to.
      api_key: the key that clients must send as `Authorization: Bearer ...`; None for no key.
      cors_origins: origins of pages whose scripts may use the server; "*" for all.
      max_body_bytes: the most bytes of a request's body.
      max_requests: the most requests at once; clients of further ones are told to come back later.
      max_requests_per_client: likewise of one client; None for half of `max_requests`.
      body_timeout_s: seconds for a request's body to arrive.
      on_close: called when the service begins to end, after the requests under way.

    Attributes:
      service: None until the server has started.
      clients: those with requests under way.
    """

    def __init__(
        self,
        make_service: Callable[[], Service],
        *,
        model_name: str,
        hosts: Hosts,
        api_key: str | None = None,
        cors_origins: Sequence[str] = (),
        max_body_bytes: int = 1 << 20,
        max_requests: int = 256,
        max_requests_per_client: int | None = None,
        body_timeout_s: float = 30.0,
        on_close: Callable[[Service], None] = lambda service: None,
    ):
        self._make_service, self._model_name = make_service, model_name
        self._on_close = on_close
        self._hosts, self._api_key = hosts, api_key
        self._cors_origins = frozenset(cors_origins)
        self._max_body_bytes, self._body_timeout_s = max_body_bytes, body_timeout_s
        if max_requests_per_client is None:
            max_requests_per_client = -(-max_requests // 2)
        self.clients = Clients(max_requests, max_requests_per_client)
        self._page = Page(lambda: bool(self.service.language.tokenizer.chat_template))
        self.service: Service | None = None
        guarded = self._guarded
        routes = [
            Route("/", self._page.answer),
            Route("/health", self._health),
            Route("/metrics", guarded(self._metrics)),
            Route("/v1/models", guarded(self._models)),
            Route("/v1/models/{name:path}", guarded(self._model)),
            Route("/v1/completions", guarded(self._complete), methods=["POST"]),
            Route("/v1/chat/completions", guarded(self._chat), methods=["POST"]),
            Route("/inference/v1/generate", guarded(self._generate), methods=["POST"]),
            Route("/update_weights", guarded(self._update_weights), methods=["POST"]),
            Route("/pause", guarded(self._pause), methods=["POST"]),
            Route("/resume", guarded(self._resume), methods=["POST"]),
        ]
        self._paths = {route.path for route in routes}
        cors = Middleware(
            CORSMiddleware,
            allow_origins=list(cors_origins),
            allow_methods=["GET", "POST"],
            # OpenAI's client for JavaScript sends several of its own.
            allow_headers=["*"],
        )
        self.asgi = self._door(
            Starlette(
                routes=routes,
                middleware=[cors] if cors_origins else [],
                exception_handlers={HTTPException: _http_error, Exception: _our_error},
                lifespan=self._lifespan,
            )
        )

    @contextlib.asynccontextmanager
    async def _lifespan(self, _):
        self.service = self._make_service()
        yield
        self._on_close(self.service)
        await asyncio.to_thread(self.service.close)

    # --- access

    def _door(self, inside):
        """The application behind a check of the Host header; it counts the answers."""

        async def door(scope, receive, send):
            if scope["type"] != "http":
                await inside(scope, receive, send)
                return
            path = scope["path"]
            if path.startswith("/v1/models/"):
                path = "/v1/models/{name:path}"

            async def counting(message):
                if message["type"] == "http.response.start":
                    route = path if path in self._paths else "other"
                    self.service.metrics.answered(route, message["status"])
                await send(message)

            try:
                self._hosts.check(Headers(scope=scope).get("host", ""))
            except ApiError as error:
                await _refusal(error)(scope, receive, counting)
            else:
                await inside(scope, receive, counting)

        return door

    def _guarded(self, endpoint: Callable[[Request], Awaitable[Response]]):
        """The endpoint behind a check of the key; its refusals become answers."""

        async def guarded(request: Request) -> Response:
            try:
                self._check_key(request)
                return await endpoint(request)
            except ApiError as error:
                return _refusal(error)

        return guarded

    def _check_key(self, request: Request) -> None:
        if self._api_key is None:
            return
        if not bears(request.headers.get("authorization", ""), self._api_key):
            raise ApiError(
                "the API key is missing or wrong",
                status=401,
                code="invalid_api_key",
                kind="authentication_error",
            )

    # --- what there is

    async def _health(self, _: Request) -> Response:
        decoding = self.service.decoding
        content = {
            "status": "failed" if decoding.failed else "ok",
            "running": decoding.batch.num_running,
            "waiting": decoding.batch.num_waiting,
            "paused": decoding.paused and decoding.paused.value,
            "weight_version": decoding.batch.version,
        }
        return _json(content, 503 if decoding.failed else 200)

    def _card(self) -> dict[str, Any]:
        card = {"id": self._model_name, "object": "model", "created": 0, "owned_by": "adpo_jax"}
        version = self.service.decoding.batch.version
        return card | {"max_model_len": self.service.limits.longest, "weight_version": version}

    async def _metrics(self, _: Request) -> Response:
        text = self.service.metrics.text()
        return Response(text, headers={"Content-Type": metrics_lib.CONTENT_TYPE})

    async def _models(self, _: Request) -> Response:
        return _json({"object": "list", "data": [self._card()]})

    async def _model(self, request: Request) -> Response:
        if request.path_params["name"] != self._model_name:
            raise ApiError("no such model", status=404, param="model", code="model_not_found")
        return _json(self._card())

    # --- what only the owner of the server may do

    def _check_owner(self, request: Request) -> None:
        """Refuses what the server was not started for, and pages of strangers.

        The forms of a page may send a request without a body, and a browser names the page as its
        origin.

        Raises:
          ApiError: for either.
        """
        if self.service.weights_root is None:
            raise ApiError(
                f"{request.url.path} is off: start the server with --weights-root and the folder "
                "that new weights come from",
                status=403,
                code="not_allowed",
            )
        origin = request.headers.get("origin")
        if origin is not None and not {origin, ANY} & self._cors_origins:
            raise ApiError(
                f"{request.url.path} does not answer to pages of this origin; start the server "
                "with --cors-origin to allow it",
                status=403,
                code="not_allowed",
            )

    async def _update_weights(self, request: Request) -> Response:
        self._check_owner(request)
        fields = Fields(parse_object(await self._body(request)))
        folder = fields.checked(
            "weight_dir", None, "the path of a folder", lambda value: type(value) is str
        )
        if folder is None:
            raise ApiError("weight_dir is missing: the folder of the weights", param="weight_dir")
        version = fields.integer("version", None, 0, 2**53)
        fields.finish()
        version = await self.service.update_weights(folder, version)
        return _json({"status": "ok", "weight_version": version})

    async def _pause(self, request: Request) -> Response:
        self._check_owner(request)
        mode = request.query_params.get("mode", Pause.WAIT.value)
        modes = [how.value for how in Pause]
        if mode not in modes:
            raise ApiError(
                f"mode must be one of {modes}; given {mode[:40]!r}: nothing that is under way is "
                "thrown away",
                param="mode",
            )
        await self.service.pause(Pause(mode))
        return _json({"status": "paused", "mode": mode})

    async def _resume(self, request: Request) -> Response:
        self._check_owner(request)
        self.service.decoding.resume()
        return _json({"status": "resumed"})

    # --- completions

    async def _complete(self, request: Request) -> Response:
        return await self._admitted(request, functools.partial(parse, chat=False))

    async def _chat(self, request: Request) -> Response:
        return await self._admitted(request, functools.partial(parse, chat=True))

    async def _generate(self, request: Request) -> Response:
        return await self._admitted(request, parse_tokens)

    async def _admitted(
        self, request: Request, parse_body: Callable[..., CompletionRequest]
    ) -> Response:
        arrived = time.perf_counter()
        client = self.clients.enter(request.client.host if request.client else None)
        handed_on = False
        try:
            body = parse_object(await self._body(request))
            asked = parse_body(body, model=self._model_name, limits=self.service.limits)
            preparing = asyncio.ensure_future(self.service.prepared(asked, client))
            if not await _unless_gone(request.receive, preparing):
                return Response(status_code=499)  # the client has gone, and nobody reads this
            prompts = preparing.result()
            answer = self.service.answer(asked, self._model_name, prompts)
            context = self.service.choices(asked, prompts, client, arrived)
            if not asked.stream:
                return await self._whole(request, context, answer)
            # A stream that cannot begin is refused with a status of its own.
            choices, news = await context.__aenter__()
            handed_on = True
            events = _events(answer, choices, news)
            return EventStream(events, context, lambda: self.clients.leave(client))
        finally:
            if not handed_on:
                self.clients.leave(client)

    async def _body(self, request: Request) -> bytes:
        """The body of a request; refused if it is no JSON, too large, or too slow to arrive."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            # No form of a web page can send this one unasked.
            raise ApiError("Content-Type must be application/json", status=415)
        body = bytearray()
        too_large = ApiError(f"the body is larger than {self._max_body_bytes} bytes", status=413)
        declared = request.headers.get("content-length", "")
        if declared.isdecimal() and int(declared[:20]) > self._max_body_bytes:
            raise too_large
        try:
            async with asyncio.timeout(self._body_timeout_s):
                async for part in request.stream():
                    body += part
                    if len(body) > self._max_body_bytes:
                        raise too_large
        except TimeoutError:
            raise ApiError("the body took too long to arrive", status=408) from None
        except ClientDisconnect:
            raise ApiError("the client has gone", status=400) from None
        return bytes(body)

    async def _whole(self, request: Request, context, answer) -> Response:
        async with context as (choices, news):

            async def all_news():
                async for _ in news:
                    pass

            if not await _unless_gone(request.receive, all_news()):
                return Response(status_code=499)
        # An answer of many log-probs takes a while to write down.
        content = await asyncio.to_thread(lambda: _dumped_in_parts(answer.body(choices)))
        return Response(content, media_type="application/json")


async def _events(answer, choices, news) -> AsyncIterator[str]:
    """The chunks of a stream as server-sent events."""
    for choice in choices:
        if (chunk := answer.opening(choice)) is not None:
            yield _event(chunk)
    try:
        async for choice, piece in news:
            if (chunk := answer.chunk(choice, piece)) is not None:
                yield _event(chunk)
    except ApiError as error:
        yield _event(error.body())
        return
    if (chunk := answer.usage_chunk(choices)) is not None:
        yield _event(chunk)
    yield "data: [DONE]\n\n"


def _event(content: dict[str, Any]) -> str:
    return f"data: {_dumped(content)}\n\n"


class Page:
    """The page to try the policy in: one file, which a browser may load nothing beside.

    Its own script and style are named by their hashes, so that no other script can run in it.

    Args:
      has_chat: whether the model has a chat template; messages are sent as plain text without one.
    """

    def __init__(self, has_chat: Callable[[], bool]):
        self._has_chat = has_chat
        text = (Path(__file__).parent / "page.html").read_text(encoding="utf-8")

        def digest(tag: str) -> str:
            inside = re.search(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)[1]
            return base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()

        policy = (
            f"default-src 'none'; script-src 'sha256-{digest('script')}'; "
            f"style-src 'sha256-{digest('style')}'; connect-src 'self'; base-uri 'none'; "
            "form-action 'none'; frame-ancestors 'none'"
        )
        self._text, self._headers = text, {"Content-Security-Policy": policy}
        self._headers |= {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}

    async def answer(self, _: Request) -> Response:
        text = self._text
        if not self._has_chat():
            text = text.replace('<option value="chat">', '<option value="chat" disabled>')
        return Response(text, headers=self._headers, media_type="text/html")


class EventStream(Response):
    """Server-sent events, until the client has gone.

    Args:
      events: lines to send.
      context: a context that is left at the end, whatever the end is.
      on_end: called after the context was left.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[str], context, on_end: Callable[[], None]):
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events, self._context, self._on_end = events, context, on_end

    async def __call__(self, scope, receive, send) -> None:
        async def send_all():
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for event in self._events:
                body = event.encode()
                await send({"type": "http.response.body", "body": body, "more_body": True})
            await send({"type": "http.response.body", "body": b""})

        try:
            await _unless_gone(receive, send_all())
        except OSError:
            pass  # the client went while something was being sent
        finally:
            await self._context.__aexit__(None, None, None)
            self._on_end()


async def _unless_gone(receive, work) -> bool:
    """Does the work while the client is there; returns whether the work was done."""

    async def gone():
        while (await receive())["type"] != "http.disconnect":
            pass

    working, watching = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            working.result()
        return working.done()
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


def _dumped(content: Any) -> str:
    # The JSON is ASCII, so that no lone surrogate can break it.
    return json.dumps(content, allow_nan=False, separators=(",", ":"))


def _dumped_in_parts(content: Any, name: str = "", depth: int = 0) -> str:
    """The same for a large answer, between whose parts other threads have their turn.

    `json.dumps` lets none of them on until its end.
    """
    if isinstance(content, dict) and depth < _SMALL_DEPTH:
        items = content.items()
        inside = (f"{_dumped(key)}:{_dumped_in_parts(item, key, depth + 1)}" for key, item in items)
        return f"{{{','.join(inside)}}}"
    if isinstance(content, list) and name == "choices":
        return f"[{','.join(_dumped_in_parts(item, depth=depth + 1) for item in content)}]"
    if isinstance(content, list):
        starts = range(0, len(content), _PART)
        return f"[{','.join(_dumped(content[at : at + _PART])[1:-1] for at in starts)}]"
    return _dumped(content)


def _json(content: dict[str, Any], status: int = 200, headers=None) -> Response:
    return Response(_dumped(content), status, headers, media_type="application/json")


def _refusal(error: ApiError) -> Response:
    headers = {"Retry-After": "1"} if error.status == 429 else None
    return _json(error.body(), error.status, headers)


async def _http_error(_: Request, error: HTTPException) -> Response:
    return _json(ApiError(error.detail).body(), error.status_code, error.headers)


async def _our_error(request: Request, error: Exception) -> Response:
    logging.error("%s failed", request.url.path, exc_info=error)
    failure = ApiError("the server made a mistake", status=500, kind="server_error")
    return _json(failure.body(), 500)
