"""Processes in which environments live, and what the run asks of them.

An environment lives in one of a few worker processes from its first reset on, and is reset for many
rollouts. Each worker belongs to one thread of the run and answers one thing after the other, while
others answer theirs and samples decode. A call that takes longer than it may has its worker killed,
with all that the worker started: the environments that lived there are lost to their rollouts, and
made again for the next ones.
"""

import atexit
import contextlib
import dataclasses
import queue
import threading
import time
from typing import Any, NamedTuple

from adpo_jax.environments.contract import Described, Spec
from adpo_jax.rewards import wire
from adpo_jax.rewards.pool import WorkerProcess

# What the answer to a request has.
_NEEDED = {
    "describe": {"environments", "several"},
    "reset": {"said", "attributes"},
    "call": {"said", "attributes"},
    "end": {"reward", "attributes"},
}
_START_TIMEOUT_S = 300.0  # a user's file may import much, and a class load much


class EnvironmentFailed(ValueError):
    """An environment that cannot work, or failed where it must not: the run stops."""


class Answer(NamedTuple):
    """What came of a request.

    Attributes:
      tag: what the request was tagged with.
      content: the reply of the worker; {} where there is none.
      error: why there is no reply, or what was raised; "" where all went well.
      kind: of the error: "raised", "unfit" (the environment cannot be used as it is written),
        "cancelled" (an async method took too long), or, where the environment is lost, "timeout",
        "crash" or "lost" (it was, before).
      seconds: that it took.
    """

    tag: Any
    content: dict
    error: str
    kind: str
    seconds: float


@dataclasses.dataclass(eq=False)
class Lease:
    """An environment that one rollout has for itself.

    Attributes:
      worker: where it lives.
      number: the environment's number among all.
      name: which of the environments it is; None where there is one alone.
    """

    worker: "_Worker"
    number: int
    name: str | None
    generation: int = -1  # the worker's process in which it was reset


class _Request(NamedTuple):
    lease: Lease | None
    verb: str
    arguments: dict
    answers: queue.SimpleQueue
    tag: Any


class EnvironmentPool:
    """Environments in worker processes; safe to use from any thread.

    Args:
      num_workers: processes, at least 1.
      timeout_s: seconds for a call of a tool, a reset and a reward.
      memory_limit_mb: memory limit of each worker in MiB; None for no limit.
    """

    def __init__(
        self,
        spec: Spec,
        num_workers: int = 4,
        timeout_s: float = 30.0,
        memory_limit_mb: int | None = 4096,
    ):
        if num_workers < 1 or timeout_s <= 0:
            raise ValueError(
                f"wanted num_workers >= 1 and timeout_s > 0, got {num_workers} and {timeout_s}"
            )
        self.timeout_s = timeout_s
        settings = (spec, timeout_s, memory_limit_mb)
        self._workers = [_Worker(settings, timeout_s) for _ in range(num_workers)]
        self._free: dict[str | None, list[Lease]] = {}
        self._num_made = 0
        self._lock = threading.Lock()
        atexit.register(self.close)

    def describe(self) -> tuple[dict[str, Described], bool]:
        """(the environments by name, under "" where there is one alone; whether there are several).

        Raises:
          EnvironmentFailed: a file, class or tool that cannot work.
        """
        answer = self._wait(None, "describe", {})
        found = {
            name: Described(**(fields | {"reset_needs": tuple(fields["reset_needs"])}))
            for name, fields in answer.content["environments"].items()
        }
        return found, answer.content["several"]

    def try_reset(self, name: str | None, row: dict) -> None:
        """Makes an environment and resets it for a row, to find out whether it can.

        Raises:
          EnvironmentFailed: it cannot.
        """
        lease = self.lease(name)
        self._wait(lease, "reset", {"row": row, "seed": 0})
        self.give_back(lease)

    def _wait(self, lease: Lease | None, verb: str, arguments: dict) -> Answer:
        answers: queue.SimpleQueue[Answer] = queue.SimpleQueue()
        self.ask(lease, verb, arguments, answers)
        answer = answers.get()
        if answer.kind:
            raise EnvironmentFailed(failure_text(verb, answer, self.timeout_s))
        return answer

    def lease(self, name: str | None) -> Lease:
        """An environment for a rollout, one that was used before where there is such."""
        with self._lock:
            if self._free.get(name):
                lease = self._free[name].pop()
            else:
                worker = min(self._workers, key=lambda w: w.num_living)
                worker.num_living += 1
                lease = Lease(worker, self._num_made, name)
                self._num_made += 1
        return lease

    def give_back(self, lease: Lease) -> None:
        """Ends the lease: the environment is free for another rollout."""
        with self._lock:
            self._free.setdefault(lease.name, []).append(lease)

    def ask(
        self,
        lease: Lease | None,
        verb: str,
        arguments: dict,
        answers: queue.SimpleQueue,
        tag: Any = None,
    ) -> None:
        """Asks something of an environment; what is asked of one is done in order.

        Args:
          verb: "reset", "call" or "end", see `worker.House`; "describe" of none.
          answers: takes the `Answer`, with the tag.
        """
        worker = lease.worker if lease else self._workers[0]
        worker.put(_Request(lease, verb, arguments, answers, tag))

    def close(self) -> None:
        """Kills the workers. It may be called again."""
        for worker in self._workers:
            worker.close()
        atexit.unregister(self.close)

    def __enter__(self) -> "EnvironmentPool":
        return self

    def __exit__(self, *exc_info):
        self.close()


def failure_text(verb: str, answer: Answer, timeout_s: float) -> str:
    """What is said of a failure that stops the run."""
    what = {"reset": "its reset", "end": "its get_reward", "describe": "making it"}.get(verb, verb)
    too_long = f"took longer than environment.timeout_s={timeout_s:g}"
    why = {
        "timeout": too_long,
        "cancelled": too_long,
        "crash": "ended its process, or needs more memory than it may have",
        "lost": "comes after its process was killed",
    }.get(answer.kind)
    if answer.kind == "unfit" or (verb == "describe" and not why and not answer.content):
        return answer.error
    text = f"environment: {what} {why or 'failed: ' + answer.error}"
    return f"{text}\n{answer.content.get('traceback', '')}".rstrip()


class _Worker:
    """A worker process and the thread that it belongs to, both started when first needed."""

    def __init__(self, settings: tuple, timeout_s: float):
        self.num_living = 0
        self._settings, self._timeout_s = settings, timeout_s
        self._queue: queue.SimpleQueue[_Request | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._process: WorkerProcess | None = None
        self._generation = 0
        self._closed = False

    def put(self, request: _Request) -> None:
        with self._lock:
            if self._closed:
                raise RuntimeError("the environments are closed")
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._serve, name="environments", daemon=True
                )
                self._thread.start()
        self._queue.put(request)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            process, thread = self._process, self._thread
        self._queue.put(None)
        if process is not None:
            process.kill()
        if thread is not None:
            thread.join()

    def _serve(self) -> None:
        while (request := self._queue.get()) is not None and not self._closed:
            started = time.perf_counter()
            try:
                content = dict(self._ask(request))
                if "kind" not in content and not _NEEDED[request.verb] <= content.keys():
                    raise ValueError("its process answered something else")
            except Exception as error:
                with contextlib.suppress(Exception):
                    self._retire()
                content = {"error": str(error), "kind": "raised"}
            error, kind = content.pop("error", ""), content.pop("kind", "")
            took = time.perf_counter() - started
            request.answers.put(Answer(request.tag, content, error, kind, took))
        self._retire()

    def _ask(self, request: _Request) -> dict:
        answer = self._ask_once(request)
        begins = request.verb in ("describe", "reset")
        if begins and answer.get("kind") == "crash" and not self._closed:
            # The process may have ended long before, by what an earlier call had started in it.
            answer = self._ask_once(request)
        return answer

    def _ask_once(self, request: _Request) -> dict:
        if self._process is None:
            self._start()
        lease, arguments, timeout_s = request.lease, dict(request.arguments), self._timeout_s
        if request.verb == "describe":
            timeout_s = _START_TIMEOUT_S
        elif request.verb == "reset":
            if lease.generation != self._generation:
                timeout_s += _START_TIMEOUT_S  # it has to be made first
            lease.generation = self._generation
            arguments["name"] = lease.name
        elif lease.generation != self._generation:
            return {"error": "its process was killed", "kind": "lost"}
        if lease is not None:
            arguments["number"] = lease.number
        try:
            wire.send_pickle(self._process.connection, (request.verb, arguments), timeout_s)
            # An async method is cancelled by the worker, whose environments live on.
            return wire.receive_json(self._process.connection, 1.1 * timeout_s + 0.1)
        except (TimeoutError, OSError) as error:
            self._retire()
            return {"error": "", "kind": "timeout" if isinstance(error, TimeoutError) else "crash"}

    def _start(self) -> None:
        process = WorkerProcess("adpo_jax.environments.worker")
        with self._lock:
            self._process, closed = process, self._closed
        self._generation += 1
        try:
            if closed:
                raise RuntimeError("the environments are closed")
            wire.send_pickle(process.connection, self._settings, _START_TIMEOUT_S)
            reply = wire.receive_json(process.connection, _START_TIMEOUT_S)
        except OSError as error:
            raise RuntimeError(
                f"a process for environments did not start ({type(error).__name__}); importing "
                "the file of environment.path may have ended it"
            ) from error
        if "refused" in reply:
            raise ValueError(reply["refused"])

    def _retire(self) -> None:
        with self._lock:
            process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.connection.close()
