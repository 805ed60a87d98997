"""Which sample runs in which slot: the host's side of continuous batching, with no arrays of JAX.

Groups wait in a queue. A group is admitted when a prefix row is free and a slot is free for at
least one of its samples; its other samples follow as slots become free. A row is free again when
the last of its samples has ended.

Letters: B slots, P prefix rows, M samples of a group.
"""

import collections
import dataclasses
import heapq
import zlib

import numpy as np

MIN_BUCKET = 16
# Tokens of one prefill call, padding included; bounds its activations.
PREFILL_TOKENS = 8192
COLUMN_STEP = 32


def length_bucket(length: int, limit: int) -> int:
    """The smallest power of two that holds `length`, at least 16 and at most about `limit`."""
    return max(min(max(MIN_BUCKET, power_of_two(length)), limit), length, 1)


def power_of_two(x: int) -> int:
    """The smallest power of two that is at least x."""
    return 1 << max(x - 1, 0).bit_length()


def prefill_rows(length: int, multiple: int) -> int:
    """Prompts of this length that are prefilled at once, at most: a power of two, up to a multiple.

    No more, since the rows of a call are padded to one.
    """
    rows = 1 << (max(1, PREFILL_TOKENS // length).bit_length() - 1)
    return -(-rows // multiple) * multiple


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


def doubling_sizes(most: int, multiple: int, smallest: int) -> list[int]:
    """`smallest`, twice that and so on, each up to a multiple; the last one `most`."""
    doubled = (smallest << i for i in range(most.bit_length()))
    sizes = {-(-size // multiple) * multiple for size in doubled}
    return sorted({size for size in sizes if size < most} | {most})


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
    rank: int


class Schedule:
    """The queue of groups and the tables of slots and prefix rows.

    Slots and rows lie in equal parts, one a shard; a sample's slot is in the part of its row: no
    device then reads a prompt that another one has. Where there are fewer groups than shards, each
    is split over several rows.

    Args:
      num_slots, num_rows: multiples of `num_shards`.

    Attributes:
      sample_in: [B] int64, group * n + sample of each slot, -1 where it is free.
      members: [P, M] int32, the slot of each sample of a prefix row, 0 where it has none.
      row_of, rank_of: [B] int32, the place of each slot in `members`; meaningless where it is free.
    """

    def __init__(self, num_groups: int, n: int, num_slots: int, num_rows: int, num_shards: int = 1):
        self.n, self.num_shards = n, num_shards
        self.sample_in = np.full(num_slots, -1, np.int64)
        parts = rows_of_a_group(num_groups, n, num_shards)
        samples = [part.tolist() for part in np.array_split(np.arange(n), parts)]
        self.members = np.zeros((num_rows, len(samples[0])), np.int32)
        self.row_of = np.zeros(num_slots, np.int32)
        self.rank_of = np.zeros(num_slots, np.int32)
        # (group, its samples that share a row), not admitted yet.
        self._queue = collections.deque((g, part) for g in range(num_groups) for part in samples)
        self._free_slots = [list(part) for part in _parts(num_slots, num_shards)]
        self._free_rows = [list(part) for part in _parts(num_rows, num_shards)]
        # Of each shard, (group, sample, row, rank) that wait for a slot there.
        self._admitted = [collections.deque() for _ in range(num_shards)]
        self._left_in_row: dict[int, int] = {}
        self._left = [n] * num_groups

    @property
    def num_slots(self) -> int:
        return len(self.sample_in)

    @property
    def num_waiting(self) -> int:
        """Samples without a slot."""
        return sum(map(len, self._admitted)) + sum(len(samples) for _, samples in self._queue)

    @property
    def live_slots(self) -> np.ndarray:
        return np.flatnonzero(self.sample_in >= 0)

    @property
    def needed_slots(self) -> int:
        """The smallest batch that holds the live samples, each in its shard."""
        live = self.sample_in.reshape(self.num_shards, -1) >= 0
        return int(live.sum(axis=1).max()) * self.num_shards

    def start(self) -> tuple[list[Start], dict[int, int]]:
        """Fills free slots from the queue.

        Returns:
          the samples that start, and the group of each prefix row that has to be prefilled.
        """
        starts, admitted = [], {}
        for shard in range(self.num_shards):
            starts += self._fill(shard)
        while self._queue:
            roomy = max(
                (shard for shard in range(self.num_shards) if self._free_rows[shard]),
                key=lambda shard: len(self._free_slots[shard]),
                default=None,
            )
            if roomy is None or not self._free_slots[roomy]:
                break
            group, samples = self._queue.popleft()
            row = heapq.heappop(self._free_rows[roomy])
            admitted[row], self._left_in_row[row] = group, len(samples)
            places = ((group, sample, row, rank) for rank, sample in enumerate(samples))
            self._admitted[roomy].extend(places)
            starts += self._fill(roomy)
        return starts, admitted

    def _fill(self, shard: int) -> list[Start]:
        """Starts admitted samples of a shard in its free slots."""
        starts = []
        while self._admitted[shard] and self._free_slots[shard]:
            group, sample, row, rank = self._admitted[shard].popleft()
            slot = heapq.heappop(self._free_slots[shard])
            self.sample_in[slot] = group * self.n + sample
            self.members[row, rank] = slot
            self.row_of[slot], self.rank_of[slot] = row, rank
            starts.append(Start(group, sample, slot, row, rank))
        return starts

    def finish(self, slot: int) -> int | None:
        """Frees a slot whose sample has ended; returns its group if that was its last sample."""
        group, row = int(self.sample_in[slot]) // self.n, int(self.row_of[slot])
        shard = slot * self.num_shards // self.num_slots
        self.sample_in[slot] = -1
        heapq.heappush(self._free_slots[shard], slot)
        self.members[row, self.rank_of[slot]] = 0
        self._left_in_row[row] -= 1
        if not self._left_in_row[row]:
            heapq.heappush(self._free_rows[shard], row)
        self._left[group] -= 1
        return None if self._left[group] else group

    def compact(self, num_slots: int) -> tuple[np.ndarray, np.ndarray]:
        """Moves the live samples into the first slots of smaller shards; none may be waiting.

        The prefix rows follow: with `members` as narrow as the rows allow, no attention is spent on
        places of samples that have ended. Where there is a row for each slot, a group has several.

        Args:
          num_slots: at least `needed_slots`, a multiple of the shards.

        Returns:
          [new B] int32, the old slot of each new one, the old B where it is free; and
          [new P] int32, the old prefix row of each new one.
        """
        assert self.needed_slots <= num_slots
        assert not self.num_waiting
        order = np.full(num_slots, self.num_slots, np.int32)
        before, after = _parts(self.num_slots, self.num_shards), _parts(num_slots, self.num_shards)
        self._free_slots = []
        for old, new in zip(before, after):
            live = [slot for slot in old if self.sample_in[slot] >= 0]
            order[new.start : new.start + len(live)] = live
            self._free_slots.append(list(new[len(live) :]))
        exists = order < self.num_slots
        moved = np.full(num_slots, -1, np.int64)
        moved[exists] = self.sample_in[order[exists]]
        old_rows = np.zeros(num_slots, np.int32)
        old_rows[exists] = self.row_of[order[exists]]
        self.sample_in = moved
        return order, self._regroup(old_rows, min(len(self.members), num_slots))

    def _regroup(self, old_rows: np.ndarray, num_rows: int) -> np.ndarray:
        """Lays the table of members out anew over `num_rows` rows; old_rows are of the slots."""
        shards = []
        for part in _parts(self.num_slots, self.num_shards):
            groups = collections.defaultdict(list)
            for slot in part:
                if self.sample_in[slot] >= 0:
                    groups[int(self.sample_in[slot]) // self.n].append(slot)
            shards.append(groups)
        sizes = [[len(slots) for slots in groups.values()] for groups in shards]
        width = self._width(sizes, num_rows)
        self.members = np.zeros((num_rows, width), np.int32)
        self.row_of = np.zeros(self.num_slots, np.int32)
        self.rank_of = np.zeros(self.num_slots, np.int32)
        self._left_in_row = collections.Counter()
        source = np.zeros(num_rows, np.int32)
        for groups, rows in zip(shards, _parts(num_rows, self.num_shards)):
            row = rows.start
            for slots in groups.values():
                for rank, slot in enumerate(slots):
                    self.row_of[slot], self.rank_of[slot] = row + rank // width, rank % width
                    self.members[self.row_of[slot], self.rank_of[slot]] = slot
                    self._left_in_row[int(self.row_of[slot])] += 1
                    source[self.row_of[slot]] = old_rows[slot]
                row += -(-len(slots) // width)
        return source

    def _width(self, group_sizes: list[list[int]], num_rows: int) -> int:
        """Members of a row: one of two for each number of slots, since programs differ by it."""
        if self.num_slots <= num_rows:
            return 1
        narrow = min(power_of_two(-(-2 * self.num_slots // num_rows)), self.n)
        room = num_rows // self.num_shards
        fits = all(sum(-(-size // narrow) for size in sizes) <= room for sizes in group_sizes)
        return narrow if fits else self.n


def rows_of_a_group(num_groups: int, n: int, num_shards: int) -> int:
    """Prefix rows of a group's samples: several where there are fewer groups than shards."""
    return min(n, -(-num_shards // max(num_groups, 1)))


def _parts(size: int, num_shards: int) -> list[range]:
    each = size // num_shards
    return [range(shard * each, (shard + 1) * each) for shard in range(num_shards)]
