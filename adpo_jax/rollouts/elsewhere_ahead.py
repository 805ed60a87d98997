"""Rollouts by samplers in other processes, ahead of the update: groups with staleness."""

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from adpo_jax.devices import distributed
from adpo_jax.records import Completion, Completions, GradedGroups, Prompts
from adpo_jax.rollouts.dispatch import Work
from adpo_jax.rollouts.elsewhere import RemoteSamplers, with_sampling_metrics, works
from adpo_jax.rollouts.flight import Flight, FlyingSample
from adpo_jax.rollouts.in_flight import FlyingIteration, FlyingSource, InFlight
from adpo_jax.rollouts.pacing import Pacing
from adpo_jax.rollouts.sampler import Sampler
from adpo_jax.rollouts.sieve import Sieve


class _Found(NamedTuple):
    """What the first process tells the others of an iteration.

    Attributes:
      chosen: the numbers of the groups that are trained on.
      completions: of these groups; None where they have been graded.
      graded: these groups; None where each process is to grade its share.
      after: what stays in flight.
      counts: of the sampling, by the names of metrics.
      tokens_dropped: of the groups that were dropped.
    """

    chosen: list[int]
    completions: list[list[Completion]] | None
    graded: GradedGroups | None
    after: Flight
    counts: dict[str, float]
    tokens_dropped: int


class RemoteAhead(FlyingSource, RemoteSamplers):
    """Groups that may be sampled by the weights of earlier iterations, in the order of `Pacing`.

    Whole groups that an iteration left are saved; others are sampled again in a resumed run.

    Args:
      pacing, sieve: as of `ahead.Ahead`.
      sampler, prompts_of, folder, others: as of `RemoteSamplers`.
    """

    whole_calls = False

    def __init__(
        self,
        sampler: Sampler,
        prompts_of: Callable[[int], Prompts],
        folder: Path,
        pacing: Pacing,
        *,
        sieve: Sieve | None = None,
        **others: Any,
    ):
        super().__init__(sampler, prompts_of, folder, batch_size=pacing.batch_size, **others)
        self._in_flight = InFlight(
            sampler, self._numbering, folder, pacing, sieve=sieve, owner="samplers"
        )

    def next(self, step: int, params) -> GradedGroups:
        """See `Source`; the same on every process.

        Raises:
          RewardError: when a reward function fails on any process.
          SourceError: when what iteration `step` left in flight was not kept.
        """
        began, mine = time.perf_counter(), None
        self._offer(step, params)
        with self._sampler.keeping_samples(step), distributed.fail_together():
            now = self._in_flight.begin(step)
            if self._host is not None:
                mine = self._found(now)
        found: _Found = distributed.all_gather(mine)[0]
        self._in_flight.end(now, found.chosen, found.after)
        seconds, groups = time.perf_counter() - began, found.graded
        if groups is None:
            groups = self._graded(step, self._numbering.prompts(found.chosen), found.completions)
        return with_sampling_metrics(groups, step, seconds, found.counts, found.tokens_dropped)

    # --- on the first process, which speaks to the samplers

    def _found(self, now: FlyingIteration) -> _Found:
        """Waits for the groups of an iteration; grades them here where there is a sieve."""
        dispatch, again, judging = self._dispatch, [], now.judging
        if not self._started:
            whole = {
                n: [sample.completion() for sample in group]
                for n, group in now.flight.groups.items()
            }
            dispatch.restore(whole)
            again = [n for n in now.flight.admitted_at if n not in whole]
        self._open()
        new = now.admit()
        with self._counted() as counts:
            dispatch.publish(now.step, self._works([*again, *new]))
            chosen = self._until_chosen(now)
        taken = dispatch.take(chosen)
        kept = {
            number: tuple(map(FlyingSample.of, group))
            for number, group in sorted(dispatch.kept().items())
        }
        after = now.after(chosen, kept)
        counts["ahead/in_flight"] = float(len(after.admitted_at))
        graded = judging.graded_groups(chosen, {})
        if graded is None:
            return _Found(chosen, [taken[n] for n in chosen], None, after, counts, 0)
        graded = judging.with_filter_metrics(graded, judging.scores, judging.counted)
        dropped = sum(int(each.completions.lengths.sum()) for each in judging.dropped_groups)
        return _Found(chosen, None, graded, after, counts, dropped)

    def _until_chosen(self, now: FlyingIteration) -> list[int]:
        """Waits until the iteration has its groups; returns their numbers."""
        dispatch, last_notice = self._dispatch, time.monotonic()

        def graded(numbers: list[int]) -> GradedGroups:
            kept = dispatch.kept()
            completions = Completions([kept[number] for number in numbers])
            prompts = self._numbering.prompts(numbers)
            return self._sampler.graded(now.step, self._sampler.of_one_turn(prompts, completions))

        while True:
            whole = dispatch.whole()
            now.judging.grade(whole, graded)
            if dropped := now.drop(now.judging.without_spread):
                dispatch.take(dropped)
                dispatch.publish(now.step, self._works(now.admit()))
            chosen = now.chosen(whole)
            if chosen is not None:
                return chosen
            # What came while these were graded is not waited for.
            num_seen = len(whole) - len(dropped)
            last_notice = self._wait_for_more(now.step, num_seen, last_notice)

    def _works(self, numbers: Iterable[int]) -> list[Work]:
        numbers = list(numbers)
        if not numbers:
            return []
        prompts = self._numbering.prompts(numbers).token_ids
        return works(numbers, prompts, map(self._numbering.keys, numbers))
