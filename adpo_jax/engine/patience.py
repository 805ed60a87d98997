"""Lets a batch change only once its new programs are compiled, while samples decode.

A `Patience` stands between the batching loop and what decides the sizes and settings of a server's
batch. While something decodes, it leaves sizes, settings and the queue as they are until the
programs of the change are there, and of all that may follow from it: the longer rings that the
samples in it may come to need. With nothing under way there is nobody to be kept waiting, and the
loop compiles what it runs.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from adpo_jax.engine.batching import Sizing
from adpo_jax.engine.decode_state import Sizes
from adpo_jax.engine.kv_cache import PageSizes
from adpo_jax.engine.programs import (
    CopyPrompt,
    Decode,
    Draws,
    Move,
    Prefill,
    Program,
    Programs,
    ReadPiece,
)
from adpo_jax.engine.requests import Request, Sample
from adpo_jax.engine.sampling import Knobs, Method, SamplingParams
from adpo_jax.engine.schedule import Schedule
from adpo_jax.engine.sizes import length_bucket, power_of_two, smallest_holding


@dataclasses.dataclass(frozen=True)
class Needs:
    """What some requests need of the programs that decode them.

    Attributes:
      stop_width: the number of stop tokens of a row.
      longest: tokens of the longest completion.
    """

    method: Method
    stop_width: int
    longest: int

    def joined(self, other: "Needs") -> "Needs":
        """The needs of both."""
        pairs = zip(dataclasses.astuple(self.method), dataclasses.astuple(other.method))
        method = Method(*(max(pair) for pair in pairs))
        width = max(self.stop_width, other.stop_width)
        return Needs(method, width, max(self.longest, other.longest))

    def covers(self, other: "Needs") -> bool:
        """Whether programs for this do for the other, too."""
        mine, others = dataclasses.astuple(self.method), dataclasses.astuple(other.method)
        covered = all(a >= b for a, b in zip(mine, others))
        return covered and self.stop_width >= other.stop_width


def needs_of(
    requests: Iterable[Request], num_alternatives: int, stop_width: int | None = None
) -> Needs:
    """The needs of all of these together.

    Args:
      num_alternatives: how many likeliest tokens the program finds for those who want some.
      stop_width: that of the requests, where it is known.
    """
    requests = list(requests)
    methods = [request.sampling.method for request in requests]
    # Either all rows go through a step of truncation or none, so that few programs are compiled.
    truncates = any(method.truncates for method in methods)
    method = Method(
        mixed=True,
        top_k=truncates,
        top_p=truncates,
        min_p=truncates,
        min_tokens=any(method.min_tokens for method in methods),
        full_log_probs=any(method.full_log_probs for method in methods),
        routed_experts=any(method.routed_experts for method in methods),
        num_alternatives=num_alternatives if any(r.num_alternatives for r in requests) else 0,
    )
    if stop_width is None:
        stop_width = max(len(request.sampling.knobs().stop_ids) for request in requests)
    longest = max((request.sampling.max_tokens for request in requests), default=1)
    return Needs(method, stop_width, longest)


class Patience:
    """Sizes and settings of a server's batch; see `batching.Sizing` and `batching.Settings`.

    Args:
      sizing: decides the sizes that the load asks for.
      column_sizes, prefix_sizes: the sizes that there are programs for, rising.
      num_alternatives: as of `needs_of`.
      pieces_of: the shapes of the pieces in which the prompt of a request is read, as
        `reading.pieces_of` gives them; none for one that is prefilled at once.
    """

    def __init__(
        self,
        sizing: Sizing,
        programs: Programs,
        column_sizes: Sequence[int],
        prefix_sizes: Sequence[int],
        num_alternatives: int,
        pieces_of: Callable[[Request], list[tuple[int, int]]] = lambda request: [],
    ):
        self._sizing, self._programs = sizing, programs
        self._pieces_of = pieces_of
        self._column_sizes, self._prefix_sizes = column_sizes, prefix_sizes
        self._num_alternatives = num_alternatives
        self._now: Sizes | None = None
        self._needs: Needs | None = None  # of the program that decodes
        self._foreseen: tuple[Sizes, Needs] | None = None
        self._streaming = False  # whether anything decoded before this step

    @property
    def steps(self) -> int:
        return self._sizing.steps

    @property
    def most_columns(self) -> int:
        return self._sizing.most_columns

    @property
    def pages(self) -> PageSizes | None:
        return self._sizing.pages

    # --- sizes

    def room(self, now: Sizes | None, schedule: Schedule, most_in_ring: int) -> Sizes | None:
        wanted = self._sizing.room(now, schedule, most_in_ring)
        self._streaming = schedule.num_live > 0
        if now is None or wanted is None or not self._streaming:
            self._programs.wait()
            self._foreseen = None
            self._now = wanted
            return wanted
        self._foresee(now)
        if wanted != now:
            columns = now._replace(columns=wanted.columns)
            smaller = (wanted, columns._replace(prefix=wanted.prefix), columns)
            ready = (sizes for sizes in smaller if self._may_change(now, sizes, schedule))
            found = next(ready, None)
            if found is not None:
                wanted = found
            elif most_in_ring < now.columns:
                wanted = now
            else:
                # A completion needs the longer ring that was begun to be compiled at its start.
                needs = self._needs
                decode = Decode(columns, needs.method, needs.stop_width)
                self._programs.finish([Move(now, columns), decode])
                wanted = columns
        self._now = wanted
        return wanted

    def _foresee(self, now: Sizes) -> None:
        """Begins with the longer rings that what decodes may come to need."""
        if (now, self._needs) != self._foreseen:
            self._foreseen = now, self._needs
            self._programs.ready(self._decodes(now, self._needs))

    def fitted(self, now: Sizes, schedule: Schedule, most_in_ring: int) -> Sizes:
        wanted = self._sizing.fitted(now, schedule, most_in_ring)
        if wanted != now and not self._may_change(now, wanted, schedule):
            wanted = now
        self._now = wanted
        return wanted

    def smaller(self, live: int) -> int:
        return self._sizing.smaller(live)

    def _may_change(self, now: Sizes, sizes: Sizes, schedule: Schedule) -> bool:
        if sizes == now:
            return True
        waiting = _waiting(schedule)
        needs = self._needs_with([*schedule.live_groups(), *waiting])
        prefills = self._prefills(sizes, waiting)
        return self._programs.ready([Move(now, sizes), *self._decodes(sizes, needs), *prefills])

    # --- which requests may start

    def may_start(self, request: Request, now: Sizes | None, schedule: Schedule) -> bool:
        """Whether a request can go to the loop without keeping a sample waiting that decodes."""
        if now is None or not schedule.num_live:
            return True
        prefix = smallest_holding(self._prefix_sizes, len(request.prompt) - 1)
        sizes = now._replace(prefix=max(now.prefix, prefix))
        needs = self._needs_with([*schedule.live_groups(), *_waiting(schedule), request])
        programs = [*self._decodes(sizes, needs), *self._prefills(sizes, [request])]
        programs.append(Draws(power_of_two(len(request.samples))))
        if sizes != now:
            programs.append(Move(now, sizes))
        return self._programs.ready(programs)

    def _needs_with(self, requests: list[Request]) -> Needs:
        """The program that decodes these: the present one if it can."""
        needs = needs_of(requests, self._num_alternatives)
        if self._needs is not None and self._needs.covers(needs):
            return dataclasses.replace(self._needs, longest=needs.longest)
        return needs

    def most_prefilled(self, length: int, wanted: int) -> int:
        """The prompts of this length that are prefilled in one call, at most `wanted`."""
        if not self._streaming:
            return wanted
        count = 1
        while count < wanted and self._programs.ready([Prefill(self._now, 2 * count, length)]):
            count *= 2
        return count

    def _decodes(self, sizes: Sizes, needs: Needs) -> list[Program]:
        """What decodes so in these sizes, and in the longer rings that may be needed."""
        longest = min(needs.longest + self.steps, self.most_columns)
        last = max(sizes.columns, smallest_holding(self._column_sizes, longest))
        rings = [
            sizes._replace(columns=columns)
            for columns in self._column_sizes
            if sizes.columns <= columns <= last
        ]
        programs: list[Program] = []
        for old, new in itertools.pairwise([rings[0], *rings]):
            programs.append(Decode(new, needs.method, needs.stop_width))
            if old != new:
                programs.append(Move(old, new))
        return programs

    def _prefills(self, sizes: Sizes, requests: Sequence[Request]) -> list[Program]:
        """What prefills each prompt alone, but for those too long for these sizes."""
        most, programs = sizes.prefix, []
        for request in requests:
            length = len(request.prompt) - 1
            if length > most:
                continue
            bucket = min(length_bucket(length, most), most)
            if pieces := self._pieces_of(request):
                programs += [ReadPiece(*shape) for shape in pieces]
                programs.append(CopyPrompt(sizes, max(c for _, c in pieces), bucket))
            else:
                programs.append(Prefill(sizes, 1, bucket))
        return programs

    # --- settings

    def settings(self, in_slot: Sequence[Sample | None]) -> tuple[Knobs, Method]:
        """The settings of each slot's own sample, for the program that decodes now."""
        knobs, needs = _of_slots(in_slot, self._num_alternatives)
        now = self._needs
        if now is None or not self._streaming:
            self._needs = needs
        elif (now.method, now.stop_width) != (needs.method, needs.stop_width):
            # A program that does more than is needed gives the same tokens.
            for fitting in (needs, now if now.covers(needs) else now.joined(needs)):
                if fitting is now or self._programs.ready(self._decodes(self._now, fitting)):
                    self._needs = fitting
                    break
            else:
                self._needs = needs
        return _stacked(knobs, self._needs.stop_width), self._needs.method


_IDLE = SamplingParams().knobs()


def _of_slots(in_slot: Sequence[Sample | None], num_alternatives: int) -> tuple[list[Knobs], Needs]:
    """The numbers of each slot's own sample, and what the samples need together."""
    knobs = [sample.request.sampling.knobs() if sample else _IDLE for sample in in_slot]
    width = max(len(knob.stop_ids) for knob in knobs)
    requests = [sample.request for sample in in_slot if sample]
    return knobs, needs_of(requests, num_alternatives, width)


def _stacked(knobs: Sequence[Knobs], stop_width: int) -> Knobs:
    """The numbers of all slots, [B] each."""
    padded = [knob._replace(stop_ids=_padded(knob.stop_ids, stop_width)) for knob in knobs]
    return Knobs(*map(np.stack, zip(*padded)))


def own_settings(in_slot: Sequence[Sample | None], num_alternatives: int) -> tuple[Knobs, Method]:
    """The settings of each slot's own sample; see `batching.Settings`."""
    knobs, needs = _of_slots(in_slot, num_alternatives)
    return _stacked(knobs, needs.stop_width), needs.method


def _waiting(schedule: Schedule) -> list[Request]:
    """The requests that wait in the loop, each once."""
    return list(dict.fromkeys(request for request, _, _ in schedule.waiting(1)))


def _padded(stop_ids: np.ndarray, width: int) -> np.ndarray:
    return np.pad(stop_ids, (0, width - len(stop_ids)), constant_values=-1)
