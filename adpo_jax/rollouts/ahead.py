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
from adpo_jax.rewards import Scores
from adpo_jax.rollouts.flight import Flight, age_metrics
from adpo_jax.rollouts.group_decoding import Decoding, OneTurnDecoding
from adpo_jax.rollouts.in_flight import FlyingIteration, FlyingSource, InFlight
from adpo_jax.rollouts.in_turns import InTurns
from adpo_jax.rollouts.numbering import Numbering
from adpo_jax.rollouts.pacing import WINDOW, Pacing
from adpo_jax.rollouts.sampler import Sampler
from adpo_jax.rollouts.sieve import Sieve
from adpo_jax.rollouts.turns_ahead import TurnsAhead


@dataclasses.dataclass(frozen=True)
class _Part:
    """What a process brings to an iteration.

    Attributes:
      numbers: of its groups that are trained on.
      graded: these groups; None for none.
      seconds: of sampling.
      sampled: tokens sampled by all of its samples in the iteration, dropped groups' included.
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
    carried: int
    in_flight: int
    judged: dict[int, Scores]
    counted: list[Scores]
    waited: float
    stats: dict[str, int]


class Ahead(FlyingSource):
    """Groups that are sampled ahead of the update.

    Args:
      sampler: its engine, settings and rewards are used.
      prompts_of: number of a batch, from 0 -> its prompts.
      folder: the folder that `save` writes in.
      pacing: of the groups of all processes.
      sieve: which groups are trained on; None for all.
      in_turns: how groups converse with their environments; None where completions have one turn.
    """

    saves_on_every_process = True

    def __init__(
        self,
        sampler: Sampler,
        prompts_of: Callable[[int], Prompts],
        folder: Path,
        pacing: Pacing,
        *,
        sieve: Sieve | None = None,
        in_turns: InTurns | None = None,
    ):
        self._sampler = sampler
        numbering = Numbering(prompts_of, pacing.batch_size, sampler.seed, sampler.sampling.n)
        self._in_flight = InFlight(
            sampler, numbering, folder, pacing, sieve=sieve, converses=in_turns is not None
        )
        self._start: Callable[[Session], Decoding] = functools.partial(
            OneTurnDecoding, numbering=numbering, answers_of=sampler.of_one_turn
        )
        if in_turns is not None:
            self._start = TurnsAhead(in_turns, numbering, sampler.sampling).start

    def next(self, step: int, params) -> GradedGroups:
        """The groups of the iteration after `step` iterations, the same on every process.

        Raises:
          RewardError: when a reward function fails on any process.
          SourceError: when what iteration `step` left in flight was not kept.
        """
        now = self._in_flight.begin(step)
        now.admit()
        with self._sampler.keeping_samples(step):
            mine, chosen, after = self._decoded(now, params)
        self._in_flight.end(now, chosen, after)
        parts = distributed.all_gather(mine)
        judged = {number: scores for part in parts for number, scores in part.judged.items()}
        counted = [scores for part in parts for scores in part.counted]
        return now.judging.with_filter_metrics(_of_all_processes(parts, step), judged, counted)

    def _decoded(self, now: FlyingIteration, params) -> tuple[_Part, list[int], Flight]:
        """What this process brings, the groups that all train on, and what stays in flight here."""
        sampler, step, judging = self._sampler, now.step, now.judging
        began = time.perf_counter()
        with jax.profiler.TraceAnnotation("rollout"), contextlib.ExitStack() as stack:
            with distributed.fail_together():
                session = sampler.engine.session(
                    params, sampler.sampling, jax.random.key(sampler.seed), version=step
                )
                decoding = self._start(stack.enter_context(session))
                decoding.begin(now.flight.groups)
            chosen = self._until_chosen(now, decoding)
            with distributed.fail_together():
                groups, stats = decoding.left(), decoding.stats
        seconds = time.perf_counter() - began - judging.seconds
        taken = [number for number in chosen if number in groups]
        with distributed.fail_together():
            graded = judging.graded_groups(taken, stats)
            if graded is None and taken:
                graded = sampler.graded(step, decoding.answers(taken, stats))
        decoding.forget(taken)
        after = now.after(chosen, groups)
        dropped = [c for each in judging.dropped_groups for c in each.completions.flat]
        samples = [*dropped, *(sample for group in groups.values() for sample in group)]
        part = _Part(
            numbers=taken,
            graded=graded,
            seconds=seconds,
            sampled=sum(int(np.sum(s.trained & (s.versions == step))) for s in samples),
            carried=sum(len(sample.tokens) for group in after.groups.values() for sample in group),
            in_flight=len(after.groups),
            judged=judging.scores,
            counted=judging.counted,
            waited=decoding.waited,
            stats=stats,
        )
        return part, chosen, after

    def _until_chosen(self, now: FlyingIteration, decoding: Decoding) -> list[int]:
        """Decodes until the iteration has its groups; returns their numbers."""

        def graded(numbers: list[int]) -> GradedGroups:
            return self._sampler.graded(now.step, decoding.answers(numbers, {}))

        while True:
            with distributed.fail_together():
                now.judging.grade(decoding.whole(), graded)
            parts = distributed.all_gather((decoding.whole(), now.judging.without_spread))
            whole = [number for numbers, _ in parts for number in numbers]
            if dropped := now.drop(number for _, numbers in parts for number in numbers):
                decoding.forget(dropped)
                new = now.admit()
                with distributed.fail_together():
                    decoding.begin(new)
            chosen = now.chosen(whole)
            if chosen is not None:
                return chosen
            with distributed.fail_together():
                decoding.decode(WINDOW if jax.process_count() > 1 else 1)


def _of_all_processes(parts: list[_Part], step: int) -> GradedGroups:
    """The groups of all processes in the order of their numbers, and the metrics of the flight."""
    graded = [part.graded for part in parts if part.graded is not None]
    numbers = [number for part in parts for number in part.numbers]
    together = GradedGroups.concatenate(graded)
    groups = together.select(np.argsort(numbers))
    stats = {name: sum(part.stats[name] for part in parts) for name in parts[0].stats}
    counted = dataclasses.replace(groups.completions, stats=stats)
    groups = dataclasses.replace(groups, completions=counted)
    sampled = sum(part.sampled for part in parts)
    seconds = max(part.seconds for part in parts)
    metrics = {
        "ahead/in_flight": float(sum(part.in_flight for part in parts)),
        "ahead/carried_tokens": float(sum(part.carried for part in parts)),
        "ahead/waited": max(part.waited for part in parts),
        "ahead/idle_frac": 1.0 - sampled / max(stats["slot_steps"], 1),
        "rollout/tokens_per_s": sampled / max(seconds, 1e-9),
    }
    metrics |= age_metrics(groups, step)
    return dataclasses.replace(groups, seconds=(seconds, together.seconds[1]), metrics=metrics)
