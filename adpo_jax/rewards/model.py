"""RewardModel: completions in, weighted rewards out."""

import dataclasses
import math
import traceback

import numpy as np

from adpo_jax.rewards import builtin, custom
from adpo_jax.rewards.custom import RewardFunction
from adpo_jax.rewards.errors import RewardError


@dataclasses.dataclass(frozen=True)
class Scores:
    """The rewards of N completions.

    Attributes:
      total: [N] float32, the weighted sum over functions.
      components: [N] float32 under each function's name, unweighted, NaN where the function
        skipped the sample; a function's named parts under "function/part".
      counts: how many checks were killed ("timeouts") and how many answers could not be read
        ("unparsed").
    """

    total: np.ndarray
    components: dict[str, np.ndarray]
    counts: dict[str, int]


class Handle:
    """Rewards that are being computed."""

    def __init__(self, scores: Scores | None = None, error: Exception | None = None):
        self._scores = scores
        self._error = error

    def result(self) -> Scores:
        """Waits for the rewards. Raises what the functions' failure asks for."""
        if self._error is not None:
            raise self._error
        return self._scores


class RewardModel:
    """Several weighted reward functions, in this process or in a pool of workers."""

    def __init__(
        self,
        functions: list[RewardFunction],
        num_workers: int = 0,
        timeout_s: float = 10.0,
        on_timeout: str = "zero",
    ):
        if not functions:
            raise ValueError("RewardModel: no reward function; give at least one")
        self.functions = list(functions)
        self._loaded = [custom.load(f) for f in self.functions]

    def score(self, completions: list[str], columns: dict[str, list]) -> Scores:
        """Grades completions.

        Args:
          completions: N strings.
          columns: N values under each column's name; "solution" among them.

        Raises:
          RewardError: a function raised, or returned something that is no reward.
          ValueError: columns of another length.
        """
        return self.submit(completions, columns).result()

    def submit(self, completions: list[str], columns: dict[str, list]) -> Handle:
        """As score, without waiting: `.result()` of the handle gives the Scores."""
        for name, values in columns.items():
            if len(values) != len(completions):
                raise ValueError(
                    f"column {name!r} has {len(values)} values for {len(completions)} completions"
                )
        try:
            return Handle(self._score_here(completions, columns))
        except RewardError as error:
            return Handle(error=error)

    def _score_here(self, completions, columns) -> Scores:
        total = np.zeros(len(completions), np.float64)
        components, unparsed = {}, 0
        for function, found in zip(self.functions, self._loaded):
            try:
                if found is builtin.good_accuracy:
                    rewards, bad = builtin.good_accuracy_counted(
                        completions, columns["solution"], **function.kwargs
                    )
                    unparsed += bad
                else:
                    rewards = custom.call(found, completions, columns, function.kwargs)
            except Exception as error:
                raise RewardError(
                    f"{type(error).__name__}: {error}",
                    function=function.name,
                    path=function.path,
                    traceback_text=traceback.format_exc(),
                ) from error
            if not isinstance(rewards, (list, tuple, np.ndarray)) or len(rewards) != len(
                completions
            ):
                raise RewardError(
                    f"wanted {len(completions)} rewards, got {rewards!r:.200}",
                    function=function.name,
                    path=function.path,
                )
            for i, reward in enumerate(rewards):
                if reward is None or not math.isfinite(reward):
                    raise RewardError(
                        f"the reward of completion {i} is {reward}",
                        function=function.name,
                        path=function.path,
                        sample={
                            "index": i,
                            "completion": completions[i],
                            "columns": {k: v[i] for k, v in columns.items()},
                        },
                    )
            components[function.name] = np.asarray(rewards, np.float32)
            total += function.weight * np.asarray(rewards, np.float64)
        return Scores(total.astype(np.float32), components, {"timeouts": 0, "unparsed": unparsed})

    def close(self) -> None:
        """Ends the workers."""

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()
