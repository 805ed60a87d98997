"""The two places where reward functions run, this process and a pool of workers.

Each is asked to grade completions (`Asked`) and says what the functions gave (`Graded`).
"""

import asyncio
import contextlib
import dataclasses
import functools
import inspect
import time
import traceback
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, NamedTuple

from adpo_jax.rewards import binding, builtin, custom, leftovers, loop
from adpo_jax.rewards.binding import TrainerState
from adpo_jax.rewards.custom import BadReward, Grades, RewardFunction
from adpo_jax.rewards.errors import RewardError
from adpo_jax.rewards.grading import faults
from adpo_jax.rewards.pool import Job, WorkerPool
from adpo_jax.rewards.scores import COUNTS

# Seconds for finding the completion that a function fails on, by grading each of them alone.
_SEARCH_S = 10.0


@dataclasses.dataclass(frozen=True)
class Asked:
    """Completions to grade.

    Attributes:
      completions: N strings.
      columns: N values under each name.
      state: how far the run has come.
      given: N rewards under each name that came with the completions; None where there is none.
    """

    completions: list[str]
    columns: dict[str, list]
    state: TrainerState
    given: dict[str, list]

    def alone(self, index: int) -> "Asked":
        """One of the completions."""
        one = slice(index, index + 1)
        columns = {name: values[one] for name, values in self.columns.items()}
        given = {name: values[one] for name, values in self.given.items()}
        return Asked(self.completions[one], columns, self.state, given)

    def sample(self, index: int) -> dict:
        """One of the completions as a `RewardError` has it."""
        columns = {
            name: values[index]
            for name, values in self.columns.items()
            if name not in ("prompts", "completion_ids")  # the data's columns say them
        }
        return {"index": index, "completion": self.completions[index], "columns": columns}

    def error(
        self, function: RewardFunction, message: str, index: int | None, **details
    ) -> RewardError:
        """The error that a function failed, on the completion of this number if on one of them."""
        sample = None if index is None else self.sample(index)
        return RewardError(
            message, function=function.name, path=function.path, sample=sample, **details
        )


class Graded(NamedTuple):
    """What the functions gave.

    Attributes:
      grades: those of each function.
      killed: the numbers of the completions at which each function was killed.
      counts: as in `Scores`.
    """

    grades: list[Grades]
    killed: list[set[int]]
    counts: dict[str, int]


class Here:
    """Functions in this process, which are called with all completions.

    Raises:
      ValueError: a function that cannot be loaded.
    """

    has_workers = False

    def __init__(self, functions: list[RewardFunction]):
        self._functions = functions
        with self._marked():
            self._found = [custom.load(function) for function in functions]
        self.signatures = [binding.signature_of(found) for found in self._found]

    def start(self, asked: Asked) -> Callable[[], Graded]:
        """A function that grades the completions."""
        return functools.partial(self._graded, asked)

    def close(self) -> None:
        """Does nothing, since nothing was started."""

    def _marked(self) -> contextlib.AbstractContextManager:
        """While functions of the user's run in this process: what they start ends with it."""
        if any(function.path for function in self._functions):
            return leftovers.marked()
        return contextlib.nullcontext()

    def _graded(self, asked: Asked) -> Graded:
        with faults.collected() as of_grader, self._marked():
            grades = self._grades(asked)
        counts = dict.fromkeys(COUNTS, 0)
        counts["unparsed"] = sum(g.unparsed for g in grades)
        counts["grader_faults"] = _logged([*of_grader, *(x for g in grades for x in g.faults)])
        return Graded(grades, [set() for _ in grades], counts)

    def _grades(self, asked: Asked) -> list[Grades]:
        grades: list[Grades | None] = [None] * len(self._functions)
        bundle = asked.completions, asked.columns, asked.state
        waiting = {}  # async functions, which are awaited together
        for i, (function, found) in enumerate(zip(self._functions, self._found)):
            with self._told(i, asked):
                if found is builtin.good_accuracy:
                    grades[i] = custom.grade(found, function, *bundle)
                    continue
                call = custom.Call(found, function, *bundle)
                result = call.start()
                if inspect.isawaitable(result):
                    waiting[i] = call, result
                else:
                    grades[i] = call.grades(result)
        results = []
        if waiting:
            results = loop.run(_all_ended([result for _, result in waiting.values()]))
        for (i, (call, _)), result in zip(waiting.items(), results):
            with self._told(i, asked):
                if isinstance(result, BaseException):
                    raise result
                grades[i] = call.grades(result)
        return grades

    @contextlib.contextmanager
    def _told(self, i: int, asked: Asked):
        """Turns what function `i` raises into a RewardError with the sample at fault."""
        function = self._functions[i]
        try:
            yield
        except BadReward as error:
            raise asked.error(
                function, str(error), error.index, nonfinite=error.nonfinite
            ) from None
        except (Exception, SystemExit) as error:
            index = _culprit(self._found[i], function, asked)
            message = f"{type(error).__name__}: {error}"
            text = traceback.format_exc()
            raise asked.error(function, message, index, traceback_text=text) from error


class Workers:
    """Functions in a pool of workers, which call them with one completion at a time.

    Args:
      functions: at least one.
      on_timeout: whether a check that was killed counts 0 ("zero") or stops the run ("stop").
      settings: the further arguments of `WorkerPool`.

    Raises:
      ValueError: a function that cannot be loaded.
    """

    has_workers = True

    def __init__(self, functions: list[RewardFunction], on_timeout: str, **settings):
        self._functions, self._on_timeout = functions, on_timeout
        found = [custom.load(function) for function in functions if function.path is None]
        self.pool = WorkerPool(functions, **settings)
        if len(found) == len(functions):
            self.signatures = [binding.signature_of(f) for f in found]
            return
        try:
            self.signatures = self.pool.check()
        except BaseException:
            self.pool.close()
            raise

    def start(self, asked: Asked) -> Callable[[], Graded]:
        """Has the workers grade the completions; returns a function that waits for them."""
        # Completions of several turns come as messages where their prompts are such.
        always = ("transcripts", "prompts") if "transcripts" in asked.columns else ()
        wanted = [
            builtin.COLUMNS[function.name]
            if function.path is None
            else signature.columns and (*signature.columns, *always)
            for function, signature in zip(self._functions, self.signatures)
        ]
        job = self.pool.submit(asked.completions, asked.columns, wanted, asked.state)
        return functools.partial(self._graded, job, asked)

    def close(self) -> None:
        """Ends the workers."""
        self.pool.close()

    def _graded(self, job: Job, asked: Asked) -> Graded:
        job.wait()
        counts = dict.fromkeys(COUNTS, 0)
        # The order is fixed, so that the same one of several failures is reported.
        for (index, position), reply in sorted(job.outcomes.items()):
            function = self._functions[index]
            if "error" in reply:
                raise asked.error(
                    function,
                    reply["error"],
                    position,
                    traceback_text=reply["traceback"],
                    nonfinite=reply.get("nonfinite", False),
                )
            counts["unparsed"] += reply.get("unparsed", 0)
            counts["grader_faults"] += _logged(reply.get("faults", ()))
            if "killed" in reply:
                counts[reply["killed"]] += 1
                if self._on_timeout == "stop":
                    why = "ran past its deadline" if reply["killed"] == "timeouts" else "crashed"
                    raise asked.error(function, f"{why} and was killed", position)
        grades, killed = [], []
        for index in range(len(self._functions)):
            replies = [job.outcomes[index, place] for place in range(len(asked.completions))]
            grades.append(_joined(replies))
            killed.append({i for i, reply in enumerate(replies) if "killed" in reply})
        return Graded(grades, killed, counts)


async def _all_ended(awaitables: list) -> list:
    """The results of all, or what they raised."""
    return await asyncio.gather(*map(_without_exit, awaitables), return_exceptions=True)


async def _without_exit(awaitable: Awaitable) -> Any:
    """What is awaited; an attempt to end the process becomes an error like others."""
    try:
        return await awaitable
    except SystemExit as error:
        raise RuntimeError(f"SystemExit: {error}") from error


def _joined(replies: list[dict]) -> Grades:
    """What one function gave for single completions as what it gave for all of them."""
    names = {name: None for reply in replies for name in reply.get("parts", {})}
    parts = {
        name: [reply.get("parts", {}).get(name, [None])[0] for reply in replies]
        for name in names or {"": None}
    }
    metrics: dict[str, list[float]] = {}
    extras: dict[str, list] = {}
    for i, reply in enumerate(replies):
        for name, values in reply.get("metrics", {}).items():
            metrics.setdefault(name, []).extend(values)
        for name, (value,) in reply.get("extras", {}).items():
            extras.setdefault(name, [None] * len(replies))[i] = value
    return Grades(parts, metrics=metrics, extras=extras)


def _logged(of_grader: Iterable[str]) -> int:
    """Logs faults of the grader, of each kind the first, and counts all of them."""
    count = 0
    for fault in of_grader:
        faults.log(fault)
        count += 1
    return count


def _culprit(found: Callable, function: RewardFunction, asked: Asked) -> int | None:
    """The completion on which a failing function also fails alone; None if none is found in time.

    A failure may have passed by then, and a slow function would hold up the error for long.
    """
    end = time.monotonic() + _SEARCH_S
    for i in range(len(asked.completions)):
        if time.monotonic() > end:
            break
        one = asked.alone(i)
        try:
            custom.grade(found, function, one.completions, one.columns, one.state)
        except (Exception, SystemExit):
            return i
    return None
