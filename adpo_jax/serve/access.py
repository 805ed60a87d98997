"""Who may ask, and how much of the server one of them may take."""

import asyncio
import contextlib
import dataclasses
import hmac
import ipaddress
from collections.abc import Sequence

from adpo_jax.serve.fields import ApiError

LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1")
ALL_INTERFACES = ("0.0.0.0", "::", "")
ANY = "*"


@dataclasses.dataclass(frozen=True)
class Hosts:
    """The names by which the server may be addressed, in the Host header of a request.

    A page of a stranger can give its own name the address of this machine (DNS rebinding). A
    browser then takes the server for a part of the page, but sends the stranger's name as Host. An
    address instead of a name cannot be rebound, so a server on all interfaces takes any address.

    Attributes:
      bound: what the server listens on.
      further: names that are allowed beside this and the local ones; "*" allows all.
    """

    bound: str
    further: Sequence[str] = ()

    def check(self, header: str) -> None:
        """Refuses a request for somebody else.

        Raises:
          ApiError: for a host that is not allowed.
        """
        host = _host_of(header)
        allowed = {*LOCAL_HOSTS, self.bound.lower(), *map(_name_of, self.further)}
        if ANY in self.further or host in allowed:
            return
        if self.bound in ALL_INTERFACES and _is_address(host):
            return
        raise ApiError(
            "this server does not answer to the Host that was sent; start it with --allowed-host "
            "and the name to allow it",
            status=421,
            code="host_not_allowed",
        )


def _host_of(header: str) -> str:
    """The host without its port, lower case; "" for a header that is none."""
    host = header.strip().lower()
    if host.startswith("["):
        return host[1:].partition("]")[0]
    name, colon, port = host.rpartition(":")
    return name if colon and port.isdecimal() else host


def _name_of(allowed: str) -> str:
    """A name or address that the owner of the server allows, as `_host_of` gives it."""
    return allowed.lower() if _is_address(allowed) else _host_of(allowed)


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def bears(authorization: str, key: str) -> bool:
    """Whether an Authorization header, `Bearer ...`, has the key.

    Args:
      authorization: as Starlette gives it, which reads the bytes of a header as latin-1. Clients
        write other letters than those of ASCII in UTF-8 or in latin-1.
    """
    scheme, space, given = authorization.partition(" ")
    if not space or scheme.lower() != "bearer":
        given = authorization
    sent, written = given.strip().encode("latin-1"), [key.encode(errors="surrogateescape")]
    with contextlib.suppress(UnicodeEncodeError):
        written.append(key.encode("latin-1"))
    return any(hmac.compare_digest(sent, one) for one in written)


def client_key(address: str | None) -> str:
    """What one client has: an IPv4 address, or the half of an IPv6 address that names a network."""
    try:
        parsed = ipaddress.ip_address(address or "")
    except ValueError:
        return address or ""
    if parsed.version == 4:
        return str(parsed)
    if parsed.ipv4_mapped is not None:
        return str(parsed.ipv4_mapped)
    return str(ipaddress.ip_network((parsed, 64), strict=False))


def is_loopback(address: str | None) -> bool:
    """Whether a peer is on this machine."""
    try:
        parsed = ipaddress.ip_address(address or "")
    except ValueError:
        return False
    return (getattr(parsed, "ipv4_mapped", None) or parsed).is_loopback


@dataclasses.dataclass(eq=False)
class Client:
    """A client with requests under way.

    Attributes:
      key: as of `client_key`.
      under_way: how many requests.
      turn: held while work is done on the prompt of one of them; the others wait, so that a client
        keeps no more than one thread busy.
    """

    key: str
    under_way: int = 0
    turn: asyncio.Lock = dataclasses.field(default_factory=asyncio.Lock)


class Clients:
    """Counts the requests under way.

    Args:
      most: requests of all clients.
      most_each: requests of one client.
    """

    def __init__(self, most: int, most_each: int):
        self.most, self.most_each = most, most_each
        self._clients: dict[str, Client] = {}
        self.under_way = 0

    def enter(self, address: str | None) -> Client:
        """Lets a request in; `leave` must be called at its end.

        Raises:
          ApiError: where there are too many.
        """
        key = client_key(address)
        client = self._clients.get(key) or Client(key)
        if self.under_way >= self.most:
            raise _busy(f"{self.most} requests are under way; come back later")
        if client.under_way >= self.most_each:
            raise _busy(
                f"{self.most_each} requests of this client are under way; wait for one to end"
            )
        self._clients[key] = client
        client.under_way += 1
        self.under_way += 1
        return client

    def leave(self, client: Client) -> None:
        client.under_way -= 1
        self.under_way -= 1
        if not client.under_way:
            del self._clients[client.key]


def _busy(message: str) -> ApiError:
    return ApiError(message, status=429, code="rate_limit_exceeded", kind="rate_limit_error")
