"""A grading worker: a process that runs reward functions for `pool.WorkerPool`.

The process is a fresh interpreter in a session of its own. It is not forked from the run, so it has
none of the run's threads, devices or locks. It has a memory limit, and it ends when the run does,
with all that it started (see `supervisor`).
"""

import asyncio
import inspect
import os
import resource
import socket
import sys
import threading
import time
import traceback

from adpo_jax.log.printable import guard
from adpo_jax.rewards import custom, loop, wire
from adpo_jax.rewards.grading import faults
from adpo_jax.rewards.supervisor import become_supervised, die_with_parent


def main(descriptor: int, lifeline: int, run: int) -> None:
    """Serves the run over a socket until it closes.

    Args:
      descriptor: the socket.
      lifeline: a pipe whose closing ends this process, see `supervisor`.
      run: the process id of the run.
    """
    connection = connected(descriptor, lifeline, run)
    try:
        functions, timeout_s, memory_limit_mb = wire.receive_pickle(connection)
        limit_memory(memory_limit_mb)
        found = _load(functions, connection)
        while found is not None:
            index, positions, completions, columns, state = wire.receive_pickle(connection)
            serve = _serve_together if _is_async(found[index]) else _serve
            serve(connection, found[index], functions[index], positions, completions, columns,
                  state, timeout_s)  # fmt: skip
    except ConnectionError:
        pass


def connected(descriptor: int, lifeline: int, run: int) -> socket.socket:
    """The socket to the run, in a process that ends when the run does; arguments as of `main`.

    What is printed here may be a model's text, and goes to the run's terminal.
    """
    guard()
    _end_with(become_supervised(lifeline, (descriptor,), run))
    connection = socket.socket(fileno=descriptor)
    connection.set_inheritable(False)  # a program that a function starts would keep it open
    return connection


def limit_memory(memory_limit_mb: int | None) -> None:
    """Limits the memory of this process, where the system can."""
    if memory_limit_mb and sys.platform == "linux":
        limit = memory_limit_mb << 20
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def _is_async(found) -> bool:
    return inspect.iscoroutinefunction(found)


def _load(functions: list, connection: socket.socket) -> list | None:
    try:
        found = [custom.load(function) for function in functions]
        signatures = [custom.signature_of(f, function) for f, function in zip(found, functions)]
    except ValueError as error:
        wire.send_json(connection, {"refused": str(error)})
        return None
    are_async = [_is_async(f) for f in found]
    wire.send_json(connection, {"signatures": signatures, "are_async": are_async})
    return found


def _serve(connection, found, function, positions, completions, columns, state, timeout_s) -> None:
    """Grades completions one after the other, reporting each as it is done."""
    for i, position in enumerate(positions):
        one = {name: values[i : i + 1] for name, values in columns.items()}
        try:
            grades = custom.grade(found, function, completions[i : i + 1], one, state)
            reply = grades.as_json()
        except MemoryError:
            reply = {"killed": "crashes"}
        except (Exception, SystemExit, KeyboardInterrupt) as error:
            reply = _failure(error)
        wire.send_json(connection, reply | {"position": position})


def _serve_together(
    connection, found, function, positions, completions, columns, state, timeout_s
) -> None:
    """Grades completions with an async function, waiting for many of them at the same time.

    What such a function does between its waits holds the others up, and must not count as their
    time. So each begins when there is nothing else to do, and where beginning takes long, as few
    are under way as can hold each other up for a small part of `timeout_s`.
    """

    async def grade_one(i: int) -> None:
        limit = asyncio.timeout(timeout_s)
        one = {name: values[i : i + 1] for name, values in columns.items()}
        try:
            with faults.collected() as collected:
                call = custom.Call(found, function, completions[i : i + 1], one, state)
                async with limit:
                    result = await call.start()
                reply = call.grades(result)._replace(faults=tuple(collected)).as_json()
        except MemoryError:
            reply = {"killed": "crashes"}
        except (Exception, SystemExit, asyncio.CancelledError) as error:
            # A TimeoutError may be the function's own, of a connection say.
            is_late = isinstance(error, TimeoutError) and limit.expired()
            reply = {"killed": "timeouts"} if is_late else _failure(error)
        wire.send_json(connection, reply | {"position": positions[i]})

    async def grade_all() -> None:
        under_way: set[asyncio.Task] = set()
        longest = 0.0
        for i in range(len(positions)):
            started = time.perf_counter()
            under_way.add(asyncio.create_task(grade_one(i)))
            await asyncio.sleep(0)  # until it waits for the first time
            # What one call did at its beginning, such as an import, the next need not do.
            longest = max(time.perf_counter() - started, longest / 2)
            under_way = {task for task in under_way if not task.done()}
            while under_way and len(under_way) * longest > timeout_s / 4:
                _, under_way = await asyncio.wait(under_way, return_when=asyncio.FIRST_COMPLETED)
        await asyncio.gather(*under_way)

    loop.run(grade_all())


def _failure(error: BaseException) -> dict:
    if isinstance(error, custom.BadReward):
        return {"error": str(error), "traceback": "", "nonfinite": error.nonfinite}
    text = "".join(traceback.format_exception(error))
    return {"error": f"{type(error).__name__}: {error}", "traceback": text[-20_000:]}


def _end_with(parent: int) -> None:
    """Ends this process when its parent does: at once on Linux, within a second elsewhere."""
    die_with_parent()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
