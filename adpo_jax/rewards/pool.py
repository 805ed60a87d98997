"""Worker processes that grade under a deadline.

Each worker belongs to one thread of the run. The thread starts its worker when there is first
something to do, hands it a chunk of completions, and reads one reply a completion. If no reply
comes within the deadline, the worker is killed with all that it started, the completion counts as
killed, and a fresh worker takes the rest. A worker that dies by itself is replaced likewise, and
its completion is tried once more. Where an async function had several completions under way, none
is blamed: the fresh worker gets the rest of the chunk one by one.
"""

import atexit
import contextlib
import os
import pickle
import queue
import signal
import socket
import subprocess
import sys
import threading
import weakref
from collections.abc import Sequence
from typing import NamedTuple

from adpo_jax.rewards import wire
from adpo_jax.rewards.binding import NO_RUN, Signature, TrainerState
from adpo_jax.rewards.custom import RewardFunction

_START_TIMEOUT_S = 300.0  # a user's file may import much
_SUPERVISOR_S = 10.0  # for a supervisor to kill what its worker started
_MAX_CHUNK = 64


class Chunk(NamedTuple):
    """Completions to grade with one of the functions."""

    job: "Job"
    function: int
    positions: list[int]
    completions: list[str]
    columns: dict[str, list]
    state: TrainerState


class Job:
    """The grading of a batch: outcomes arrive in any order."""

    def __init__(self, num_chunks: int):
        # The worker's reply for each (function, position).
        self.outcomes: dict[tuple[int, int], dict] = {}
        self.error: Exception | None = None
        self._left = num_chunks
        self._lock = threading.Lock()
        self._done = threading.Event()
        if not num_chunks:
            self._done.set()

    @property
    def is_over(self) -> bool:
        return self._done.is_set()

    def finish_chunk(self) -> None:
        with self._lock:
            self._left -= 1
            if self._left == 0:
                self._done.set()

    def stop(self) -> None:
        """Ends the job early: an outcome says why."""
        self._done.set()

    def fail(self, error: Exception) -> None:
        with self._lock:
            self.error = self.error or error
            self._done.set()

    def wait(self) -> None:
        """Waits until all outcomes are there or the job has stopped. Raises why it failed."""
        self._done.wait()
        if self.error is not None:
            raise self.error


class WorkerPool:
    """Processes that run reward functions; safe to use from any thread.

    Args:
      functions: what the workers run.
      num_workers: how many, at least 1.
      timeout_s: seconds for one completion in one function.
      memory_limit_mb: memory limit of each worker in MiB; None for no limit.
      recycle_after: completions after which a fresh worker replaces a worker, which bounds the
        memory of a leak.
    """

    def __init__(
        self,
        functions: Sequence[RewardFunction],
        num_workers: int,
        timeout_s: float,
        memory_limit_mb: int | None = 4096,
        recycle_after: int = 100_000,
    ):
        if num_workers < 1 or timeout_s <= 0 or recycle_after < 1:
            raise ValueError(
                "wanted num_workers >= 1, timeout_s > 0 and recycle_after >= 1, "
                f"got {num_workers}, {timeout_s} and {recycle_after}"
            )
        self._settings = (list(functions), timeout_s, memory_limit_mb)
        self._num_workers = num_workers
        self._timeout_s = timeout_s
        self._recycle_after = recycle_after
        self._queue: queue.SimpleQueue[Chunk | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._workers: set[WorkerProcess] = set()
        self._jobs: weakref.WeakSet[Job] = weakref.WeakSet()
        self._closed = False
        self._signatures: list[Signature] = []
        self._are_async: list[bool] = []  # of each function, whether completions wait together
        atexit.register(self.close)

    def check(self) -> list[Signature]:
        """Starts a worker, which loads the functions; returns what each takes.

        Raises:
          ValueError: a function that cannot be loaded.
        """
        job = Job(1)
        self._enqueue([Chunk(job, 0, [], [], {}, NO_RUN)], job)
        job.wait()
        return self._signatures

    def submit(
        self,
        completions: list[str],
        columns: dict[str, list],
        wanted: list[tuple[str, ...] | None],
        state: TrainerState = NO_RUN,
    ) -> Job:
        """Starts grading a batch with every function.

        Args:
          completions: N strings.
          columns: N values under each name.
          wanted: the columns that each function takes; None for all.
          state: how far the run has come.

        Raises:
          ValueError: a column cannot be sent to another process.
        """
        size = max(1, min(_MAX_CHUNK, len(completions) // (4 * self._num_workers)))
        starts = range(0, len(completions), size)
        job = Job(len(starts) * len(wanted))
        chunks = []
        for function, names in enumerate(wanted):
            taken = columns if names is None else {n: columns[n] for n in names if n in columns}
            _refuse_unpicklable(taken)
            for start in starts:
                part = slice(start, start + size)
                positions = list(range(*part.indices(len(completions))))
                sliced = {name: list(values[part]) for name, values in taken.items()}
                chunks.append(Chunk(job, function, positions, completions[part], sliced, state))
        self._enqueue(chunks, job)
        return job

    def worker_ids(self) -> list[int]:
        """The process ids of the live workers."""
        with self._lock:
            return [worker.process.pid for worker in self._workers]

    def close(self) -> None:
        """Kills the workers; jobs that are not graded by then fail. It may be called again."""
        with self._lock:
            self._closed = True
            workers, threads, jobs = set(self._workers), self._threads, list(self._jobs)
            self._threads = []
        for job in jobs:
            if not job.is_over:
                job.fail(RuntimeError("the reward workers were closed while grading"))
        for _ in threads:
            self._queue.put(None)
        for worker in workers:
            worker.kill()
        for thread in threads:
            thread.join()
        atexit.unregister(self.close)

    def _enqueue(self, chunks: list[Chunk], job: Job) -> None:
        with self._lock:
            if self._closed:
                raise RuntimeError("the reward workers are closed")
            self._jobs.add(job)
            while len(self._threads) < self._num_workers:
                thread = threading.Thread(target=self._serve, name="reward-worker", daemon=True)
                self._threads.append(thread)
                thread.start()
        for chunk in chunks:
            self._queue.put(chunk)

    def _serve(self) -> None:
        """The loop of a thread, which grades chunks with a worker of its own."""
        worker: WorkerProcess | None = None
        while (chunk := self._queue.get()) is not None:
            try:
                worker = self._grade(worker, chunk)
                chunk.job.finish_chunk()
            except Exception as error:
                self._retire(worker)
                worker = None
                chunk.job.fail(error)
            del chunk
        self._retire(worker)

    def _grade(self, worker: "WorkerProcess | None", chunk: Chunk) -> "WorkerProcess | None":
        """Grades a chunk; returns the worker to go on with, or None if it had to be killed."""
        places = {position: i for i, position in enumerate(chunk.positions)}  # still to grade
        deaths: dict[int, int] = {}
        one_by_one = False
        while not chunk.job.is_over:
            if worker is not None and worker.served >= self._recycle_after:
                self._retire(worker)
                worker = None
            if worker is None:
                worker = self._start()
            if not places:
                break
            asked = list(places)[:1] if one_by_one else list(places)
            try:
                if not self._ask(worker, chunk, places, asked):
                    chunk.job.stop()
                    self._retire(worker)  # it is still busy with the rest of the chunk
                    return None
            except (TimeoutError, OSError) as error:
                timed_out = isinstance(error, TimeoutError)
                self._retire(worker)
                worker = None
                if self._closed:
                    raise RuntimeError("the reward workers were closed while grading") from None
                first, *others = (position for position in asked if position in places)
                if others and self._are_async[chunk.function]:
                    one_by_one = True  # any of them may have been at work
                    continue
                deaths[first] = deaths.get(first, 0) + 1
                if timed_out or deaths[first] > 1:
                    del places[first]
                    killed = {"killed": "timeouts" if timed_out else "crashes"}
                    chunk.job.outcomes[chunk.function, first] = killed
        return worker

    def _ask(
        self, worker: "WorkerProcess", chunk: Chunk, places: dict[int, int], asked: list[int]
    ) -> bool:
        """Has a worker grade positions of a chunk, and takes each graded one off `places`.

        Returns:
          False when a function failed, upon which the run stops.
        """
        rows = [places[position] for position in asked]
        message = (
            chunk.function,
            asked,
            [chunk.completions[i] for i in rows],
            {name: [values[i] for i in rows] for name, values in chunk.columns.items()},
            chunk.state,
        )
        deadline_s = 1.1 * self._timeout_s + 0.1  # with a margin for work outside of the function
        wire.send_pickle(worker.connection, message, deadline_s)
        for _ in asked:
            reply = wire.receive_json(worker.connection, deadline_s)
            worker.served += 1
            position = reply.pop("position")
            chunk.job.outcomes[chunk.function, position] = reply
            del places[position]
            if "error" in reply:
                return False
        return True

    def _start(self) -> "WorkerProcess":
        worker = WorkerProcess()
        with self._lock:
            closed = self._closed
            self._workers.add(worker)
        if closed:
            self._retire(worker)
            raise RuntimeError("the reward workers are closed")
        try:
            wire.send_pickle(worker.connection, self._settings, _START_TIMEOUT_S)
            reply = wire.receive_json(worker.connection, _START_TIMEOUT_S)
        except OSError as error:
            self._retire(worker)
            raise RuntimeError(
                f"a reward worker did not start ({type(error).__name__}); importing the reward "
                "functions' files may have ended it"
            ) from error
        if "refused" in reply:
            self._retire(worker)
            raise ValueError(reply["refused"])
        self._signatures = [Signature(*map(_as_tuple, found)) for found in reply["signatures"]]
        self._are_async = reply["are_async"]
        return worker

    def _retire(self, worker: "WorkerProcess | None") -> None:
        if worker is not None:
            worker.kill()
            worker.connection.close()
            with self._lock:
                self._workers.discard(worker)


class WorkerProcess:
    """A process (on Linux a worker's supervisor, see `supervisor`) and the socket to its worker.

    Args:
      module: the module whose `main` the process runs.
    """

    def __init__(self, module: str = "adpo_jax.rewards.worker"):
        self.served = 0
        self.connection, theirs = socket.socketpair()
        lifeline, self._lifeline = os.pipe()
        descriptors = (theirs.fileno(), lifeline)
        code = (
            f"import sys; sys.path[:] = {sys.path!r}; "
            f"from {module} import main; main(*{descriptors}, {os.getpid()})"
        )
        # A worker that imports JAX must not take the run's accelerator, nor all of the cores.
        environment = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"} | os.environ
        environment["JAX_PLATFORMS"] = "cpu"
        self._ending = threading.Lock()
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-c", code],
                stdin=subprocess.DEVNULL,
                pass_fds=descriptors,
                start_new_session=True,
                env=environment,
            )
        finally:
            theirs.close()
            os.close(lifeline)

    def kill(self) -> None:
        """Kills the process with all that it started, and waits. May be called from any thread."""
        with self._ending:
            if self.process.returncode is None:
                self._end()
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)  # wakes the thread that waits for a reply

    def _end(self) -> None:
        if sys.platform == "linux":
            # A byte is noticed even where a forked child of the run holds the pipe open.
            with contextlib.suppress(OSError):
                os.write(self._lifeline, b".")
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(_SUPERVISOR_S)
        if self.process.returncode is None:
            try:
                os.killpg(self.process.pid, signal.SIGKILL)
            except (ProcessLookupError, PermissionError):
                self.process.kill()
            self.process.wait()
        os.close(self._lifeline)


def _as_tuple(value):
    return tuple(value) if isinstance(value, list) else value


def _refuse_unpicklable(columns: dict[str, list]) -> None:
    for name, values in columns.items():
        try:
            pickle.dumps(values[:1], pickle.HIGHEST_PROTOCOL)
        except Exception as error:
            raise ValueError(
                f"column {name!r} cannot be sent to the reward workers: {error}; "
                "drop it or grade in process (num_workers 0)"
            ) from error
