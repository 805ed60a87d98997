"""RewardModel: completions in, weighted rewards out."""

import asyncio
import contextlib
import dataclasses
import inspect
import time
import traceback
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any

import numpy as np

from adpo_jax.rewards import binding, builtin, custom, leftovers, loop
from adpo_jax.rewards.binding import NO_RUN, TrainerState
from adpo_jax.rewards.custom import BadReward, Grades, RewardFunction
from adpo_jax.rewards.errors import RewardError
from adpo_jax.rewards.grading import faults
from adpo_jax.rewards.pool import Job, WorkerPool

# Before the name of a reward that comes with the completions, as the name of a column.
GIVEN = "reward of "

# Seconds for finding the completion that a function fails on, by grading each of them alone.
_SEARCH_S = 10.0

_COUNTS = ("timeouts", "crashes", "unparsed", "grader_faults")


@dataclasses.dataclass(frozen=True)
class Scores:
    """The rewards of N completions.

    Attributes:
      total: [N] float32, the weighted sum over functions.
      components: [N] float32 under each function's name, unweighted; NaN where the function skipped
        the sample. A function that returns named parts has their sum under its name and each part
        under "name/part".
      counts: "timeouts", checks killed at their deadline; "crashes", checks that ended their worker
        or ran out of memory; "unparsed", completions in which good_accuracy found no answer that it
        can read; "grader_faults", comparisons that failed inside the grader, by a fault of ours.
      logged: the numbers that functions logged, under "function/name".
      extras: N values under each name, which functions logged beside the completions; None where
        one logged nothing. A name that an earlier function took is "function/name".
    """

    total: np.ndarray
    components: dict[str, np.ndarray]
    counts: dict[str, int]
    logged: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    extras: dict[str, list] = dataclasses.field(default_factory=dict)

    @classmethod
    def unknown(cls, count: int, names: list[str]) -> "Scores":
        """Rewards that the functions of these names could not give: NaN."""
        nan = np.full(count, np.nan, np.float32)
        return cls(nan, dict.fromkeys(names, nan), dict.fromkeys(_COUNTS, 0))

    @classmethod
    def concatenate(cls, parts: "list[Scores]") -> "Scores":
        """The rewards of several lists of completions as those of one."""
        names = dict.fromkeys(name for part in parts for name in part.components)
        components = {
            name: np.concatenate(
                [p.components.get(name, np.full_like(p.total, np.nan)) for p in parts]
            )
            for name in names
        }
        counts = {name: sum(part.counts.get(name, 0) for part in parts) for name in _COUNTS}
        names = dict.fromkeys(name for part in parts for name in part.logged)
        logged = {name: [x for p in parts for x in p.logged.get(name, ())] for name in names}
        names = dict.fromkeys(name for part in parts for name in part.extras)
        extras = {
            name: [x for p in parts for x in p.extras.get(name, [None] * len(p.total))]
            for name in names
        }
        total = np.concatenate([part.total for part in parts])
        return cls(total, components, counts, logged, extras)

    def select(self, rows: "list[int]") -> "Scores":
        """The rewards of the completions with these numbers, without the counts of the whole."""
        components = {name: values[rows] for name, values in self.components.items()}
        extras = {name: [values[i] for i in rows] for name, values in self.extras.items()}
        counts = dict.fromkeys(self.counts, 0)
        return Scores(self.total[rows], components, counts, extras=extras)


class Handle:
    """Rewards that are being computed."""

    def __init__(self, finish: Callable[[], Scores]):
        self._finish = finish
        self._scores: Scores | None = None

    def result(self) -> Scores:
        """Waits for the rewards.

        Raises:
          RewardError: a function failed, or returned something that is no reward.
        """
        if self._scores is None:
            self._scores = self._finish()
        return self._scores


class RewardModel:
    """Several weighted reward functions, in this process or in a pool of workers.

    Args:
      functions: at least one.
      num_workers: processes that grade; 0 grades in this process, where nothing stops a function
        that hangs. Workers call a function with one completion at a time, this process with all.
      timeout_s: seconds that a worker may take for one completion in one function.
      on_timeout: whether a check that was killed counts 0 ("zero") or stops the run ("stop").
      memory_limit_mb: memory limit of each worker in MiB; None for no limit.
      given: the names of rewards that come with the completions, each as a column of `GIVEN` and
        the name; they are added with the weight 1. Where there are such, functions may be none.

    Raises:
      ValueError: a setting out of its range, or a function that cannot be loaded.
    """

    def __init__(
        self,
        functions: list[RewardFunction],
        num_workers: int = 0,
        timeout_s: float = 10.0,
        on_timeout: str = "zero",
        memory_limit_mb: int | None = 4096,
        given: Sequence[str] = (),
    ):
        if not functions and not given:
            raise ValueError("RewardModel: no reward function; give at least one")
        for function in functions:
            if not isinstance(function, RewardFunction):
                raise ValueError(_wanted(function))
        if on_timeout not in ("zero", "stop"):
            raise ValueError(f"on_timeout: wanted 'zero' or 'stop', got {on_timeout!r}")
        if num_workers < 0:
            raise ValueError(f"num_workers: wanted 0 or more, got {num_workers}")
        for function in functions:
            if function.path is None and function.name in custom.NEED_WORKERS and not num_workers:
                raise ValueError(
                    f"reward function {function.name} works out what a model wrote, which only a "
                    "worker can be stopped at: set custom_reward_function.num_workers above 0"
                )
        self.functions = list(functions)
        self._given = tuple(given)
        names = _distinct([f.name for f in self.functions] + list(given))
        self.names = names
        self._on_timeout = on_timeout
        self._pool: WorkerPool | None = None
        if num_workers and self.functions:
            for function in self.functions:
                if function.path is None:
                    custom.load(function)
            self._pool = WorkerPool(self.functions, num_workers, timeout_s, memory_limit_mb)
            if any(function.path for function in self.functions):
                self._signatures = self._check()
            else:
                found = [custom.BUILTINS[function.name] for function in self.functions]
                self._signatures = [binding.signature_of(f) for f in found]
        else:
            with self._started_here():
                self._found = [custom.load(function) for function in self.functions]
            self._signatures = [binding.signature_of(found) for found in self._found]

    def check_columns(self, columns: Iterable[str], what: str = "the data") -> None:
        """Checks that every function can grade data that has these columns.

        Args:
          columns: the names of the data's columns, "solution" among them.
          what: what the data is called in the error.

        Raises:
          ValueError: a function needs a column that there is not, or a column has the name of what
            the training loop offers.
        """
        columns = list(columns)
        binding.refuse_columns(columns)
        for function, signature in zip(self.functions, self._signatures):
            custom.check_columns(signature, function, columns, what)

    def score(
        self,
        completions: list[str],
        columns: dict[str, list],
        state: TrainerState = NO_RUN,
    ) -> Scores:
        """Grades completions.

        Args:
          completions: N strings.
          columns: N values under each column's name, "solution" among them, and of what the loop
            offers (`binding.OFFERED`) "prompts", "completion_ids" and "completion_tokens" where a
            function takes them. A completion comes as messages where its prompt is a list of
            messages, else as text.
          state: how far the run has come, for functions that ask.

        Raises:
          RewardError: a function failed, or returned something that is no reward.
          ValueError: a column of another length.
        """
        return self.submit(completions, columns, state).result()

    def submit(
        self,
        completions: list[str],
        columns: dict[str, list],
        state: TrainerState = NO_RUN,
    ) -> Handle:
        """As score, without waiting for the workers; without workers it grades at once."""
        completions = list(completions)
        for name, values in columns.items():
            if len(values) != len(completions):
                raise ValueError(
                    f"column {name!r} has {len(values)} values for {len(completions)} completions"
                )
        given = {name: columns[GIVEN + name] for name in self._given}
        columns = {name: v for name, v in columns.items() if not name.startswith(GIVEN)}
        if self._pool is not None:
            # Completions of several turns come as messages where their prompts are such.
            always = ("transcripts", "prompts") if "transcripts" in columns else ()
            wanted = [
                builtin.COLUMNS[f.name]
                if f.path is None
                else signature.columns and (*signature.columns, *always)
                for f, signature in zip(self.functions, self._signatures)
            ]
            job = self._pool.submit(completions, columns, wanted, state)
            return Handle(lambda: self._from_workers(job, completions, columns, given))
        scores = self._score_here(completions, columns, state, given)
        return Handle(lambda: scores)

    def takes(self, name: str) -> bool:
        """Whether a function of the user's can use what the loop offers under this name."""
        return any(
            function.path is not None and (signature.takes_any or name in signature.names)
            for function, signature in zip(self.functions, self._signatures)
        )

    @property
    def has_workers(self) -> bool:
        """Whether `submit` returns before the rewards are there."""
        return self._pool is not None

    def close(self) -> None:
        """Ends the workers."""
        if self._pool is not None:
            self._pool.close()

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.close()

    def _started_here(self) -> contextlib.AbstractContextManager:
        """While functions of the user's run in this process: what they start ends with it."""
        if any(function.path for function in self.functions):
            return leftovers.marked()
        return contextlib.nullcontext()

    def _check(self) -> list[binding.Signature]:
        try:
            return self._pool.check()
        except BaseException:
            self._pool.close()
            raise

    def _score_here(
        self,
        completions: list[str],
        columns: dict[str, list],
        state: TrainerState,
        given: dict[str, list],
    ) -> Scores:
        with faults.collected() as of_grader, self._started_here():
            grades = self._graded_here(completions, columns, state)
        counts = dict.fromkeys(_COUNTS, 0)
        counts["unparsed"] = sum(g.unparsed for g in grades)
        counts["grader_faults"] = _logged([*of_grader, *(x for g in grades for x in g.faults)])
        return self._combined(grades, counts, [set() for _ in grades], completions, columns, given)

    def _graded_here(
        self, completions: list[str], columns: dict[str, list], state: TrainerState
    ) -> list[Grades]:
        grades: list[Grades | None] = [None] * len(self.functions)
        waiting = {}  # async functions, which are awaited together
        for i, (function, found) in enumerate(zip(self.functions, self._found)):
            with self._told(i, completions, columns, state):
                if found is builtin.good_accuracy:
                    grades[i] = custom.grade(found, function, completions, columns, state)
                    continue
                call = custom.Call(found, function, completions, columns, state)
                result = call.start()
                if inspect.isawaitable(result):
                    waiting[i] = call, result
                else:
                    grades[i] = call.grades(result)
        results = []
        if waiting:
            results = loop.run(_all_ended([result for _, result in waiting.values()]))
        for (i, (call, _)), result in zip(waiting.items(), results):
            with self._told(i, completions, columns, state):
                if isinstance(result, BaseException):
                    raise result
                grades[i] = call.grades(result)
        return grades

    @contextlib.contextmanager
    def _told(self, i: int, completions: list[str], columns: dict[str, list], state: TrainerState):
        """Turns what function `i` raises into a RewardError with the sample at fault."""
        function = self.functions[i]
        try:
            yield
        except BadReward as error:
            raise self._error(
                function, str(error), error.index, completions, columns, nonfinite=error.nonfinite
            ) from None
        except (Exception, SystemExit) as error:
            index = _culprit(self._found[i], function, completions, columns, state)
            message = f"{type(error).__name__}: {error}"
            text = traceback.format_exc()
            raise self._error(function, message, index, completions, columns, text) from error

    def _from_workers(
        self,
        job: Job,
        completions: list[str],
        columns: dict[str, list],
        given: dict[str, list],
    ) -> Scores:
        job.wait()
        counts = dict.fromkeys(_COUNTS, 0)
        # The order is fixed, so that the same one of several failures is reported.
        for (index, position), reply in sorted(job.outcomes.items()):
            function = self.functions[index]
            if "error" in reply:
                raise self._error(
                    function,
                    reply["error"],
                    position,
                    completions,
                    columns,
                    reply["traceback"],
                    nonfinite=reply.get("nonfinite", False),
                )
            counts["unparsed"] += reply.get("unparsed", 0)
            counts["grader_faults"] += _logged(reply.get("faults", ()))
            if "killed" in reply:
                counts[reply["killed"]] += 1
                if self._on_timeout == "stop":
                    why = "ran past its deadline" if reply["killed"] == "timeouts" else "crashed"
                    raise self._error(
                        function, f"{why} and was killed", position, completions, columns
                    )
        grades, killed = [], []
        for index in range(len(self.functions)):
            replies = [job.outcomes[index, position] for position in range(len(completions))]
            names = {name: None for reply in replies for name in reply.get("parts", {})}
            parts = {
                name: [reply.get("parts", {}).get(name, [None])[0] for reply in replies]
                for name in names or {"": None}
            }
            metrics, extras = _joined(replies)
            grades.append(Grades(parts, metrics=metrics, extras=extras))
            killed.append({i for i, reply in enumerate(replies) if "killed" in reply})
        return self._combined(grades, counts, killed, completions, columns, given)

    @np.errstate(over="ignore")  # an update with infinite rewards is not sound, which is noticed
    def _combined(
        self,
        grades: list[Grades],
        counts: dict[str, int],
        killed: list[set[int]],
        completions: list[str],
        columns: dict[str, list],
        brought: dict[str, list],
    ) -> Scores:
        """The weighted sum over functions; skipped samples add nothing, killed ones count 0."""
        total = np.zeros(len(completions))
        has_reward = np.zeros(len(completions), bool)
        components: dict[str, np.ndarray] = {}
        logged: dict[str, list[float]] = {}
        extras: dict[str, list] = {}
        for function, name, graded, zeros in zip(self.functions, self.names, grades, killed):
            parts = graded.parts
            logged |= {f"{name}/{key}": values for key, values in graded.metrics.items()}
            for key, values in graded.extras.items():
                extras[f"{name}/{key}" if key in extras else key] = values
            table = np.array(list(parts.values()), np.float64).reshape(len(parts), -1)
            table[:, list(zeros)] = 0.0
            given = ~np.isnan(table).all(axis=0)
            own = np.where(given, np.nansum(table, axis=0), np.nan)
            components[name] = own.astype(np.float32)
            for part, row in zip(parts, table):
                if part:
                    components[f"{name}/{part}"] = row.astype(np.float32)
            total += function.weight * np.where(given, own, 0.0)
            has_reward |= given
        for name, values in zip(self.names[len(self.functions) :], brought.values()):
            own = np.array(values, np.float64)  # None becomes NaN
            components[name] = own.astype(np.float32)
            total += np.nan_to_num(own)
            has_reward |= ~np.isnan(own)
        if not has_reward.all():
            index = int(np.argmin(has_reward))
            message = f"gave None for sample {index}, which leaves it without any reward"
            culprit = self.functions[0] if self.functions else RewardFunction(name=self.names[0])
            raise self._error(culprit, message, index, completions, columns)
        return Scores(total.astype(np.float32), components, counts, logged, extras)

    def _error(
        self,
        function: RewardFunction,
        message: str,
        index: int | None,
        completions: list[str],
        columns: dict[str, list],
        traceback_text: str = "",
        *,
        nonfinite: bool = False,
    ) -> RewardError:
        sample = None
        if index is not None:
            sample = {
                "index": index,
                "completion": completions[index],
                "columns": {
                    name: values[index]
                    for name, values in columns.items()
                    if name not in ("prompts", "completion_ids")  # the data's columns say them
                },
            }
        return RewardError(
            message,
            function=function.name,
            path=function.path,
            sample=sample,
            traceback_text=traceback_text,
            nonfinite=nonfinite,
        )


async def _all_ended(awaitables: list) -> list:
    """The results of all, or what they raised."""
    return await asyncio.gather(*map(_without_exit, awaitables), return_exceptions=True)


async def _without_exit(awaitable: Awaitable) -> Any:
    """What is awaited; an attempt to end the process becomes an error like others."""
    try:
        return await awaitable
    except SystemExit as error:
        raise RuntimeError(f"SystemExit: {error}") from error


def _joined(replies: list[dict]) -> tuple[dict[str, list[float]], dict[str, list]]:
    """What one function logged for single completions as what it logged for all of them."""
    metrics: dict[str, list[float]] = {}
    extras: dict[str, list] = {}
    for i, reply in enumerate(replies):
        for name, values in reply.get("metrics", {}).items():
            metrics.setdefault(name, []).extend(values)
        for name, (value,) in reply.get("extras", {}).items():
            extras.setdefault(name, [None] * len(replies))[i] = value
    return metrics, extras


def _logged(of_grader: Iterable[str]) -> int:
    """Logs faults of the grader, of each kind the first, and counts all of them."""
    count = 0
    for fault in of_grader:
        faults.log(fault)
        count += 1
    return count


def _wanted(given: Any) -> str:
    """The sentence about what was given in place of a `RewardFunction`."""
    if isinstance(given, str):
        cure = f"; a built-in one is RewardFunction(name={given!r})"
    elif callable(given):
        name = getattr(given, "__name__", "f")
        cure = f"; one of your own is RewardFunction(path='its file.py', name={name!r})"
    else:
        cure = ""
    return f"RewardModel: functions is a list of RewardFunction; given {given!r:.80} in it{cure}"


def _distinct(names: list[str]) -> list[str]:
    """Names with a number appended from their second use on."""
    seen: dict[str, int] = {}
    result = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        result.append(name if seen[name] == 1 else f"{name}_{seen[name]}")
    return result


def _culprit(
    found: Callable,
    function: RewardFunction,
    completions: list[str],
    columns: dict[str, list],
    state: TrainerState,
) -> int | None:
    """The completion on which a failing function also fails alone; None if none is found in time.

    A failure may have passed by then, and a slow function would hold up the error for long.
    """
    end = time.monotonic() + _SEARCH_S
    for i in range(len(completions)):
        if time.monotonic() > end:
            break
        one = {name: values[i : i + 1] for name, values in columns.items()}
        try:
            custom.grade(found, function, completions[i : i + 1], one, state)
        except (Exception, SystemExit):
            return i
    return None
