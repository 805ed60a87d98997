"""Groups in flight from one iteration to the next, whoever decodes them.

`InFlight` holds what the iterations of a run leave in flight. A `FlyingIteration` says which
groups start, which are dropped and which are trained on; its source decodes and grades them.
"""

import dataclasses
from collections.abc import Collection, Iterable
from pathlib import Path

import jax

from adpo_jax.records import GradedGroups
from adpo_jax.rollouts.flight import ExpertLimits, Flight, FlyingGroup, FlyingSample, Limits
from adpo_jax.rollouts.flight_files import FlightFiles
from adpo_jax.rollouts.numbering import Numbering
from adpo_jax.rollouts.pacing import Pacing, shared_out
from adpo_jax.rollouts.sampler import Sampler
from adpo_jax.rollouts.sieve import Judging, Sieve
from adpo_jax.rollouts.source import Source


class InFlight:
    """What the newest iterations left in flight; what older ones left is read from files.

    Whole groups that have been graded are kept graded, in memory alone.

    Args:
      sampler: its engine and settings are those of the samples.
      folder: the folder that `save` writes in.
      sieve: which groups are trained on; None for all.
      converses: as of `Limits`.
      owner: who decodes all groups, a part of the names of files; None where each process decodes
        its share of them.
    """

    def __init__(
        self,
        sampler: Sampler,
        numbering: Numbering,
        folder: Path,
        pacing: Pacing,
        *,
        sieve: Sieve | None,
        converses: bool = False,
        owner: str | None = None,
    ):
        limits = Limits(
            sampler.sampling.n,
            sampler.sampling.max_tokens,
            sampler.engine.policy.config.vocab_size,
            converses=converses,
            experts=ExpertLimits.of(sampler.engine, sampler.sampling),
            full_log_probs=sampler.sampling.full_log_probs,
        )
        self._files = FlightFiles(folder, limits, numbering.digests, owner)
        self._pacing, self._sieve, self._num_samples = pacing, sieve, sampler.sampling.n
        self._num_owners = 1 if owner else jax.process_count()
        self._flights: dict[int, Flight] = {0: Flight()}  # by iterations done
        self._graded: dict[int, dict[int, GradedGroups]] = {}  # likewise

    def begin(self, step: int) -> "FlyingIteration":
        """The iteration after `step` iterations.

        Raises:
          SourceError: when what iteration `step` left in flight was not kept.
        """
        flight = self._at(step)
        judging = Judging(self._sieve, self._graded.get(step, {}))
        return FlyingIteration(
            step, flight, judging, self._pacing, self._num_samples, self._num_owners
        )

    def end(self, iteration: "FlyingIteration", chosen: Collection[int], after: Flight) -> None:
        """Keeps what an iteration found in flight and what it left.

        Args:
          chosen: the groups that it trains on.
        """
        step = iteration.step
        self._flights = {step: self._at(step), step + 1: after}
        self._graded = {step + 1: iteration.judging.left(chosen)}

    def save(self, step: int, *, kept: Collection[int] = ()) -> None:
        """Saves what iteration `step` left in flight; what is left over goes."""
        self._files.save(step, self._at(step), kept=kept)

    def check(self, step: int) -> None:
        """Checks that what iteration `step` left in flight was kept; below 0 there is nothing.

        Raises:
          SourceError: when it was not.
        """
        self._at(max(step, 0))

    def _at(self, step: int) -> Flight:
        if step not in self._flights:
            self._flights, self._graded = {step: self._files.load(step)}, {}
        return self._flights[step]


@dataclasses.dataclass(eq=False)
class FlyingIteration:
    """The groups in flight in an iteration.

    Attributes:
      step: iterations done.
      flight: what is in flight now.
      judging: which of the whole groups of this process have a spread.
      num_samples: of a group.
      num_owners: processes that decode groups, each its share.
    """

    step: int
    flight: Flight
    judging: Judging
    pacing: Pacing
    num_samples: int
    num_owners: int

    def admit(self) -> dict[int, FlyingGroup]:
        """Has as many groups start as there is room for; returns those of this process."""
        flight = self.flight
        new = self.pacing.admitted(self.step, flight.next_number, len(flight.admitted_at))
        owners = shared_out(new, flight.owners.values(), self.num_owners)
        started = (FlyingSample.empty(),) * self.num_samples
        mine = {n: started for n in new if owners[n] == jax.process_index()}
        self.flight = flight.admitting(owners, self.step, mine)
        return mine

    def drop(self, without_spread: Iterable[int]) -> list[int]:
        """Drops groups, as many of those of all processes without a spread as the sieve drops."""
        dropped = self.judging.dropped(sorted(without_spread))
        if dropped:
            self.flight = self.flight.without(dropped)
        return dropped

    def chosen(self, whole: Iterable[int]) -> list[int] | None:
        """The groups that are trained on, of the whole ones of all processes; None for none yet.

        Args:
          whole: numbers; those of groups that have been dropped do not count.
        """
        admitted_at = self.flight.admitted_at
        whole = [number for number in whole if number in admitted_at]
        return self.pacing.chosen(self.step, admitted_at, whole)

    def after(self, chosen: Iterable[int], groups: dict[int, FlyingGroup]) -> Flight:
        """What is left in flight when these groups are trained on.

        Args:
          groups: those of this process as they are now.
        """
        return dataclasses.replace(self.flight, groups=groups).without(chosen)


class FlyingSource(Source):
    """A source that keeps in `_in_flight` what is in flight between its iterations."""

    _in_flight: InFlight

    def save(self, step: int, *, kept: Collection[int] = ()) -> None:
        """See `InFlight.save`."""
        self._in_flight.save(step, kept=kept)

    def check(self, step: int) -> None:
        """See `InFlight.check`."""
        self._in_flight.check(step)

    def restore(self, step: int) -> None:
        """Takes up what iteration `step` left in flight; errors as of `check`."""
        self._in_flight.check(step)
