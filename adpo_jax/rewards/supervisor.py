"""Ends every process that a grading worker leaves behind, on Linux.

The process that the pool starts is split in two. The child is the worker, which runs the reward
functions. The parent is its supervisor: the kernel gives it every orphan of the worker's (it is a
"subreaper"), whatever session or group the orphan moved to. When the pool says so, when the worker
ends, or when the run is gone, even by SIGKILL, the supervisor kills all processes below it until
none is left, and ends too.

What escapes: processes that another daemon starts on request (`docker run`, `systemd-run`, `at`),
those of another user (setuid programs), and everything where the supervisor itself is killed by
SIGKILL. Other systems than Linux have no subreapers: there the pool kills the worker's process
group.
"""

import contextlib
import ctypes
import os
import select
import signal
import sys
import time

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_KILLING_S = 5.0  # a process in the kernel's hands, or another user's, is given up after this


def become_supervised(lifeline: int, others: tuple[int, ...], run: int) -> int:
    """Splits this process, which has one thread: returns in the worker alone.

    Args:
      lifeline: a pipe's end to read from. A byte in it, or its closing, ends the worker.
      others: descriptors that only the worker needs.
      run: the process id of the run.

    Returns:
      The process id of the worker's parent: the supervisor on Linux, else the run.
    """
    if sys.platform != "linux":
        return run
    supervisor = os.getpid()
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    worker = os.fork()
    if worker:
        for descriptor in others:
            os.close(descriptor)
        try:
            _watch(worker, lifeline, run)
            kill_descendants()
        finally:
            os._exit(0)
    os.close(lifeline)
    os.setsid()  # a function that kills its process group does not kill the supervisor
    die_with_parent()
    return supervisor


def die_with_parent() -> None:
    """Has the kernel kill this process when its parent ends, on Linux."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def kill_descendants() -> None:
    """Kills all processes below this one, again and again until none is left."""
    end = time.monotonic() + _KILLING_S
    while (found := _descendants(os.getpid())) and time.monotonic() < end:
        for pid in found:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        _reap()
        time.sleep(0.002)


def _watch(worker: int, lifeline: int, run: int) -> None:
    """Returns when the worker has to end, or has ended."""
    wake, woken = os.pipe()
    os.set_blocking(woken, False)
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(woken, warn_on_full_buffer=False)
    for number in (signal.SIGCHLD, signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: None)
    poll = select.poll()
    poll.register(lifeline, select.POLLIN)
    poll.register(wake, select.POLLIN)
    while worker not in _reap() and os.getppid() == run:
        events = dict(poll.poll(1000))
        if lifeline in events:
            return
        if wake in events:
            os.read(wake, 4096)


def _reap() -> set[int]:
    """The children that have ended, which are then forgotten by the kernel."""
    ended: set[int] = set()
    with contextlib.suppress(ChildProcessError):
        while pid := os.waitpid(-1, os.WNOHANG)[0]:
            ended.add(pid)
    return ended


def _descendants(root: int) -> list[int]:
    """The processes below a process, ended ones that nobody has waited for among them."""
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError, IndexError, ValueError):
                with open(f"/proc/{name}/stat", "rb") as file:
                    # The name of a program is in brackets and may hold anything.
                    parent = int(file.read().rpartition(b")")[2].split()[1])
                children.setdefault(parent, []).append(int(name))
    found, left = [], [root]
    while left:
        below = children.get(left.pop(), [])
        found += below
        left += below
    return found
