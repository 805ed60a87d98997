"""The uvicorn server under an `App`, with limits for connections."""

import errno
import logging
import socket
from collections.abc import Sequence
from typing import Any

import uvicorn
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

from adpo_jax.serve.app import App
from adpo_jax.serve.connections import Connections

# Seconds without a request after which a connection is closed. It is longer than clients keep one
# (httpx 5 s, aiohttp 15 s), so that none sends a request into a connection that is being closed.
KEEP_ALIVE_S = 30


class Host(uvicorn.Server):
    """A uvicorn server that knows its application.

    Args:
      sockets: where it listens, unless `run` or `serve` is told otherwise.
    """

    def __init__(self, config: uvicorn.Config, app: App, sockets: Sequence[socket.socket] = ()):
        super().__init__(config)
        self.app, self._sockets = app, list(sockets)

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        await super().serve(sockets or self._sockets or None)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for at in self._sockets:  # uvicorn tells of those alone that it has opened
            logging.getLogger("uvicorn.error").info(
                "Uvicorn running on http://%s (Press CTRL+C to quit)", _shown(*at.getsockname()[:2])
            )


def make_host(
    app: App,
    *,
    head_timeout_s: float,
    drain_s: int,
    sockets: Sequence[socket.socket] = (),
    **options: Any,
) -> Host:
    """A server for an application.

    Args:
      head_timeout_s: seconds for the head of a request to arrive.
      drain_s: seconds for requests under way, when the server is told to end.
      sockets: where it listens, unless `run` or `serve` is told otherwise.
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
    # Those whose X-Forwarded-For uvicorn takes.
    trusted = ProxyHeadersMiddleware(app.asgi, config.forwarded_allow_ips)
    connections.proxies = trusted.trusted_hosts
    return Host(config, app, sockets)


def bound(host: str, port: int, option: str) -> list[socket.socket]:
    """Sockets that have the addresses of a host, and do not listen yet.

    A name may have an address of IPv4 and one of IPv6, which get the same port.

    Args:
      port: 0 for any that is free.
      option: what named the address, for the error.

    Raises:
      ValueError: for an address at which this machine cannot listen.
    """
    made: list[socket.socket] = []
    failure = OSError("the name has no address")
    try:
        flags = socket.AI_PASSIVE
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=flags)
        for family, kind, proto, _, (name, _, *rest) in dict.fromkeys(found):
            at = (name, made[0].getsockname()[1] if made else port, *rest)
            try:
                made.append(_bound_at(family, kind, proto, at))
            except OSError as error:
                failure = error
                # A name may have an address of a family that this machine has not.
                if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                    raise
        if not made:
            raise failure
    except (OSError, UnicodeError) as error:
        for one in made:
            one.close()
        raise _no_listening(host, port, option, error) from None
    return made


def _bound_at(family: int, kind: int, proto: int, address: tuple) -> socket.socket:
    made = socket.socket(family, kind, proto)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        made.bind(address)
    except OSError:
        made.close()
        raise
    return made


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
    except (OSError, UnicodeError) as error:  # UnicodeError: for a name that no host can have
        raise _no_listening(host, port, option, error) from None
    return made, _shown(host, made.getsockname()[1])


def _no_listening(host: str, port: int, option: str, error: Exception) -> ValueError:
    return ValueError(f"{option} is {host}:{port}, at which this machine cannot listen: {error}")


def _shown(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
