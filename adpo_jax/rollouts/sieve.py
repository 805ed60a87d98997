"""Which groups are trained on where rollouts run ahead of the update and groups are filtered."""

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np

from adpo_jax.records import GradedGroups
from adpo_jax.rewards import Scores
from adpo_jax.rollouts.filtering import OF_ALL_ATTEMPTS
from adpo_jax.rollouts.sampler import logged_metrics, reward_metrics


@dataclasses.dataclass(frozen=True)
class Sieve:
    """Which whole groups are trained on, where not all are.

    A group without a spread is dropped and replaced, until an iteration has dropped `most_dropped`;
    later ones fill the batch.

    Attributes:
      has_spread: rewards [P, G] -> [P] bool.
      most_dropped: groups in an iteration.
    """

    has_spread: Callable[[np.ndarray], np.ndarray]
    most_dropped: int


class Judging:
    """The whole groups of an iteration, of this process, and which of them have a spread.

    Args:
      graded: those that earlier iterations have graded and left, by their numbers.

    Attributes:
      scores: of each group that was looked at, by its number.
      counted: what was counted and logged in this iteration's grading, without rewards.
      seconds: that their grading took.
      without_spread: the numbers of those of them that have none and have not been dropped.
      dropped_groups: those of them that have been dropped.
    """

    def __init__(self, sieve: Sieve | None, graded: Mapping[int, GradedGroups]):
        self._sieve = sieve
        self._graded: dict[int, GradedGroups] = {}
        self._num_dropped = 0  # of all processes
        self.scores: dict[int, Scores] = {}
        self.counted: list[Scores] = []
        self.seconds = 0.0
        self.without_spread: list[int] = []
        self.dropped_groups: list[GradedGroups] = []
        for number, group in graded.items():
            self._look_at([number], group)

    def grade(self, whole: list[int], graded_of: Callable[[list[int]], GradedGroups]) -> None:
        """Has those of the whole groups graded that have not been; none without a sieve."""
        new = [number for number in whole if number not in self._graded]
        if self._sieve is None or not new:
            return
        graded = graded_of(new)
        self._look_at(new, graded)
        scores = graded.scores
        self.counted.append(Scores(scores.total[:0], {}, scores.counts, scores.logged))
        self.seconds += graded.seconds[1]

    def _look_at(self, numbers: list[int], graded: GradedGroups) -> None:
        spread = self._sieve.has_spread(graded.rewards)
        found = {number: graded.select([i]) for i, number in enumerate(numbers)}
        self._graded |= found
        self.scores |= {n: dataclasses.replace(g.scores, extras={}) for n, g in found.items()}
        self.without_spread += [n for n, has in zip(numbers, spread) if not has]

    def dropped(self, candidates: list[int]) -> list[int]:
        """Those of the groups of all processes without a spread that are dropped now."""
        if self._sieve is None:
            return []
        found = candidates[: self._sieve.most_dropped - self._num_dropped]
        self._num_dropped += len(found)
        self.dropped_groups += [self._graded.pop(n) for n in found if n in self._graded]
        self.without_spread = [n for n in self.without_spread if n not in set(found)]
        return found

    def graded_groups(self, numbers: list[int], stats: dict[str, int]) -> GradedGroups | None:
        """These groups as graded here; None for none, and without a sieve."""
        if self._sieve is None or not numbers:
            return None
        groups = GradedGroups.concatenate([self._graded[number] for number in numbers])
        completions = dataclasses.replace(groups.completions, stats=stats)
        return dataclasses.replace(groups, completions=completions, seconds=(0.0, self.seconds))

    def left(self, chosen: Collection[int]) -> dict[int, GradedGroups]:
        """The graded groups that stay in flight when these are trained on."""
        return {n: group for n, group in self._graded.items() if n not in set(chosen)}

    def with_filter_metrics(
        self, groups: GradedGroups, judged: Mapping[int, Scores], counted: Sequence[Scores]
    ) -> GradedGroups:
        """The groups of the iteration with the metrics of the sieve, if there is one.

        They are those of a resumed run too, which grades again what had waited.

        Args:
          judged: the scores of all groups that were looked at, by number, of all processes.
          counted: what was counted in their grading, of all processes.
        """
        if self._sieve is None:
            return groups
        G, count = groups.completions.num_samples, len(judged)
        fillers = int((~self._sieve.has_spread(groups.rewards)).sum())
        scores = Scores.concatenate([*(judged[number] for number in sorted(judged)), *counted])
        metrics = {
            "filter/attempts": count / len(groups),
            "filter/dropped_frac": self._num_dropped / count,
            "filter/fillers": float(fillers),
            "filter/carried": float(count - self._num_dropped - len(groups)),
            "filter/sampled_reward": float(scores.total.mean()),
        }
        of_all = reward_metrics(scores, G)
        metrics |= {name: of_all[name] for name in OF_ALL_ATTEMPTS if name in of_all}
        metrics |= logged_metrics(scores)
        return dataclasses.replace(groups, metrics=groups.metrics | metrics)
