"""The uvicorn server under an `App`, with limits for connections."""

import socket
from typing import Any

import uvicorn

from adpo_jax.serve.app import App
from adpo_jax.serve.connections import Connections

# Seconds without a request after which a connection is closed. It is longer than clients keep one
# (httpx 5 s, aiohttp 15 s), so that none sends a request into a connection that is being closed.
KEEP_ALIVE_S = 30


class Host(uvicorn.Server):
    """A uvicorn server that knows its application."""

    def __init__(self, config: uvicorn.Config, app: App):
        super().__init__(config)
        self.app = app


def make_host(app: App, *, head_timeout_s: float, drain_s: int, **options: Any) -> Host:
    """A server for an application.

    Args:
      head_timeout_s: seconds for the head of a request to arrive.
      drain_s: seconds for requests under way, when the server is told to end.
      options: further arguments of `uvicorn.Config`.
    """
    # These are above the app's own limits, so that they are met by connections without requests.
    most = 2 * app.clients.most + 64
    each = min(2 * app.clients.most_each + 32, most)
    connections = Connections(most, each, head_timeout_s=head_timeout_s)
    config = uvicorn.Config(
        app.asgi,
        http=connections.protocol,
        ws="none",
        lifespan="on",
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=drain_s,
        server_header=False,
        use_colors=False,  # nothing that is logged steers the terminal, colours neither
        **options,
    )
    return Host(config, app)


def listening(host: str, port: int, option: str) -> tuple[socket.socket, str]:
    """A socket at an address of this machine, and the address as "host:port".

    Args:
      port: 0 for any that is free.
      option: what named the address, for the error.

    Raises:
      ValueError: for an address at which this machine cannot listen.
    """
    try:
        (family, kind, _, _, address), *_ = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        made = socket.socket(family, kind)
        try:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            made.bind(address)
            made.listen(2048)
        except OSError:
            made.close()
            raise
    except OSError as error:
        raise ValueError(
            f"{option} is {host}:{port}, at which this machine cannot listen: {error}"
        ) from None
    shown = f"[{host}]" if ":" in host else host
    return made, f"{shown}:{made.getsockname()[1]}"
