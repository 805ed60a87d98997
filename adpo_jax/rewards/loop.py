"""The event loop of async functions: one a process, kept from call to call.

What a function keeps in its module, such as a client or a semaphore, belongs to the loop in which
it was first used, and fails in any other.
"""

import asyncio
import atexit
import contextvars
import functools
import threading
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any

_at_work = threading.Lock()


def run(coroutine: Coroutine, *, keeps_tasks: bool = False) -> Any:
    """What a coroutine returns; it may be called from any thread, and where another loop runs.

    While the kept loop is at work for another thread, the coroutine gets a loop of its own.

    Args:
      keeps_tasks: whether tasks that it leaves go on in the next call, and are not cancelled.
    """
    if not keeps_tasks:
        coroutine = _without_rest(coroutine)
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        pass
    else:
        with ThreadPoolExecutor(1) as thread:  # since a thread runs one loop at a time
            return thread.submit(contextvars.copy_context().run, _run, coroutine).result()
    return _run(coroutine)


def _run(coroutine: Coroutine) -> Any:
    if not _at_work.acquire(blocking=False):
        return asyncio.run(coroutine)
    try:
        return _kept().run(coroutine, context=contextvars.copy_context())
    finally:
        _at_work.release()


async def _without_rest(coroutine: Coroutine) -> Any:
    """What a coroutine returns, once the tasks that it leaves have been cancelled."""
    before = asyncio.all_tasks()
    try:
        return await coroutine
    finally:
        rest = asyncio.all_tasks() - before
        for task in rest:
            task.cancel()
        await asyncio.gather(*rest, return_exceptions=True)


@functools.cache
def _kept() -> asyncio.Runner:
    runner = asyncio.Runner(loop_factory=asyncio.new_event_loop)
    atexit.register(_close, runner)
    return runner


def _close(runner: asyncio.Runner) -> None:
    if _at_work.acquire(blocking=False):  # else a thread that nobody waits for is still in it
        runner.close()
