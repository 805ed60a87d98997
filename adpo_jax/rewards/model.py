"""RewardModel: completions in, weighted rewards out."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from adpo_jax.rewards import binding, custom
from adpo_jax.rewards.backends import Asked, Graded, Here, Workers
from adpo_jax.rewards.binding import NO_RUN, TrainerState
from adpo_jax.rewards.custom import RewardFunction
from adpo_jax.rewards.scores import Handle, Scores

# Before the name of a reward that comes with the completions, as the name of a column.
GIVEN = "reward of "


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
        self.names = _distinct([f.name for f in self.functions] + list(given))
        # Of each name; those that are given are added as they are.
        self.weights = [f.weight for f in self.functions] + [1.0] * len(self._given)
        self._backend: Here | Workers
        if num_workers and self.functions:
            self._backend = Workers(
                self.functions,
                on_timeout,
                num_workers=num_workers,
                timeout_s=timeout_s,
                memory_limit_mb=memory_limit_mb,
            )
        else:
            self._backend = Here(self.functions)

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
        for function, signature in zip(self.functions, self._backend.signatures):
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
        asked = Asked(completions, columns, state, given)
        finish = self._backend.start(asked)
        handle = Handle(lambda: self._combined(asked, finish()))
        if not self.has_workers:
            handle.result()
        return handle

    def takes(self, name: str) -> bool:
        """Whether a function of the user's can use what the loop offers under this name."""
        return any(
            function.path is not None and (signature.takes_any or name in signature.names)
            for function, signature in zip(self.functions, self._backend.signatures)
        )

    @property
    def has_workers(self) -> bool:
        """Whether `submit` returns before the rewards are there."""
        return self._backend.has_workers

    def close(self) -> None:
        """Ends the workers."""
        self._backend.close()

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.close()

    @np.errstate(over="ignore")  # an update with infinite rewards is not sound, which is noticed
    def _combined(self, asked: Asked, graded: Graded) -> Scores:
        """The weighted sum over functions; skipped samples add nothing, killed ones count 0."""
        total = np.zeros(len(asked.completions))
        has_reward = np.zeros(len(asked.completions), bool)
        components: dict[str, np.ndarray] = {}
        logged: dict[str, list[float]] = {}
        extras: dict[str, list] = {}
        results = zip(self.functions, self.names, graded.grades, graded.killed)
        for function, name, grades, zeros in results:
            logged |= {f"{name}/{key}": values for key, values in grades.metrics.items()}
            for key, values in grades.extras.items():
                extras[f"{name}/{key}" if key in extras else key] = values
            table = np.array(list(grades.parts.values()), np.float64)
            table = table.reshape(len(grades.parts), -1)
            table[:, list(zeros)] = 0.0
            rewarded = ~np.isnan(table).all(axis=0)
            own = np.where(rewarded, np.nansum(table, axis=0), np.nan)
            components[name] = own.astype(np.float32)
            for part, row in zip(grades.parts, table):
                if part:
                    components[f"{name}/{part}"] = row.astype(np.float32)
            total += function.weight * np.where(rewarded, own, 0.0)
            has_reward |= rewarded
        for name, values in zip(self.names[len(self.functions) :], asked.given.values()):
            own = np.array(values, np.float64)  # None becomes NaN
            components[name] = own.astype(np.float32)
            total += np.nan_to_num(own)
            has_reward |= ~np.isnan(own)
        if not has_reward.all():
            index = int(np.argmin(has_reward))
            message = f"gave None for sample {index}, which leaves it without any reward"
            culprit = self.functions[0] if self.functions else RewardFunction(name=self.names[0])
            raise asked.error(culprit, message, index)
        return Scores(total.astype(np.float32), components, graded.counts, logged, extras)


def _wanted(got: Any) -> str:
    """The sentence about what was given in place of a `RewardFunction`."""
    if isinstance(got, str):
        cure = f"; a built-in one is RewardFunction(name={got!r})"
    elif callable(got):
        name = getattr(got, "__name__", "f")
        cure = f"; one of your own is RewardFunction(path='its file.py', name={name!r})"
    else:
        cure = ""
    return f"RewardModel: functions is a list of RewardFunction; given {got!r:.80} in it{cure}"


def _distinct(names: list[str]) -> list[str]:
    """Names with a number appended from their second use on."""
    seen: dict[str, int] = {}
    result = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        result.append(name if seen[name] == 1 else f"{name}_{seen[name]}")
    return result
