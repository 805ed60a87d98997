"""RewardModel: completions in, weighted rewards out."""

import dataclasses
import traceback
from collections.abc import Callable, Iterable

import numpy as np

from adpo_jax.rewards import builtin, custom
from adpo_jax.rewards.custom import BadReward, Grades, RewardFunction
from adpo_jax.rewards.errors import RewardError
from adpo_jax.rewards.grading import faults
from adpo_jax.rewards.pool import Job, WorkerPool

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
    """

    total: np.ndarray
    components: dict[str, np.ndarray]
    counts: dict[str, int]

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
        return cls(np.concatenate([part.total for part in parts]), components, counts)

    def select(self, rows: "list[int]") -> "Scores":
        """The rewards of the completions with these numbers, without the counts of the whole."""
        components = {name: values[rows] for name, values in self.components.items()}
        return Scores(self.total[rows], components, dict.fromkeys(self.counts, 0))


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
    ):
        if not functions:
            raise ValueError("RewardModel: no reward function; give at least one")
        if on_timeout not in ("zero", "stop"):
            raise ValueError(f"on_timeout: wanted 'zero' or 'stop', got {on_timeout!r}")
        if num_workers < 0:
            raise ValueError(f"num_workers: wanted 0 or more, got {num_workers}")
        self.functions = list(functions)
        self.names = _distinct([f.name for f in self.functions])
        self._on_timeout = on_timeout
        self._pool: WorkerPool | None = None
        if num_workers:
            for function in self.functions:
                if function.path is None:
                    custom.load(function)
            self._pool = WorkerPool(self.functions, num_workers, timeout_s, memory_limit_mb)
            if any(function.path for function in self.functions):
                self._check()
        else:
            self._found = [custom.load(function) for function in self.functions]

    def score(self, completions: list[str], columns: dict[str, list]) -> Scores:
        """Grades completions.

        Args:
          completions: N strings.
          columns: N values under each column's name, "solution" among them, "completion_tokens"
            where length_penalty is used.

        Raises:
          RewardError: a function failed, or returned something that is no reward.
          ValueError: a column of another length.
        """
        return self.submit(completions, columns).result()

    def submit(self, completions: list[str], columns: dict[str, list]) -> Handle:
        """As score, without waiting for the workers; without workers it grades at once."""
        completions = list(completions)
        for name, values in columns.items():
            if len(values) != len(completions):
                raise ValueError(
                    f"column {name!r} has {len(values)} values for {len(completions)} completions"
                )
        if self._pool is not None:
            wanted = [builtin.COLUMNS[f.name] if f.path is None else None for f in self.functions]
            job = self._pool.submit(completions, columns, wanted)
            return Handle(lambda: self._from_workers(job, completions, columns))
        scores = self._score_here(completions, columns)
        return Handle(lambda: scores)

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

    def _check(self) -> None:
        try:
            self._pool.check()
        except BaseException:
            self._pool.close()
            raise

    def _score_here(self, completions: list[str], columns: dict[str, list]) -> Scores:
        grades = []
        for function, found in zip(self.functions, self._found):
            try:
                grades.append(custom.grade(found, function, completions, columns))
            except BadReward as error:
                raise self._error(
                    function,
                    str(error),
                    error.index,
                    completions,
                    columns,
                    nonfinite=error.nonfinite,
                ) from None
            except Exception as error:
                index = _culprit(found, function, completions, columns)
                message = f"{type(error).__name__}: {error}"
                text = traceback.format_exc()
                raise self._error(function, message, index, completions, columns, text) from error
        counts = dict.fromkeys(_COUNTS, 0)
        counts["unparsed"] = sum(g.unparsed for g in grades)
        counts["grader_faults"] = _logged(fault for g in grades for fault in g.faults)
        return self._combined(grades, counts, [set() for _ in grades], completions, columns)

    def _from_workers(self, job: Job, completions: list[str], columns: dict[str, list]) -> Scores:
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
            grades.append(Grades(parts))
            killed.append({i for i, reply in enumerate(replies) if "killed" in reply})
        return self._combined(grades, counts, killed, completions, columns)

    @np.errstate(over="ignore")  # an update with infinite rewards is not sound, which is noticed
    def _combined(
        self,
        grades: list[Grades],
        counts: dict[str, int],
        killed: list[set[int]],
        completions: list[str],
        columns: dict[str, list],
    ) -> Scores:
        """The weighted sum over functions; skipped samples add nothing, killed ones count 0."""
        total = np.zeros(len(completions))
        has_reward = np.zeros(len(completions), bool)
        components: dict[str, np.ndarray] = {}
        for function, name, given_by, zeros in zip(self.functions, self.names, grades, killed):
            parts = given_by.parts
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
        if not has_reward.all():
            index = int(np.argmin(has_reward))
            message = f"gave None for sample {index}, which leaves it without any reward"
            raise self._error(self.functions[0], message, index, completions, columns)
        return Scores(total.astype(np.float32), components, counts)

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
                "columns": {name: values[index] for name, values in columns.items()},
            }
        return RewardError(
            message,
            function=function.name,
            path=function.path,
            sample=sample,
            traceback_text=traceback_text,
            nonfinite=nonfinite,
        )


def _logged(of_grader: Iterable[str]) -> int:
    """Logs faults of the grader, of each kind the first, and counts all of them."""
    count = 0
    for fault in of_grader:
        faults.log(fault)
        count += 1
    return count


def _distinct(names: list[str]) -> list[str]:
    """Names with a number appended from their second use on."""
    seen: dict[str, int] = {}
    result = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        result.append(name if seen[name] == 1 else f"{name}_{seen[name]}")
    return result


def _culprit(
    found: Callable, function: RewardFunction, completions: list[str], columns: dict[str, list]
) -> int | None:
    """The completion on which a failing function also fails alone; None if there is none."""
    for i in range(len(completions)):
        one = {name: values[i : i + 1] for name, values in columns.items()}
        try:
            custom.grade(found, function, completions[i : i + 1], one)
        except Exception:
            return i
    return None
