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
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from adpo_jax.devices import distributed
from adpo_jax.records import Completions, GradedGroups, Prompts
from adpo_jax.rewards import RewardError
from adpo_jax.rollouts.flight import (
    Flight,
    FlightFiles,
    FlyingGroup,
    FlyingSample,
    GroupDecoding,
    Numbering,
    age_metrics,
)
from adpo_jax.rollouts.pacing import WINDOW, Pacing, shared_out
from adpo_jax.rollouts.sampler import Sampler
from adpo_jax.rollouts.source import Source


@dataclasses.dataclass(frozen=True)
class _Part:
    """What a process brings to an iteration.

    Attributes:
      numbers: of its groups that are trained on.
      graded: these groups; None for none.
      seconds: of sampling.
      sampled: tokens sampled by all of its samples.
      slot_steps: steps times slots.
      carried: tokens of the groups that it has left in flight.
      in_flight: their number.
    """

    numbers: list[int]
    graded: GradedGroups | None
    seconds: float
    sampled: int
    slot_steps: int
    carried: int
    in_flight: int


class Ahead(Source):
    """Groups that are sampled ahead of the update.

    Args:
      sampler: its engine, settings and rewards are used.
      prompts_of: number of a batch, from 0 -> its prompts.
      folder: the folder that `save` writes in.
      batch_size: prompts of a batch, over all processes.
      num_steps: iterations of the whole run.
      max_staleness, ahead: as of `Pacing`, over all processes.
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
    ):
        self._sampler = sampler
        self._files = FlightFiles(folder, sampler.sampling.n)
        self._numbering = Numbering(prompts_of, batch_size, sampler.seed, sampler.sampling.n)
        self._pacing = Pacing(batch_size, max_staleness, ahead, num_groups=num_steps * batch_size)
        self._flights: dict[int, Flight] = {0: Flight()}  # by iterations done

    def next(self, step: int, params) -> GradedGroups:
        """The groups of the iteration after `step` iterations, the same on every process.

        Raises:
          RewardError: when a reward function fails on any process.
          SourceError: when what iteration `step` left in flight was not kept.
        """
        before = self._flight(step)
        there = self._admitted(step, before)
        sampler, began = self._sampler, time.perf_counter()
        with jax.profiler.TraceAnnotation("rollout"), contextlib.ExitStack() as stack:
            with distributed.fail_together():
                session = sampler.engine.session(
                    params, sampler.sampling, jax.random.key(sampler.seed), version=step
                )
                decoding = GroupDecoding(stack.enter_context(session), step)
                prompts = self._numbering.prompts(there.groups).token_ids if there.groups else []
                for number, prompt in zip(there.groups, prompts, strict=True):
                    group = there.groups[number]
                    decoding.submit(number, prompt, self._numbering.keys(number), group)
            chosen = self._until_chosen(step, decoding, there.admitted_at)
            groups, stats = decoding.left(), dict(session.stats)
        seconds = time.perf_counter() - began
        taken = [number for number in chosen if number in groups]
        try:
            with distributed.fail_together():
                graded = self._graded(step, taken, groups, stats)
        except RewardError as error:
            sampler.keep_sample(step, error)
            raise
        left = {n: group for n, group in groups.items() if n not in set(chosen)}
        mine = _Part(
            numbers=taken,
            graded=graded,
            seconds=seconds,
            sampled=sum(int(np.sum(s.versions == step)) for g in groups.values() for s in g),
            slot_steps=stats["slot_steps"],
            carried=sum(len(sample.tokens) for group in left.values() for sample in group),
            in_flight=len(left),
        )
        self._flights = {step: before, step + 1: there.without(chosen, left)}
        return _joined(distributed.all_gather(mine), step)

    def _until_chosen(
        self, step: int, decoding: GroupDecoding, admitted_at: dict[int, int]
    ) -> list[int]:
        """Decodes until the iteration has its groups, and returns their numbers."""
        while True:
            whole = [number for part in distributed.all_gather(decoding.whole()) for number in part]
            chosen = self._pacing.chosen(step, admitted_at, whole)
            if chosen is not None:
                return chosen
            with distributed.fail_together():
                decoding.decode(WINDOW if jax.process_count() > 1 else 1)

    def _graded(
        self, step: int, numbers: list[int], groups: dict[int, FlyingGroup], stats: dict[str, int]
    ) -> GradedGroups | None:
        """Those of the groups that are trained on; None for none."""
        if not numbers:
            return None
        completions = [[sample.completion() for sample in groups[n]] for n in numbers]
        return self._sampler.graded(
            step, self._numbering.prompts(numbers), Completions(completions, stats)
        )

    def _admitted(self, step: int, before: Flight) -> Flight:
        """The flight with the groups that start now."""
        new = self._pacing.admitted(before.next_number, len(before.admitted_at))
        owners = before.owners | shared_out(new, before.owners.values(), jax.process_count())
        started = (FlyingSample.empty(),) * self._sampler.sampling.n
        mine = {n: started for n in new if owners[n] == jax.process_index()}
        return Flight(
            groups=before.groups | mine,
            admitted_at=before.admitted_at | dict.fromkeys(new, step),
            owners=owners,
            next_number=before.next_number + len(new),
        )

    # --- what is in flight, on disk

    def save(self, step: int, *, oldest: int = 0) -> None:
        """Saves what iteration `step` left in flight on this process."""
        self._files.save(step, self._flight(step), oldest=oldest)

    def check(self, step: int) -> None:
        """Checks that what iteration `step` left in flight was kept.

        Raises:
          SourceError: when it was not.
        """
        self._flight(max(step, 0))

    def restore(self, step: int) -> None:
        """Takes up what iteration `step` left in flight; errors as of `check`."""
        self.check(step)

    def _flight(self, step: int) -> Flight:
        if step not in self._flights:
            self._flights = {step: self._files.load(step)}
        return self._flights[step]


def _joined(parts: list[_Part], step: int) -> GradedGroups:
    """The groups of all processes in the order of their numbers, and the metrics of the flight."""
    graded = [part.graded for part in parts if part.graded is not None]
    numbers = [number for part in parts for number in part.numbers]
    together = GradedGroups.concatenate(graded)
    groups = together.select(np.argsort(numbers))
    sampled, slot_steps = (
        sum(getattr(p, name) for p in parts) for name in ("sampled", "slot_steps")
    )
    seconds = max(part.seconds for part in parts)
    metrics = {
        "ahead/in_flight": float(sum(part.in_flight for part in parts)),
        "ahead/carried_tokens": float(sum(part.carried for part in parts)),
        "ahead/idle_frac": 1.0 - sampled / max(slot_steps, 1),
        "rollout/tokens_per_s": sampled / max(seconds, 1e-9),
    }
    metrics |= age_metrics(groups, step)
    return dataclasses.replace(groups, seconds=(seconds, together.seconds[1]), metrics=metrics)
