"""Rollouts by samplers in other processes, ahead of the update: groups with staleness."""

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from adpo_jax.devices import distributed
from adpo_jax.records import Completions, GradedGroups, Prompts
from adpo_jax.rollouts.dispatch import Work
from adpo_jax.rollouts.elsewhere import RemoteSamplers, with_sampling_metrics, works
from adpo_jax.rollouts.flight import ExpertLimits, Flight, FlyingSample, Limits
from adpo_jax.rollouts.flight_files import FlightFiles, Flights
from adpo_jax.rollouts.pacing import Pacing
from adpo_jax.rollouts.sampler import Sampler
from adpo_jax.rollouts.sieve import Judging, Sieve


class RemoteAhead(RemoteSamplers):
    """Groups that may be sampled by the weights of earlier iterations, in the order of `pacing`.

    Args:
      num_steps, max_staleness, ahead, sieve: as of `ahead.Ahead`.
      sampler, prompts_of, folder, batch_size, vocab_size, others: as of `RemoteSamplers`.
    """

    whole_calls = False

    def __init__(
        self,
        sampler: Sampler,
        prompts_of: Callable[[int], Prompts],
        folder: Path,
        *,
        batch_size: int,
        vocab_size: int,
        num_steps: int,
        max_staleness: int,
        ahead: int,
        sieve: Sieve | None = None,
        **others: Any,
    ):
        super().__init__(
            sampler, prompts_of, folder, batch_size=batch_size, vocab_size=vocab_size, **others
        )
        sampling = sampler.sampling
        experts = ExpertLimits.of(sampler.engine, sampling)
        limits = Limits(sampling.n, sampling.max_tokens, vocab_size, experts=experts)
        files = FlightFiles(folder, limits, self._numbering.digests, owner="samplers")
        self._flights = Flights(files)
        self._pacing = Pacing(batch_size, max_staleness, ahead, num_steps)
        self._sieve = sieve

    def next(self, step: int, params) -> GradedGroups:
        """See `Source`; the same on every process.

        Raises:
          RewardError: when a reward function fails on any process.
          SourceError: when what iteration `step` left in flight was not kept.
        """
        began, found = time.perf_counter(), None
        self._offer(step, params)
        with self._keeping_samples(step):
            with distributed.fail_together():
                before = self._flights.at(step)
                judging = Judging(self._sieve, self._flights.graded(step))
                if self._host is not None:
                    found = self._chosen(step, before, judging)
            chosen, groups, after, counts, dropped = distributed.all_gather(found)[0]
        self._flights.put(step, before, after, judging.left(chosen))
        seconds = time.perf_counter() - began
        if self._sieve is None:
            groups = self._graded(step, self._numbering.prompts(chosen), groups)
        return with_sampling_metrics(groups, step, seconds, counts, dropped)

    # --- on the first process, which speaks to the samplers

    def _chosen(self, step: int, before: Flight, judging: Judging):
        """What the iteration trains on, and what stays in flight.

        Returns:
          The numbers of the groups, their completions (graded groups where there is a sieve), the
          flight that is left, counts, and the tokens of the groups that were dropped.
        """
        dispatch, again = self._dispatch, []
        if not self._started:
            whole = {
                n: [sample.completion() for sample in group] for n, group in before.groups.items()
            }
            dispatch.restore(whole)
            again = self._works([n for n in before.admitted_at if n not in whole])
        self._open()
        there, new = self._admitted(step, before)
        with self._counted() as counts:
            dispatch.publish(step, again + self._works(new))
            chosen, there = self._until_chosen(step, there, judging)
        completions = dispatch.take(chosen)
        gone = set(chosen)
        kept = {n: g for n, g in dispatch.kept().items() if n not in gone}
        kept = {n: tuple(map(FlyingSample.of, group)) for n, group in sorted(kept.items())}
        after = there.without(chosen, kept)
        counts["ahead/in_flight"] = float(len(after.admitted_at))
        if self._sieve is None:
            return chosen, [completions[number] for number in chosen], after, counts, 0
        dropped = sum(int(each.completions.lengths.sum()) for each in judging.dropped_groups)
        groups = judging.with_filter_metrics(
            judging.graded_groups(chosen, {}), judging.scores, judging.counted
        )
        return chosen, groups, after, counts, dropped

    def _admitted(self, step: int, before: Flight) -> tuple[Flight, range]:
        """The flight with the groups that start now, and their numbers."""
        new = self._pacing.admitted(step, before.next_number, len(before.admitted_at))
        return before.admitting(dict.fromkeys(new, 0), step, {}), new

    def _until_chosen(self, step: int, there: Flight, judging: Judging) -> tuple[list[int], Flight]:
        """Waits until the iteration has its groups; returns their numbers, and the flight."""
        last_notice = time.monotonic()
        while True:
            whole = [n for n in self._dispatch.whole() if n in there.admitted_at]
            if new := judging.new(whole):
                kept = self._dispatch.kept()
                answers = self._sampler.of_one_turn(
                    self._numbering.prompts(new), Completions([kept[number] for number in new])
                )
                judging.take(new, self._sampler.graded(step, answers))
            if dropped := judging.dropped(sorted(judging.without_spread)):
                self._dispatch.take(dropped)
                there, new = self._admitted(step, there.without(dropped, {}))
                self._dispatch.publish(step, self._works(new))
                whole = [number for number in whole if number not in set(dropped)]
            chosen = self._pacing.chosen(step, there.admitted_at, whole)
            if chosen is not None:
                return chosen, there
            last_notice = self._wait_for_more(step, len(self._dispatch.whole()), last_notice)

    def _works(self, numbers: Iterable[int]) -> list[Work]:
        numbers = list(numbers)
        if not numbers:
            return []
        prompts = self._numbering.prompts(numbers).token_ids
        return works(numbers, prompts, map(self._numbering.keys, numbers))

    # --- what is in flight, on disk

    def save(self, step: int, *, oldest: int = 0) -> None:
        """Saves the whole groups that iteration `step` left; others are sampled again."""
        self._flights.save(step, oldest=oldest)

    def check(self, step: int) -> None:
        """See `Flights.check`."""
        self._flights.check(step)

    def restore(self, step: int) -> None:
        """Takes up what iteration `step` left in flight; errors as of `check`."""
        self._flights.check(step)
