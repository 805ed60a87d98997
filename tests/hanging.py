"""A bound for what must not hang, wide enough for any machine: speed is a benchmark's to say."""

import contextlib
import gc
import time


@contextlib.contextmanager
def soon(seconds: float = 10.0):
    """Fail when this thread spends more than `seconds` of processor time on the block.

    What hangs takes minutes or for ever, and what is right takes milliseconds, so the bound lies
    far from both. Nothing but the block counts: no other process, and no collection of what other
    tests left behind.
    """
    collects = gc.isenabled()
    gc.disable()
    started = time.thread_time()
    try:
        yield
        spent = time.thread_time() - started
    finally:
        if collects:
            gc.enable()
    assert spent < seconds, f"{spent:.1f} s of processor time, where {seconds:g} s are many"
