"""Rollouts ahead of the update, on the same devices: samples go on from one iteration to the next.

An iteration ends when `pacing` has its groups. Samples that have not ended keep their tokens, the
log-probs that the sampler drew them with and the version of the weights of each token, and go on
under the new weights in the next iteration. Their keys and values are made again by prefill, so
that no token attends to what older weights computed.

What is in flight is saved with every checkpoint, as tokens and not as memory of a device. With the
same seed a resumed run ends with the same bits, since every iteration prefills anew.

Several processes share the groups in flight. Each decodes its own, and an iteration ends for all at
once.

Source of the idea: "partial rollouts", Kimi Team 2025, arXiv 2501.12599, section 2.6.2.
"""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from adpo_jax.devices import distributed
from adpo_jax.engine.session import Session
from adpo_jax.records import GradedGroups, Prompts
from adpo_jax.rewards import RewardError, Scores
from adpo_jax.rollouts.flight import ExpertLimits, Flight, FlyingSample, Limits, age_metrics
from adpo_jax.rollouts.flight_files import FlightFiles, Flights
from adpo_jax.rollouts.group_decoding import Decoding, Numbering, OneTurnDecoding
from adpo_jax.rollouts.in_turns import InTurns
from adpo_jax.rollouts.pacing import WINDOW, Pacing, shared_out
from adpo_jax.rollouts.sampler import Sampler
from adpo_jax.rollouts.sieve import Judging, Sieve
from adpo_jax.rollouts.source import Source
from adpo_jax.rollouts.turns_ahead import TurnsAhead


@dataclasses.dataclass(frozen=True)
class _Part:
    """What a process brings to an iteration.

    Attributes:
      numbers: of its groups that are trained on.
      graded: these groups; None for none.
      seconds: of sampling.
      sampled: tokens sampled by all of its samples in the iteration, dropped groups' included.
      slot_steps: steps times slots.
      carried: tokens of the groups that it has left in flight.
      in_flight: their number.
      judged: the scores of the groups that were looked at for a spread, by number.
      counted: what was counted in their grading.
      waited, stats: as of `Decoding`.
    """

    numbers: list[int]
    graded: GradedGroups | None
    seconds: float
    sampled: int
    slot_steps: int
    carried: int
    in_flight: int
    judged: dict[int, Scores]
    counted: list[Scores]
    waited: float
    stats: dict[str, int]


class Ahead(Source):
    """Groups that are sampled ahead of the update.

    Args:
      sampler: its engine, settings and rewards are used.
      prompts_of: number of a batch, from 0 -> its prompts.
      folder: the folder that `save` writes in.
      batch_size: prompts of a batch, over all processes.
      num_steps: iterations of the whole run.
      max_staleness, ahead: as of `Pacing`, over all processes.
      sieve: which groups are trained on; None for all.
      in_turns: how groups converse with their environments; None where completions have one turn.
    """

    saves_on_every_process = True

    def __init__(
        self,
        sampler: Sampler,
        prompts_of: Callable[[int], Prompts],
        folder: Path,
        *,
        batch_size: int,
        num_steps: int,
        max_staleness: int,
        ahead: int,
        sieve: Sieve | None = None,
        in_turns: InTurns | None = None,
    ):
        self._sampler, self._sieve = sampler, sieve
        limits = Limits(
            sampler.sampling.n,
            sampler.sampling.max_tokens,
            sampler.engine.policy.config.vocab_size,
            converses=in_turns is not None,
            experts=ExpertLimits.of(sampler.engine, sampler.sampling),
        )
        self._numbering = Numbering(prompts_of, batch_size, sampler.seed, sampler.sampling.n)
        self._flights = Flights(FlightFiles(folder, limits, self._numbering.digests))
        self._start: Callable[[Session], Decoding] = functools.partial(
            OneTurnDecoding, numbering=self._numbering, answers_of=sampler.of_one_turn
        )
        if in_turns is not None:
            self._start = TurnsAhead(in_turns, self._numbering, sampler.sampling).start
        self._pacing = Pacing(batch_size, max_staleness, ahead, num_steps)

    def next(self, step: int, params) -> GradedGroups:
        """The groups of the iteration after `step` iterations, the same on every process.

        Raises:
          RewardError: when a reward function fails on any process.
          SourceError: when what iteration `step` left in flight was not kept.
        """
        before = self._flights.at(step)
        there = self._admitted(step, before)
        judging = Judging(self._sieve, self._flights.graded(step))
        sampler, began = self._sampler, time.perf_counter()
        try:
            with jax.profiler.TraceAnnotation("rollout"), contextlib.ExitStack() as stack:
                with distributed.fail_together():
                    session = sampler.engine.session(
                        params, sampler.sampling, jax.random.key(sampler.seed), version=step
                    )
                    decoding = self._start(stack.enter_context(session))
                    decoding.begin(there.groups)
                chosen, there = self._until_chosen(step, decoding, there, judging)
                with distributed.fail_together():
                    groups, stats = decoding.left(), decoding.stats
            seconds = time.perf_counter() - began - judging.seconds
            taken = [number for number in chosen if number in groups]
            with distributed.fail_together():
                graded = judging.graded_groups(taken, stats)
                if graded is None and taken:
                    graded = sampler.graded(step, decoding.answers(taken, stats))
            decoding.forget(taken)
        except RewardError as error:
            sampler.keep_sample(step, error)
            raise
        left = {n: group for n, group in groups.items() if n not in set(chosen)}
        dropped = [c for each in judging.dropped_groups for c in each.completions.flat]
        samples = [*dropped, *(sample for group in groups.values() for sample in group)]
        mine = _Part(
            numbers=taken,
            graded=graded,
            seconds=seconds,
            sampled=sum(int(np.sum(s.trained & (s.versions == step))) for s in samples),
            slot_steps=stats["slot_steps"],
            carried=sum(len(sample.tokens) for group in left.values() for sample in group),
            in_flight=len(left),
            judged=judging.scores,
            counted=judging.counted,
            waited=decoding.waited,
            stats=stats,
        )
        self._flights.put(step, before, there.without(chosen, left), judging.left(chosen))
        parts = distributed.all_gather(mine)
        found = _of_all_processes(parts, step)
        if self._sieve is None:
            return found
        judged = {number: scores for part in parts for number, scores in part.judged.items()}
        counted = [scores for part in parts for scores in part.counted]
        return judging.with_filter_metrics(found, judged, counted)

    def _until_chosen(
        self, step: int, decoding: Decoding, there: Flight, judging: Judging
    ) -> tuple[list[int], Flight]:
        """Decodes until the iteration has its groups; returns their numbers, and the flight."""
        while True:
            with distributed.fail_together():
                new = judging.new(decoding.whole())
                if new:
                    judging.take(new, self._sampler.graded(step, decoding.answers(new, {})))
            parts = distributed.all_gather((decoding.whole(), judging.without_spread))
            whole = [number for numbers, _ in parts for number in numbers]
            dropped = judging.dropped(sorted(number for _, numbers in parts for number in numbers))
            if dropped:
                mine = {n: group for n, group in there.groups.items() if n not in set(dropped)}
                decoding.forget(there.groups.keys() - mine.keys())
                old, there = there, self._admitted(step, there.without(dropped, mine))
                with distributed.fail_together():
                    new_groups = there.groups.keys() - old.groups.keys()
                    decoding.begin({n: there.groups[n] for n in sorted(new_groups)})
            whole = [number for number in whole if number not in set(dropped)]
            chosen = self._pacing.chosen(step, there.admitted_at, whole)
            if chosen is not None:
                return chosen, there
            with distributed.fail_together():
                decoding.decode(WINDOW if jax.process_count() > 1 else 1)

    def _admitted(self, step: int, before: Flight) -> Flight:
        """The flight with the groups that start now."""
        new = self._pacing.admitted(step, before.next_number, len(before.admitted_at))
        owners = shared_out(new, before.owners.values(), jax.process_count())
        started = (FlyingSample.empty(),) * self._sampler.sampling.n
        mine = {n: started for n in new if owners[n] == jax.process_index()}
        return before.admitting(owners, step, mine)

    def save(self, step: int, *, oldest: int = 0) -> None:
        """Saves what iteration `step` left in flight on this process."""
        self._flights.save(step, oldest=oldest)

    def check(self, step: int) -> None:
        """See `Flights.check`."""
        self._flights.check(step)

    def restore(self, step: int) -> None:
        """Takes up what iteration `step` left in flight; errors as of `check`."""
        self._flights.check(step)


def _of_all_processes(parts: list[_Part], step: int) -> GradedGroups:
    """The groups of all processes in the order of their numbers, and the metrics of the flight."""
    graded = [part.graded for part in parts if part.graded is not None]
    numbers = [number for part in parts for number in part.numbers]
    together = GradedGroups.concatenate(graded)
    groups = together.select(np.argsort(numbers))
    stats = {name: sum(part.stats[name] for part in parts) for name in parts[0].stats}
    counted = dataclasses.replace(groups.completions, stats=stats)
    groups = dataclasses.replace(groups, completions=counted)
    sampled, slot_steps = (
        sum(getattr(p, name) for p in parts) for name in ("sampled", "slot_steps")
    )
    seconds = max(part.seconds for part in parts)
    metrics = {
        "ahead/in_flight": float(sum(part.in_flight for part in parts)),
        "ahead/carried_tokens": float(sum(part.carried for part in parts)),
        "ahead/waited": max(part.waited for part in parts),
        "ahead/idle_frac": 1.0 - sampled / max(slot_steps, 1),
        "rollout/tokens_per_s": sampled / max(seconds, 1e-9),
    }
    metrics |= age_metrics(groups, step)
    return dataclasses.replace(groups, seconds=(seconds, together.seconds[1]), metrics=metrics)
