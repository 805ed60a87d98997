"""The server inside of a run: the run's engine over HTTP, for as long as a rollout lasts.

    with InsideServer(engine, params, language, limits, host="127.0.0.1") as server:
        server.base_url, server.api_key
        server.run(a_coroutine).result()
        server.ledger.completion(...)

It is born and ends with the rollout, so that no request is answered by weights that it was not
meant for. Its port and its key are new every time.
"""

import asyncio
import concurrent.futures
import contextlib
import secrets
import threading
from collections.abc import Coroutine
from typing import Any

from adpo_jax.engine.engine import Engine
from adpo_jax.serve.access import Hosts
from adpo_jax.serve.app import App
from adpo_jax.serve.decoding import Decoding
from adpo_jax.serve.hosting import listening, make_host
from adpo_jax.serve.ledger import WitnessedBatch
from adpo_jax.serve.metrics import Metrics
from adpo_jax.serve.protocol import Limits
from adpo_jax.serve.service import Language, Service

MODEL_NAME = "policy"
# An environment is not a stranger: it may have as many rollouts under way as the run asks for.
MAX_REQUESTS = 1 << 16
MAX_BODY_BYTES = 64 << 20


class InsideServer:
    """A server over a run's engine, in a thread of its own.

    Args:
      engine: it takes prompts of whole conversations.
      params: the parameters that sample.
      version: iterations done by them.
      host: the address that it listens on, at any free port.
      returns: as of `Service`.

    Raises:
      ValueError: for an address at which this machine cannot listen.

    Attributes:
      base_url: where it answers, without a path.
      api_key: what clients must send.
      ledger: what was sampled.
    """

    def __init__(
        self,
        engine: Engine,
        params: Any,
        language: Language,
        limits: Limits,
        *,
        version: int,
        host: str,
        returns: dict[str, bool],
    ):
        self._batch = WitnessedBatch(engine, params, version=version)
        self.ledger = self._batch.ledger
        self.api_key = secrets.token_hex(16)
        self._socket, address = listening(host, 0, "environment.serve_host")
        self.base_url = f"http://{address}"
        self._loop: asyncio.AbstractEventLoop | None = None
        self._started = threading.Event()

        def make_service() -> Service:
            decoding = Decoding(self._batch, asyncio.get_running_loop())
            metrics = Metrics(MODEL_NAME, self._batch)
            return Service(language, decoding, limits, metrics, returns=returns)

        self._app = App(
            make_service,
            model_name=MODEL_NAME,
            hosts=Hosts(host),
            api_key=self.api_key,
            max_body_bytes=MAX_BODY_BYTES,
            max_requests=MAX_REQUESTS,
            max_requests_per_client=MAX_REQUESTS,
        )
        self._host = make_host(
            self._app, head_timeout_s=30.0, drain_s=1, log_config=None, access_log=False
        )
        self._thread = threading.Thread(target=self._serve, name="inside-server", daemon=True)

    @property
    def failed(self) -> bool:
        """Whether decoding has died."""
        return self._app.service is not None and self._app.service.decoding.failed

    def run(self, coroutine: Coroutine) -> concurrent.futures.Future:
        """Runs a coroutine in the server's thread."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def _serve(self) -> None:
        async def serving():
            self._loop = asyncio.get_running_loop()
            server = asyncio.ensure_future(self._host.serve(sockets=[self._socket]))
            while not (self._host.started or server.done()):
                await asyncio.sleep(0.005)
            self._started.set()
            await server
            left = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
            for task in left:
                task.cancel()
            await asyncio.gather(*left, return_exceptions=True)

        try:
            asyncio.run(serving())
        finally:
            self._started.set()

    def __enter__(self) -> "InsideServer":
        self._thread.start()
        self._started.wait()
        if not self._host.started:
            raise RuntimeError(f"the server for the environment did not start at {self.base_url}")
        return self

    def __exit__(self, *exc_info) -> None:
        self._host.should_exit = True
        self._thread.join()
        with contextlib.suppress(OSError):
            self._socket.close()
