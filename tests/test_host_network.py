"""The ring of processes over the network of their hosts; each process is a thread here."""

import contextlib
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from adpo_jax.devices import distributed, host_network
from adpo_jax.devices.host_network import SECRET_BYTES, Address, HostLost, Listener

SECRET = bytes(range(SECRET_BYTES))


@contextlib.contextmanager
def rings_of(size: int, secrets=None, before=lambda addresses: None, timeout_s=10.0):
    """What each of so many processes gets when they connect: a ring, or an error."""
    with contextlib.ExitStack() as opened:
        listeners = [opened.enter_context(Listener("127.0.0.1")) for _ in range(size)]
        addresses = [one.address for one in listeners]
        before(addresses)

        def connect(rank, listener):
            try:
                ring = listener.ring(addresses, rank, (secrets or {}).get(rank, SECRET), timeout_s)
            except OSError as error:
                return error
            return opened.enter_context(contextlib.closing(ring))

        with ThreadPoolExecutor(size) as pool:
            found = list(pool.map(connect, range(size), listeners))
        yield found


def test_bytes_of_any_size_reach_everyone_in_order_and_are_sent_once():
    rng = np.random.default_rng(0)
    with rings_of(3) as rings, ThreadPoolExecutor(3) as pool:
        for sizes in ((0, 3, 3_000_000), (2_000_000, 2_000_000, 1)):
            blocks = [rng.bytes(size) for size in sizes]
            before = [ring.bytes_sent for ring in rings]
            found = list(pool.map(lambda ring, mine: ring.all_gather(mine), rings, blocks))
            assert all(list(map(bytes, one)) == blocks for one in found)
            for rank, ring in enumerate(rings):
                # All but what the next one had itself, and the length of each.
                wanted = sum(sizes) - sizes[(rank + 1) % 3] + 2 * 8
                assert ring.bytes_sent - before[rank] == wanted


def test_one_that_leaves_is_noticed_by_those_that_wait_for_it():
    with rings_of(3) as rings, ThreadPoolExecutor(2) as pool:
        rings[1].close()
        for waiting in [pool.submit(rings[rank].all_gather, b"x") for rank in (0, 2)]:
            with pytest.raises(HostLost, match="another process broke"):
                waiting.result(10)


def test_a_slow_one_is_waited_for_however_much_it_has_to_take():
    blocks = [bytes(20_000_000), b"late"]
    with rings_of(2, timeout_s=1.0) as rings, ThreadPoolExecutor(1) as pool:
        first = pool.submit(rings[0].all_gather, blocks[0])
        time.sleep(2.5)
        assert not first.done()
        assert list(map(bytes, rings[1].all_gather(blocks[1]))) == blocks
        assert list(map(bytes, first.result(10))) == blocks


def test_a_ring_that_breaks_leaves_no_thread_that_sends():
    """The next one has not come to the exchange when the one before leaves."""
    with rings_of(3) as rings:
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(rings[0].all_gather, bytes(50_000_000))
            time.sleep(0.3)
            rings[2].close()
            with pytest.raises(HostLost):
                waiting.result(10)
        with pytest.raises(HostLost, match="broke before"):
            rings[0].all_gather(b"again")
        (sender,) = rings[0]._sender._threads
        sender.join(10)
        assert not sender.is_alive()
        with pytest.raises(HostLost):
            rings[1].all_gather(b"x")


def test_a_name_that_means_this_host_alone_to_itself_is_not_told_to_others(monkeypatch):
    monkeypatch.setattr(host_network, "_NOBODY", "203.0.113.7")
    real = socket.getaddrinfo
    monkeypatch.setattr(
        socket,
        "getaddrinfo",
        lambda host, *a, **k: real({"node0": "127.0.1.1"}.get(host, host), *a, **k),
    )
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect(("203.0.113.7", 9))
            by_default = probe.getsockname()[0]
    except OSError:
        pytest.skip("this machine has no default route")
    assert host_network._own_address("node0") == by_default
    assert host_network._own_address("127.0.0.1") == "127.0.0.1"


def test_strangers_are_turned_away(monkeypatch):
    monkeypatch.setattr(host_network, "_HANDSHAKE_S", 0.2)
    strangers = []

    def call(addresses):
        for said in (b"", b"GET / HTTP/1.1\r\nHost: somebody\r\n\r\n"):
            strangers.append(socket.create_connection(addresses[0]))
            strangers[-1].sendall(said)

    with rings_of(2, before=call) as rings, ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda ring: ring.all_gather(b"ours"), rings))
    assert found == [[b"ours", b"ours"]] * 2
    for stranger in strangers:
        stranger.settimeout(5)
        with stranger, contextlib.suppress(ConnectionResetError):
            assert stranger.recv(64) == b""  # nothing was said to it


def test_one_with_another_secret_makes_no_ring(monkeypatch):
    monkeypatch.setattr(host_network, "_CONNECT_S", 0.5)
    with rings_of(2, secrets={1: bytes(SECRET_BYTES)}) as found:
        assert all(isinstance(one, OSError) for one in found)


def test_an_address_that_nobody_listens_at_is_an_error():
    with Listener("127.0.0.1") as listener, pytest.raises(OSError):
        listener.ring([Address("127.0.0.1", 9)] * 2, 0, SECRET, 10.0)


def test_where_hosts_do_not_reach_each_other_the_devices_exchange(monkeypatch):
    """In one process, whose ring is a connection with itself."""
    distributed.host_ring.cache_clear()
    ring = distributed.host_ring()
    assert ring.all_gather(b"alone") == [b"alone"]
    ring.close()

    def refuse(*_):
        raise ConnectionRefusedError("refused")

    monkeypatch.setattr(Listener, "ring", refuse)
    distributed.host_ring.cache_clear()
    with pytest.warns(UserWarning, match=r"does not reach its neighbours.*refused.*memory of the"):
        assert distributed.host_ring() is None
    distributed.host_ring.cache_clear()
    assert distributed._through_devices(b"abc") == [b"abc"]
