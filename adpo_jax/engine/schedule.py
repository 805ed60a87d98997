"""Which sample runs in which slot: the host's side of continuous batching, with no arrays of JAX.

Groups of samples wait in a queue. A group is admitted when a prefix row is free and a slot is free
for at least one of its samples; its other samples follow as slots become free. A row is free again
when the last of its samples has ended.

A sample that pauses gives up its slot and keeps its place in its prefix row, as long as no group
that could decode needs the row.

Letters: B slots, P prefix rows, M samples of a prefix row.
"""

import collections
import heapq
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from adpo_jax.engine.sizes import power_of_two


class Start(NamedTuple):
    """A sample that starts in a slot."""

    group: Hashable
    sample: Any
    slot: int
    row: int
    rank: int


class Held(NamedTuple):
    """A sample that has a slot, and its group."""

    group: Hashable
    sample: Any


class _Queued(NamedTuple):
    """Samples of a group without a prefix row; at most `per_row` of them will share one."""

    group: Hashable
    samples: list
    per_row: int


class _Place(NamedTuple):
    """The place that a sample has in a prefix row, and its slot; None while it has none."""

    group: Hashable
    sample: Any
    row: int
    rank: int
    slot: int | None = None


class Schedule:
    """The queue of groups and the tables of slots and prefix rows.

    Slots and rows lie in equal parts, one a shard. A sample's slot is in the same part as its row,
    so that no device reads a prompt of another one. A group that is wider than a row, or that was
    added in smaller parts, has several rows.

    Args:
      num_slots, num_rows: multiples of `num_shards`.
      width: the most samples that share a row, M.

    Attributes:
      in_slot: who has each slot, None where it is free.
      members: [P, M] int32, the slot of each sample of a prefix row, 0 for a place without one.
      row_of, rank_of: [B] int32, the place of each slot in `members`; meaningless where it is free.
      num_waiting: samples without a slot.
      num_live: samples in slots.
    """

    def __init__(self, num_slots: int = 0, num_rows: int = 0, width: int = 1, num_shards: int = 1):
        self.num_shards = num_shards
        self.in_slot: list[Held | None] = []
        self.members = np.zeros((0, width), np.int32)
        self.row_of = self.rank_of = np.zeros(0, np.int32)
        self.num_waiting = self.num_live = 0
        self._queue: collections.deque[_Queued] = collections.deque()
        # Heaps of the free slots and rows of each shard.
        self._free_slots: list[list[int]] = [[] for _ in range(num_shards)]
        self._free_rows: list[list[int]] = [[] for _ in range(num_shards)]
        self._admitted = [collections.deque[_Place]() for _ in range(num_shards)]
        self._left_in_row: dict[int, int] = {}
        # Samples without a slot that are not to start yet, in the order in which they paused.
        self._paused: dict[Any, _Place] = {}
        self.lay_out(num_slots, num_rows, width)

    @property
    def num_slots(self) -> int:
        return len(self.in_slot)

    @property
    def num_rows(self) -> int:
        return len(self.members)

    @property
    def width(self) -> int:
        return self.members.shape[1]

    def live(self) -> list[tuple[int, Any]]:
        """The slots with samples, and these."""
        return [(slot, held.sample) for slot, held in enumerate(self.in_slot) if held is not None]

    def live_groups(self) -> list[Hashable]:
        """The group of each sample in a slot."""
        return [held.group for held in self.in_slot if held is not None]

    @property
    def needed_slots(self) -> int:
        """The smallest batch that holds the live samples, each in its shard."""
        return self._fullest(len(slots) - len(free) for slots, free in self._shards())

    @property
    def rows_in_use(self) -> int:
        """The fewest rows in all that would hold the rows in use, each in its shard."""
        rows = _ranges_of_shards(self.num_rows, self.num_shards)
        return self._fullest(len(r) - len(free) for r, free in zip(rows, self._free_rows))

    def rows_needed(self, width: int) -> int:
        """The fewest rows of this width that hold the admitted samples, each in its shard."""
        counts = [collections.Counter(p.group for p in placed) for placed in self._placed()]
        return self._fullest(sum(-(-n // width) for n in count.values()) for count in counts)

    def waiting(self, width: int) -> Iterator[tuple[Hashable, int, int]]:
        """(group, samples without a slot, further rows of this width for them), in queue order."""
        for entries in self._admitted:
            for entry in entries:
                yield entry.group, 1, 0
        for group, samples, per_row in self._queue:
            yield group, len(samples), -(-len(samples) // min(per_row, width))

    def add(self, group: Hashable, samples: Sequence, per_row: int | None = None):
        """Queues the samples of a group.

        Args:
          per_row: the most samples that share a prefix row; None for as many as rows are wide.
        """
        self._queue.append(_Queued(group, list(samples), per_row or len(samples)))
        self.num_waiting += len(samples)

    @property
    def queued(self) -> list[Hashable]:
        """The groups with samples that have no prefix row yet, in their order."""
        return list(dict.fromkeys(group for group, *_ in self._queue))

    def count(self, is_meant: Callable[[Hashable], bool]) -> int:
        """The samples in the queue of the groups that are meant."""
        return sum(len(samples) for group, samples, _ in self._queue if is_meant(group))

    def overtake(self, is_ready: Callable[[Hashable], bool]):
        """Lets the groups in the queue that are ready go before those that are not."""
        places = sorted(self._queue, key=lambda place: not is_ready(place.group))
        self._queue = collections.deque(places)

    def start(
        self,
        admits: Callable[[Hashable], bool] = lambda group: True,
        try_begin: Callable[[Any, int], bool] = lambda sample, shard: True,
    ) -> tuple[list[Start], dict[int, Hashable]]:
        """Fills free slots from the queue.

        Args:
          admits: whether a group's prompt fits a row; the queue waits behind one that does not fit.
          try_begin: takes the memory that a sample needs in a shard, and returns whether there was
            enough. If so it starts there; else it waits, and those behind it in the shard too.

        Returns:
          The samples that start, and the group of each prefix row that has to be prefilled.
        """
        starts, admitted = [], {}
        for shard in range(self.num_shards):
            starts += self._fill(shard, try_begin)
        while self._queue and admits(self._queue[0].group):
            # Where samples wait for memory, others do not overtake them.
            takes = [s for s, free in enumerate(self._free_slots) if free and not self._admitted[s]]
            roomy = max(
                (shard for shard in takes if self._free_rows[shard]),
                key=lambda shard: len(self._free_slots[shard]),
                default=None,
            )
            if roomy is None and self._take_row_of_paused(takes):
                continue
            if roomy is None:
                break
            group, samples = self._next_part()
            row = heapq.heappop(self._free_rows[roomy])
            admitted[row], self._left_in_row[row] = group, len(samples)
            places = (_Place(group, sample, row, rank) for rank, sample in enumerate(samples))
            self._admitted[roomy].extend(places)
            starts += self._fill(roomy, try_begin)
        return starts, admitted

    def _next_part(self) -> tuple[Hashable, list]:
        """Takes the next samples that share a row from the queue; a group is cut evenly."""
        group, samples, per_row = self._queue.popleft()
        num_parts = -(-len(samples) // min(per_row, self.width))
        size = -(-len(samples) // num_parts)
        if samples[size:]:
            self._queue.appendleft(_Queued(group, samples[size:], per_row))
        return group, samples[:size]

    def _fill(self, shard: int, try_begin: Callable[[Any, int], bool]) -> list[Start]:
        """Starts admitted samples of a shard in its free slots."""
        starts, admitted = [], self._admitted[shard]
        while admitted and self._free_slots[shard] and try_begin(admitted[0].sample, shard):
            place = admitted.popleft()._replace(slot=heapq.heappop(self._free_slots[shard]))
            self._take_slot(place)
            starts.append(Start(place.group, place.sample, place.slot, place.row, place.rank))
        self.num_live += len(starts)
        self.num_waiting -= len(starts)
        return starts

    def _take_slot(self, place: _Place):
        """Puts a sample into the slot of its place."""
        self.in_slot[place.slot] = Held(place.group, place.sample)
        self.members[place.row, place.rank] = place.slot
        self.row_of[place.slot], self.rank_of[place.slot] = place.row, place.rank

    def finish(self, slot: int):
        """Frees a slot whose sample has ended."""
        self._leave_row(self._leave_slot(slot).row)

    def pause(self, slot: int):
        """Frees a slot whose sample may go on later."""
        place = self._leave_slot(slot)
        self._paused[place.sample] = place

    def preempt(self, slot: int):
        """Frees a slot whose sample goes on before any other that waits in its shard."""
        self._admitted[self.shard_of_slot(slot)].appendleft(self._leave_slot(slot))
        self.num_waiting += 1

    def resume(self, sample: Hashable, group: Hashable):
        """Lets a paused sample of a group start again, before those that have not started yet."""
        self.num_waiting += 1
        place = self._paused.pop(sample, None)
        if place is None:
            self._queue.appendleft(_Queued(group, [sample], 1))
        else:
            self._admitted[self._shard_of_row(place.row)].append(place)

    def forget(self, sample: Hashable):
        """Ends a paused sample."""
        place = self._paused.pop(sample, None)
        if place is not None:
            self._leave_row(place.row)

    def shard_of_slot(self, slot: int) -> int:
        return slot * self.num_shards // self.num_slots

    def _shard_of_row(self, row: int) -> int:
        return row * self.num_shards // self.num_rows

    def _leave_slot(self, slot: int) -> _Place:
        """Frees a slot; returns the place that its sample has in its prefix row."""
        place = self._place_in(slot)._replace(slot=None)
        self.in_slot[slot] = None
        self.num_live -= 1
        heapq.heappush(self._free_slots[self.shard_of_slot(slot)], slot)
        self.members[place.row, place.rank] = 0
        return place

    def _place_in(self, slot: int) -> _Place:
        """The place of the sample in a slot."""
        return _Place(*self.in_slot[slot], int(self.row_of[slot]), int(self.rank_of[slot]), slot)

    def _take_row_of_paused(self, shards: Sequence[int]) -> bool:
        """Frees a prefix row in these shards whose samples are all paused, the first that paused.

        Returns False where there is none.
        """
        paused = collections.Counter(place.row for place in self._paused.values())
        rows = (row for row in paused if self._shard_of_row(row) in shards)
        row = next((row for row in rows if paused[row] == self._left_in_row[row]), None)
        if row is None:
            return False
        for sample in [s for s, place in self._paused.items() if place.row == row]:
            self.forget(sample)
        return True

    def _leave_row(self, row: int):
        self._left_in_row[row] -= 1
        if not self._left_in_row[row]:
            heapq.heappush(self._free_rows[self._shard_of_row(row)], row)

    def drop(self, is_unwanted: Callable[[Any], bool]) -> list:
        """Forgets the waiting samples that nobody wants any more, and returns them."""
        dropped = []
        queue, self._queue = self._queue, collections.deque()
        for group, samples, per_row in queue:
            left = []
            for sample in samples:
                (dropped if is_unwanted(sample) else left).append(sample)
            if left:
                self._queue.append(_Queued(group, left, per_row))
        for shard, entries in enumerate(self._admitted):
            self._admitted[shard] = collections.deque[_Place]()
            for entry in entries:
                if is_unwanted(entry.sample):
                    dropped.append(entry.sample)
                    self._leave_row(entry.row)
                else:
                    self._admitted[shard].append(entry)
        self.num_waiting -= len(dropped)
        return dropped

    def lay_out(self, num_slots: int, num_rows: int, width: int) -> tuple[np.ndarray, np.ndarray]:
        """Moves all samples into batches of other sizes, the live ones into the first slots.

        The prefix rows move too. No live sample leaves its shard. A group has several rows where
        rows are narrower than the group. Where there are too few rows for all samples with a place
        in one, the paused ones lose theirs, and then those that wait for a slot go back to the
        queue.

        Args:
          num_slots: at least `needed_slots`, a multiple of the shards.
          num_rows: enough for the live samples, a multiple of the shards.

        Returns:
          The old slot of each new one, [new B] int32, the old B where the new one is free; and the
          old prefix row of each new one, [new P] int32.
        """
        assert self.needed_slots <= num_slots
        if self.rows_needed(width) > num_rows:
            self._paused.clear()
        if self.rows_needed(width) > num_rows:
            self._requeue_admitted()
        assert self.rows_needed(width) <= num_rows
        old_slots = np.full(num_slots, self.num_slots, np.int32)
        old_rows = np.zeros(num_rows, np.int32)
        placed, self._left_in_row = self._placed(), {}
        self.in_slot = [None] * num_slots
        self.members = np.zeros((num_rows, width), np.int32)
        self.row_of, self.rank_of = np.zeros((2, num_slots), np.int32)
        slots = _ranges_of_shards(num_slots, self.num_shards)
        rows = _ranges_of_shards(num_rows, self.num_shards)
        for shard, places in enumerate(placed):
            live = sorted(place.slot for place in places if place.slot is not None)
            moved = dict(zip(live, slots[shard]))
            for old, new in moved.items():
                old_slots[new] = old
            self._free_slots[shard] = list(slots[shard][len(live) :])
            self._admitted[shard].clear()
            used = rows[shard].start
            for old, row, rank in _in_rows(places, width, used):
                old_rows[row] = old.row
                self._move(shard, old._replace(row=row, rank=rank, slot=moved.get(old.slot)))
                used = row + 1
            self._free_rows[shard] = list(range(used, rows[shard].stop))
        return old_slots, old_rows

    def _move(self, shard: int, place: _Place):
        """Puts a sample into another place, as one that is live, has paused or waits for a slot."""
        self._left_in_row[place.row] = self._left_in_row.get(place.row, 0) + 1
        if place.slot is not None:
            self._take_slot(place)
        elif place.sample in self._paused:
            self._paused[place.sample] = place
        else:
            self._admitted[shard].append(place)

    def _requeue_admitted(self):
        """Puts the admitted samples that wait for a slot back at the head of the queue."""
        for entries in reversed(self._admitted):
            groups = collections.defaultdict(list)
            for entry in entries:
                groups[entry.group].append(entry.sample)
            for group, samples in reversed(groups.items()):
                self._queue.appendleft(_Queued(group, samples, len(samples)))
            entries.clear()

    def narrow_width(self, num_slots: int, num_rows: int, most: int) -> int:
        """A width of rows that holds the admitted samples, when the batch shrinks to these sizes.

        Narrow rows spend no attention on the places of samples that have ended. Each number of
        slots has one of two widths, since every width is a program of its own.

        Args:
          most: samples of the widest row.
        """
        if num_slots <= num_rows:
            return 1
        narrow = min(power_of_two(-(-2 * num_slots // num_rows)), most)
        return narrow if self.rows_needed(narrow) <= num_rows else most

    def _placed(self) -> list[list[_Place]]:
        """The samples in rows, for each shard, live ones first."""
        found = []
        for (slots, _), admitted in zip(self._shards(), self._admitted):
            live = (self._place_in(slot) for slot in slots if self.in_slot[slot])
            found.append([*live, *admitted])
        for place in self._paused.values():
            found[self._shard_of_row(place.row)].append(place)
        return found

    def _shards(self) -> Iterator[tuple[range, list[int]]]:
        """The slots of each shard, and those that are free."""
        return zip(_ranges_of_shards(self.num_slots, self.num_shards), self._free_slots)

    def _fullest(self, counts: Iterator[int]) -> int:
        """The total over all shards if each had as many as the one with the largest count."""
        return max(counts) * self.num_shards


def _in_rows(places: Sequence[_Place], width: int, first: int) -> Iterator[tuple[_Place, int, int]]:
    """Each place with its new row, from `first` on, and its new rank; a group has rows of its own.

    Args:
      width: samples of a row.
    """
    groups = collections.defaultdict(list)
    for place in places:
        groups[place.group].append(place)
    for members in groups.values():
        for number, place in enumerate(members):
            yield place, first + number // width, number % width
        first += -(-len(members) // width)


def _ranges_of_shards(size: int, num_shards: int) -> list[range]:
    each = size // num_shards
    return [range(shard * each, (shard + 1) * each) for shard in range(num_shards)]
