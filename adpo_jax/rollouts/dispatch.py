"""Who samples which group: what a trainer hands out to samplers, and what comes back.

A group is handed to one sampler. If that one is silent for `lease_s`, or reports that it no longer
holds the group, the group is handed out again. The first delivery counts; later ones are dropped. A
sampler that joins late, dies or comes back costs its own samples' time.

This knows neither HTTP nor a model, and takes its clock as an argument. Its methods are called from
any thread.
"""

import dataclasses
import threading
import time
from collections.abc import Callable, Collection, Iterable

import numpy as np

from adpo_jax.records import Completion

# Seconds without a sign of life, after which a sampler's groups are others'.
LEASE_S = 30.0


@dataclasses.dataclass(frozen=True, eq=False)
class Work:
    """A group to be sampled.

    Attributes:
      number: of the group.
      prompt: token ids.
      keys: [G, 2] uint32, the key of each sample.
    """

    number: int
    prompt: list[int]
    keys: np.ndarray


@dataclasses.dataclass(frozen=True)
class Order:
    """What a sampler is to do next.

    Attributes:
      version: of the weights to sample with; None before there are any.
      works: groups to begin.
      dropped: numbers of groups that it holds and nobody wants any more.
      finished: whether the run is over.
    """

    version: int | None
    works: list[Work]
    dropped: list[int]
    finished: bool


@dataclasses.dataclass
class _Sampler:
    """A sampler."""

    heard: float
    holds: set[int] = dataclasses.field(default_factory=set)
    num_asked: int = 0  # how often it asked what to do next
    num_waiting: int = 0  # of these questions
    room: int = 0  # for further groups, as it said last


class Dispatch:
    """The groups in flight of a trainer with samplers elsewhere.

    Args:
      lease_s: seconds without a sign of life, after which a sampler's groups are others'.
      clock: seconds, rising.
    """

    def __init__(self, *, lease_s: float, clock: Callable[[], float] = time.monotonic):
        self._lease_s, self._clock = lease_s, clock
        self._changed = threading.Condition()
        self._version: int | None = None
        self._finished = False
        self._waiting: dict[int, Work] = {}  # in the order of their numbers
        self._handed_out: dict[int, Work] = {}
        self._whole: dict[int, list[Completion]] = {}
        self._samplers: dict[str, _Sampler] = {}
        self.num_taken_back = 0
        self.num_doubles = 0

    # --- the trainer's side

    def publish(self, version: int, works: Iterable[Work]) -> None:
        """Has samplers go on with weights of this version, and adds groups to be sampled by them.

        All of that happens at once, so that no group is begun by older weights.
        """
        with self._changed:
            self._version = version
            self._waiting = dict(sorted((self._waiting | {w.number: w for w in works}).items()))
            self._changed.notify_all()

    def restore(self, whole: dict[int, list[Completion]]) -> None:
        """Adds groups that are whole already."""
        with self._changed:
            self._whole |= whole

    def whole(self) -> list[int]:
        """The numbers of the groups that are whole and have not been taken."""
        with self._changed:
            return list(self._whole)

    def wait_for_more(self, num_whole: int, timeout: float) -> bool:
        """Waits until more groups than these are whole; returns whether there are."""
        with self._changed:
            self._take_back()
            return self._changed.wait_for(lambda: len(self._whole) > num_whole, timeout)

    def take(self, numbers: Iterable[int]) -> dict[int, list[Completion]]:
        """The completions of whole groups, which are forgotten here."""
        with self._changed:
            return {number: self._whole.pop(number) for number in numbers}

    def kept(self) -> dict[int, list[Completion]]:
        """The whole groups that have not been taken."""
        with self._changed:
            return dict(self._whole)

    def finish(self, timeout: float) -> None:
        """Tells all samplers that the run is over; waits until they have heard it."""
        with self._changed:
            self._finished = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._samplers, timeout)

    @property
    def version(self) -> int:
        """That of the newest weights; -1 before there are any."""
        with self._changed:
            return -1 if self._version is None else self._version

    @property
    def num_samplers(self) -> int:
        """Samplers that have been heard of within the lease."""
        with self._changed:
            self._take_back()
            return len(self._samplers)

    # --- the samplers' side

    def order(
        self, sampler: str, holds: Collection[int], room: int, version: int, timeout: float
    ) -> Order:
        """What a sampler is to do next. Waits while there is nothing new for it.

        A sampler that asks again has lost its line, so its earlier question ends with nothing.

        Args:
          sampler: its name, another one each time that it starts.
          holds: the numbers of all groups that it has and has not delivered.
          room: how many further ones it could begin.
          version: of the weights that it has; below 0 for none.
          timeout: seconds to wait, below the lease.
        """
        holds = set(holds)
        with self._changed:
            known = self._heard(sampler)
            if known.room != room and self._waiting:
                self._changed.notify_all()  # what was kept for it may be others'
            known.room = room
            known.num_asked += 1
            asked = known.num_asked
            for lost in known.holds - holds:
                self._give_back(known, lost)
            unwanted = sorted(holds - known.holds)

            def has_news() -> bool:
                newer = self._version is not None and self._version != version
                news = self._finished or unwanted or newer or self._share(known, room, holds)
                return bool(news or known.num_asked != asked)

            if known.num_waiting:
                self._changed.notify_all()
            known.num_waiting += 1
            self._changed.wait_for(has_news, timeout)
            known.num_waiting -= 1
            if self._finished:
                self._samplers.pop(sampler, None)
                self._changed.notify_all()
                return Order(self._version, [], [], True)
            if known.num_asked != asked:
                return Order(self._version, [], [], False)
            known = self._heard(sampler)
            dropped = sorted(holds - known.holds)
            works = self._hand_out(known, room, holds)
            return Order(self._version, works, dropped, False)

    def deliver(self, sampler: str, number: int, completions: list[Completion]) -> bool:
        """Takes a whole group; returns False where nobody waits for it.

        Raises:
          ValueError: for completions that say experts of another prompt than the group's.
        """
        with self._changed:
            asked = self._handed_out.get(number) or self._waiting.get(number)
            if asked is not None:
                _check_experts(asked, completions)
            if sampler in self._samplers:
                self._heard(sampler)
            for known in self._samplers.values():
                known.holds.discard(number)
            wanted = self._handed_out.pop(number, None) or self._waiting.pop(number, None)
            if wanted is None:
                self.num_doubles += 1
                return False
            self._whole[number] = completions
            self._changed.notify_all()
            return True

    def alive(self, sampler: str) -> None:
        """Takes note that a sampler lives, which has not asked for a while."""
        with self._changed:
            if sampler in self._samplers:
                self._heard(sampler)

    # --- with the lock held

    def _heard(self, sampler: str) -> _Sampler:
        now = self._clock()
        known = self._samplers.setdefault(sampler, _Sampler(now))
        known.heard = now
        self._take_back()
        return known

    def _take_back(self) -> None:
        """Takes the groups of the silent back."""
        limit = self._clock() - self._lease_s
        for name in [name for name, known in self._samplers.items() if known.heard < limit]:
            known = self._samplers.pop(name)
            for number in list(known.holds):
                self._give_back(known, number)
            self._changed.notify_all()  # what was kept for it is others'

    def _give_back(self, known: _Sampler, number: int) -> None:
        known.holds.discard(number)
        work = self._handed_out.pop(number, None)
        if work is not None:
            self.num_taken_back += 1
            self._waiting = dict(sorted((self._waiting | {number: work}).items()))
            self._changed.notify_all()

    def _share(self, known: _Sampler, room: int, holds: set[int]) -> list[int]:
        """The groups that a sampler may begin now: its share of what is not whole, oldest first.

        It gets more where others have no room for theirs. Those that it is being told to drop are
        not among them.
        """
        if self._version is None or not room or not self._waiting:
            return []
        others = [other for other in self._samplers.values() if other is not known]
        share = -(-(len(self._waiting) + len(self._handed_out)) // (len(others) + 1))
        kept = sum(max(0, min(other.room, share - len(other.holds))) for other in others)
        count = min(room, max(share - len(known.holds), len(self._waiting) - kept, 0))
        return [number for number in self._waiting if number not in holds][:count]

    def _hand_out(self, known: _Sampler, room: int, holds: set[int]) -> list[Work]:
        numbers = self._share(known, room, holds)
        known.room = room - len(numbers)
        works = [self._waiting.pop(number) for number in numbers]
        self._handed_out |= {work.number: work for work in works}
        known.holds |= set(numbers)
        return works


def _check_experts(work: Work, completions: list[Completion]) -> None:
    wanted = len(work.prompt) - 1
    for completion in completions:
        of_prompt = completion.prompt_experts
        count = 0 if of_prompt is None else len(of_prompt)
        if completion.experts is not None and count != wanted:
            raise ValueError(
                f"group {work.number} says the experts of {count} tokens of its prompt, which has "
                f"{wanted} before its last"
            )
