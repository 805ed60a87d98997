"""What processes exchange of an iteration's completions, and how long it takes.

    python scripts/bench_hosts.py
    python scripts/bench_hosts.py --processes 4 --prompts 256 --mean 1000

Starts so many processes on this machine, each with its share of completions of lognormal lengths,
and lets all of them have all completions (`devices.distributed.all_gather`), over the network of
their hosts and, as the plain version, through their devices. One JSON line a way: `sent_ratio`,
bytes that a process sends over the bytes of the fields of the tokens that the others have to get;
`device_mb`, what the exchange takes on every device; `seconds`, the median.
"""

import argparse
import json
import os
import pickle
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path

from option_types import integer, real

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench_records import field_bytes, graded, lognormal


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--processes", type=integer(1), default=2)
    parser.add_argument("--prompts", type=integer(1), default=64)
    parser.add_argument("--gens", type=integer(1), default=16, help="completions of a prompt")
    parser.add_argument("--prompt_len", type=integer(1), default=512)
    parser.add_argument("--mean", type=real(above=0), default=8000, help="tokens of a completion")
    parser.add_argument(
        "--sigma", type=real(least=0), default=0.8, help="of the logarithm of the length"
    )
    parser.add_argument(
        "--cap", type=integer(1), default=30_000, help="tokens of the longest completion"
    )
    parser.add_argument("--repeats", type=integer(1), default=3)
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def measure(a: argparse.Namespace) -> None:
    """Exchanges in this process; process 0 prints."""
    import jax

    from adpo_jax.devices import distributed

    distributed.initialize(True, timeout_s=100)
    lengths = lognormal(a.prompts, a.gens, a.mean, a.sigma, a.cap)
    own = distributed.own_rows(a.prompts)
    mine = graded(lengths[own.start : own.stop], a.prompt_len)
    ring = distributed.host_ring()
    if ring is None:
        raise SystemExit("the processes do not reach each other")
    for way in ("hosts", "devices"):
        if way == "devices":
            distributed.host_ring = lambda: None
        seconds, before = [], ring.bytes_sent
        for _ in range(a.repeats):
            distributed.wait_for_all("begin")
            started = time.perf_counter()
            found = distributed.all_gather(mine)
            seconds.append(time.perf_counter() - started)
        assert sum(len(one.completions.groups) for one in found) == a.prompts
        sent = (ring.bytes_sent - before) / a.repeats
        following = (jax.process_index() + 1) % a.processes
        theirs = range(*(a.prompts * (following + i) // a.processes for i in (0, 1)))
        passed_on = lengths.sum() - lengths[theirs.start : theirs.stop].sum()
        padded = 1 << (max(map(travelling_bytes, found)) - 1).bit_length()
        result = {
            "way": way,
            "processes": a.processes,
            "tokens": int(lengths.sum()),
            "seconds": round(statistics.median(seconds), 3),
            "device_mb": round(padded * a.processes / 1e6) if way == "devices" else 0,
        }
        if way == "hosts":
            result["sent_ratio"] = round(sent / (passed_on * field_bytes()), 4)
            result["sent_mb"] = round(sent / 1e6)
        if distributed.is_leader():
            print(json.dumps(result), flush=True)


def travelling_bytes(part) -> int:
    """Bytes of a process' part as it travels."""
    return len(pickle.dumps(part, protocol=5))


def main() -> None:
    a = arguments()
    if a.here:
        measure(a)
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    processes = []
    for number in range(a.processes):
        env = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "JAX_COORDINATOR_ADDRESS": address,
            "JAX_NUM_PROCESSES": str(a.processes),
            "JAX_PROCESS_ID": str(number),
        }
        command = [sys.executable, __file__, *sys.argv[1:], "--here"]
        processes.append(subprocess.Popen(command, env=env))
    sys.exit(max(process.wait() for process in processes))


if __name__ == "__main__":
    main()
