"""Ends what reward functions left behind that ran in the run's own process, on Linux.

A watchman, a small process of its own, waits for the run to end, by SIGKILL too. Then it kills all
processes that were started while a reward function was loaded or called, in whatever session they
are. It knows those that run another program by a mark in their environment, and those that the run
forked by their numbers, which they write into its pipe. This file is also the watchman's program.

What escapes: programs that are started with an environment of their own, and what another daemon
starts on request. In workers (`pool`) a supervisor misses neither of the first.
"""

import contextlib
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

MARK = "ADPO_JAX_STARTED_BY_REWARDS_OF"
_KILLING_S = 5.0  # a process in the kernel's hands is given up after this
_LOOK_S = 0.5  # between two looks whether the run is there


class _Watchman:
    """The watchman of this process, started when a reward function is first called."""

    def __init__(self):
        self.lock = threading.Lock()
        self.process: subprocess.Popen | None = None
        self.mark = ""
        self.num_calls = 0  # of reward functions, at this moment

    def start(self):
        self.mark = f"{os.getpid()}-{os.urandom(8).hex()}"
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-S", __file__, str(os.getpid()), self.mark],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is not for it
        )
        os.register_at_fork(after_in_child=self.note_fork)

    def note_fork(self):
        if self.num_calls:
            with contextlib.suppress(OSError):
                # So short a text goes into a pipe whole.
                os.write(self.process.stdin.fileno(), f"{os.getpid()}\n".encode())


_watchman = _Watchman()


@contextlib.contextmanager
def marked() -> Iterator[None]:
    """Has every process that is started meanwhile end with this one, on Linux."""
    if sys.platform != "linux":
        yield
        return
    with _watchman.lock:
        if _watchman.process is None:
            _watchman.start()
        _watchman.num_calls += 1
        os.environ[MARK] = _watchman.mark
    try:
        yield
    finally:
        with _watchman.lock:
            _watchman.num_calls -= 1
            if not _watchman.num_calls:
                os.environ.pop(MARK, None)


def _watch(run: int, mark: str) -> None:
    """Waits until the run is gone, then kills what it left."""
    forked: dict[int, str] = {}
    text, is_open = b"", True

    def hear(wait_s: float) -> bool:
        """Notes numbers of forked processes that have come, or come in time; False for none."""
        nonlocal text, is_open
        if not is_open or not select.select([sys.stdin.fileno()], [], [], wait_s)[0]:
            return False
        new = os.read(sys.stdin.fileno(), 4096)
        is_open = bool(new)
        *numbers, text = (text + new).split(b"\n")
        for pid in map(int, numbers):
            forked[pid] = _start_time(pid)
        return is_open

    while is_open and os.getppid() == run:
        hear(_LOOK_S)
    end = time.monotonic() + _KILLING_S
    # The run may have been gone before this process had read, or begun, anything.
    while hear(0) | bool(found := _left(mark, forked)) and time.monotonic() < end:
        for pid in found:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)


def _left(mark: str, forked: dict[int, str]) -> list[int]:
    """The processes with the mark, and those of the forked ones that are still the same."""
    sought = f"{MARK}={mark}".encode()
    found = [pid for pid, started in forked.items() if started and _start_time(pid) == started]
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError), open(f"/proc/{name}/environ", "rb") as file:
                if sought in file.read().split(b"\0"):
                    found.append(int(name))
    return found


def _start_time(pid: int) -> str:
    """When a process started, as the kernel writes it; "" for one that is gone or has ended."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            # The name of a program is in brackets and may hold anything.
            state, *rest = file.read().rpartition(b")")[2].decode().split()
    except OSError:
        return ""
    return "" if state in "ZX" else rest[18]


if __name__ == "__main__":
    _watch(int(sys.argv[1]), sys.argv[2])
