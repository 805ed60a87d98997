"""Which sample runs in which slot: the host's side of continuous batching, with no arrays of JAX.

Groups wait in a queue. A group is admitted when a prefix row is free and a slot is free for at
least one of its samples; its other samples follow as slots become free. A row is free again when
the last sample of its group has ended.

Letters: B slots, P prefix rows, M samples of a group.
"""

import collections
import dataclasses
import heapq
import zlib

import numpy as np

MIN_BUCKET = 16
COLUMN_STEP = 32


def length_bucket(length: int, limit: int) -> int:
    """The smallest power of two that holds `length`, at least 16 and at most about `limit`."""
    return max(min(max(MIN_BUCKET, power_of_two(length)), limit), length, 1)


def power_of_two(x: int) -> int:
    """The smallest power of two that is at least x."""
    return 1 << max(x - 1, 0).bit_length()


def column_buckets(max_tokens: int, stages: int) -> list[int]:
    """Lengths that the ring of columns grows through, the last one at least `max_tokens`."""
    step = -(-max_tokens // (stages * COLUMN_STEP)) * COLUMN_STEP
    if max_tokens <= COLUMN_STEP:
        step = length_bucket(max_tokens, COLUMN_STEP)
    return [step * (i + 1) for i in range(-(-max_tokens // step))]


def slot_buckets(
    num_slots: int, fractions: tuple[float, ...], multiple: int, smallest: int
) -> list[int]:
    """Batch sizes that the slots shrink through, rising, the last one `num_slots`."""
    sizes = {-(-round(num_slots * f) // multiple) * multiple for f in fractions}
    return sorted({s for s in sizes if smallest <= s < num_slots} | {num_slots})


def prompt_uids(prompts: list[np.ndarray]) -> np.ndarray:
    """A number for each prompt that does not depend on its place in the list, [P] uint32.

    A hash of the tokens; of equal prompts, each occurrence has its own.
    """
    seen = collections.Counter()
    uids = []
    for prompt in prompts:
        tokens = prompt.astype("<i4").tobytes()
        uids.append(zlib.crc32(seen[tokens].to_bytes(4, "little"), zlib.crc32(tokens)))
        seen[tokens] += 1
    return np.array(uids, np.uint32)


@dataclasses.dataclass(frozen=True)
class Start:
    """A sample that starts in a slot."""

    group: int
    sample: int
    slot: int
    row: int


class Schedule:
    """The queue of groups and the tables of slots and prefix rows.

    Attributes:
      sample_in: [B] int64, group * n + sample of each slot, -1 where it is free.
      members: [P, M] int32, the slot of each sample of a prefix row, 0 where it has none.
      row_of, rank_of: [B] int32, the place of each slot in `members`; meaningless where it is free.
    """

    def __init__(self, num_groups: int, n: int, num_slots: int, num_rows: int):
        self.n = n
        self.sample_in = np.full(num_slots, -1, np.int64)
        self.members = np.zeros((num_rows, n), np.int32)
        self.row_of = np.zeros(num_slots, np.int32)
        self.rank_of = np.zeros(num_slots, np.int32)
        self._waiting = collections.deque((g, s) for g in range(num_groups) for s in range(n))
        self._free_slots = list(range(num_slots))
        self._free_rows = list(range(num_rows))
        self._row_of_group: dict[int, int] = {}
        self._left = [n] * num_groups

    @property
    def num_slots(self) -> int:
        return len(self.sample_in)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def live_slots(self) -> np.ndarray:
        return np.flatnonzero(self.sample_in >= 0)

    def start(self) -> tuple[list[Start], dict[int, int]]:
        """Fills free slots from the queue.

        Returns:
          the samples that start, and the prefix row of each group that has to be prefilled.
        """
        starts, admitted = [], {}
        while self._waiting and self._free_slots:
            group, sample = self._waiting[0]
            if group not in self._row_of_group:
                if not self._free_rows:
                    break
                admitted[group] = self._row_of_group[group] = heapq.heappop(self._free_rows)
            self._waiting.popleft()
            slot, row = heapq.heappop(self._free_slots), self._row_of_group[group]
            self.sample_in[slot] = group * self.n + sample
            self.members[row, sample] = slot
            self.row_of[slot], self.rank_of[slot] = row, sample
            starts.append(Start(group, sample, slot, row))
        return starts, admitted

    def finish(self, slot: int) -> int | None:
        """Frees a slot whose sample has ended; returns its group if that was its last sample."""
        group = int(self.sample_in[slot]) // self.n
        self.sample_in[slot] = -1
        heapq.heappush(self._free_slots, slot)
        self.members[self.row_of[slot], self.rank_of[slot]] = 0
        self._left[group] -= 1
        if self._left[group]:
            return None
        heapq.heappush(self._free_rows, self._row_of_group.pop(group))
        return group

    def compact(self, num_slots: int) -> tuple[np.ndarray, np.ndarray]:
        """Moves the live samples into the first slots of a smaller batch; none may be waiting.

        The prefix rows follow: with `members` as narrow as the rows allow, no attention is spent on
        places of samples that have ended. Where there is a row for each slot, a group has several.

        Returns:
          [new B] int32, the old slot of each new one, the old B where it is free; and
          [new P] int32, the old prefix row of each new one.
        """
        live = self.live_slots
        assert len(live) <= num_slots
        assert not self._waiting
        order = np.full(num_slots, self.num_slots, np.int32)
        order[: len(live)] = live
        moved = np.full(num_slots, -1, np.int64)
        moved[: len(live)] = self.sample_in[live]
        self.sample_in, old_rows = moved, self.row_of[live]
        self._free_slots = list(range(len(live), num_slots))
        return order, self._regroup(old_rows, min(len(self.members), num_slots))

    def _regroup(self, old_rows: np.ndarray, num_rows: int) -> np.ndarray:
        """Lays the table of members out anew over `num_rows` rows; old_rows are of the slots."""
        groups = collections.defaultdict(list)
        for slot in self.live_slots.tolist():
            groups[int(self.sample_in[slot]) // self.n].append(slot)
        width = self._width(list(map(len, groups.values())), num_rows)
        self.members = np.zeros((num_rows, width), np.int32)
        self.row_of = np.zeros(self.num_slots, np.int32)
        self.rank_of = np.zeros(self.num_slots, np.int32)
        source, row = np.zeros(num_rows, np.int32), 0
        for slots in groups.values():
            for rank, slot in enumerate(slots):
                self.row_of[slot], self.rank_of[slot] = row + rank // width, rank % width
                self.members[self.row_of[slot], self.rank_of[slot]] = slot
                source[self.row_of[slot]] = old_rows[slot]
            row += -(-len(slots) // width)
        return source

    def _width(self, group_sizes: list[int], num_rows: int) -> int:
        """Members of a row: one of two for each number of slots, since programs differ by it."""
        if self.num_slots <= num_rows:
            return 1
        narrow = min(power_of_two(-(-2 * self.num_slots // num_rows)), self.n)
        fits = sum(-(-size // narrow) for size in group_sizes) <= num_rows
        return narrow if fits else self.n
