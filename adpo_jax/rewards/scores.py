"""Rewards of completions as one value, and the handle on those that are being computed."""

import dataclasses
from collections.abc import Callable

import numpy as np

COUNTS = ("timeouts", "crashes", "unparsed", "grader_faults")


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
        return cls(nan, dict.fromkeys(names, nan), dict.fromkeys(COUNTS, 0))

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
        counts = {name: sum(part.counts.get(name, 0) for part in parts) for name in COUNTS}
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
