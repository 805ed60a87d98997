"""Which past row belongs to which sample: the host's side of the third store (`past`).

Where a live sample needs a row and none is free, the sample that has waited longest for its tool
gives its row back. When it goes on, its whole completion is a chunk.

Letters: S past rows.
"""

import heapq
from collections.abc import Hashable, Sequence

import numpy as np

from adpo_jax.engine import past as past_lib
from adpo_jax.engine.decode_state import DecodeState, Past, with_before
from adpo_jax.engine.group_attention import PastView
from adpo_jax.engine.kv_cache import KV, Copies
from adpo_jax.engine.past import Piece
from adpo_jax.engine.requests import Sample
from adpo_jax.engine.schedule import Schedule, Start
from adpo_jax.engine.verbs import Verbs


class PastRows:
    """Which past row belongs to which sample.

    Rows lie in equal parts, one a shard, as slots do; a shard has as many of them as slots, or
    more. So a live sample always finds a row.

    Attributes:
      num_evicted: samples that gave their row back to another one.
    """

    def __init__(self, num_shards: int):
        self.num_shards, self.num_rows, self.num_evicted = num_shards, 0, 0
        self._row: dict[Hashable, int] = {}
        self._free: list[list[int]] = [[] for _ in range(num_shards)]
        # The samples without a slot that have rows, the one that paused first first.
        self._idle: dict[Hashable, None] = {}

    def row(self, sample: Hashable) -> int | None:
        return self._row.get(sample)

    def take(self, sample: Hashable, shard: int) -> bool:
        """Gives a sample that takes a slot of a shard a row there.

        Returns:
          Whether it had the row already, with what the row holds.
        """
        self._idle.pop(sample, None)
        row = self._row.get(sample)
        if row is not None and self._shard(row) == shard:
            return True
        self.release(sample)
        if not self._free[shard]:
            self._evict(shard)
        self._row[sample] = heapq.heappop(self._free[shard])
        return False

    def pause(self, sample: Hashable):
        """Lets others take the row of a sample that has given up its slot."""
        if sample in self._row:
            self._idle[sample] = None

    def release(self, sample: Hashable):
        """Frees the row of a sample, if it has one."""
        self._idle.pop(sample, None)
        row = self._row.pop(sample, None)
        if row is not None:
            heapq.heappush(self._free[self._shard(row)], row)

    def lay_out(self, num_rows: int) -> np.ndarray:
        """Moves all rows into a store of another size, which holds those of the live samples.

        Where it holds too few of the others, those that paused first lose theirs.

        Returns:
          [new S] int32, the old row of each new one.
        """
        part = num_rows // self.num_shards
        live = [sample for sample in self._row if sample not in self._idle]
        of_shard: list[list[Hashable]] = [[] for _ in range(self.num_shards)]
        for sample in [*live, *reversed(self._idle)]:
            of_shard[self._shard(self._row[sample])].append(sample)
        old, self._row = self._row, {}
        old_rows = np.zeros(num_rows, np.int32)
        for shard, samples in enumerate(of_shard):
            for row, sample in enumerate(samples[:part], shard * part):
                old_rows[row], self._row[sample] = old[sample], row
            for sample in samples[part:]:
                del self._idle[sample]
                self.num_evicted += 1
            used = shard * part + min(len(samples), part)
            self._free[shard] = list(range(used, (shard + 1) * part))
        self.num_rows = num_rows
        return old_rows

    def _shard(self, row: int) -> int:
        return row * self.num_shards // self.num_rows

    def _evict(self, shard: int):
        """Frees the row of a sample without a slot.

        Those that wait for a tool come first, and of them the one that has waited longest; then
        the last of those that wait for a slot.
        """
        idle = [sample for sample in self._idle if self._shard(self._row[sample]) == shard]
        waiting = (sample for sample in idle if sample.ended)
        self.release(next(waiting, idle[-1]))
        self.num_evicted += 1


class PastKeeper:
    """What a batch does with its past rows; there are none until a first turn has ended.

    Args:
      schedule: which sample runs in which slot.

    Attributes:
      longest: tokens of the longest completion that lies in the past, or will; 0 for none.
    """

    def __init__(self, verbs: Verbs, schedule: Schedule):
        self._verbs, self._schedule = verbs, schedule
        self._rows = PastRows(schedule.num_shards)
        self.longest = 0

    @property
    def num_evicted(self) -> int:
        """Samples whose rows others took while they waited."""
        return self._rows.num_evicted

    @property
    def longest_piece(self) -> int:
        """The most tokens that are prefilled at once for a sample."""
        return past_lib.CHUNK_LENGTHS[-1]

    def note(self, num_tokens: int):
        """Notes how many columns the rows need."""
        self.longest = max(self.longest, num_tokens)

    def pause(self, sample: Sample):
        """Lets others take the row of a sample that has given up its slot."""
        self._rows.pause(sample)

    def release(self, sample: Sample):
        """Frees the row of a sample, if it has one."""
        self._rows.release(sample)

    def resized(self, state: DecodeState, num_rows: int, columns: int) -> DecodeState:
        """The state with so many past rows, in which the samples keep theirs, or with first ones.

        The tables of the device are those of before, and `placed` makes new ones.
        """
        verbs, past, old_rows = self._verbs, state.past, None
        if past is None:
            self._rows.lay_out(num_rows)
            for slot, sample in self._schedule.live():
                self._rows.take(sample, self._schedule.shard_of_slot(slot))
            past = Past(past_lib.empty(verbs, num_rows, columns), None)
            return state._replace(past=past, slots=with_before(state.slots))
        if num_rows != self._rows.num_rows:
            old_rows = self._rows.lay_out(num_rows)
        return self.with_store(state, past_lib.resized(verbs, past.kv, old_rows, columns))

    def placed(self, state: DecodeState) -> DecodeState:
        """The state whose tables say which past row belongs to which slot now."""
        places = [
            (slot, self._rows.row(s), len(s.request.prompt) - 1, s.before)
            for slot, s in self._schedule.live()
        ]
        view = view_of(places, self._schedule.num_slots, self._rows.num_rows)
        view = past_lib.placed(self._verbs, view)
        return state._replace(past=state.past._replace(view=view))

    def keep(
        self, state: DecodeState, ended: Sequence[tuple[Sample, int, int, int]]
    ) -> DecodeState:
        """Copies turns that have ended out of the ring into the past rows of their samples.

        Args:
          ended: each sample, its slot, the column of the ring where its tokens begin, and their
            count.
        """
        schedule, copies = self._schedule, []
        for sample, slot, first, count in ended:
            shard, at = schedule.shard_of_slot(slot), sample.before
            had_row = self._rows.take(sample, shard)
            assert had_row or not at
            self._rows.pause(sample)
            row = self._rows.row(sample)
            copies.append((shard, Copies(row, slot, first, at, count, row)))
            sample.in_past = at + count
        kv = past_lib.put_all(self._verbs, state.past.kv, state.ring, copies, schedule.num_shards)
        return self.with_store(state, kv)

    def chunks(self, starts: Sequence[Start]) -> list[Piece]:
        """What is prefilled for samples that start: all that their past rows do not hold yet.

        Each of them gets a row first.
        """
        chunks = []
        for _, sample, slot, prefix_row, _ in starts:
            shard = self._schedule.shard_of_slot(slot)
            if not self._rows.take(sample, shard):
                sample.in_past = 0
            if sample.num_tokens > sample.in_past:
                prompt, row = sample.request.prompt, self._rows.row(sample)
                fed = np.concatenate([prompt[-1:], sample.completion[:-1]])[sample.in_past :]
                first = len(prompt) - 1
                chunks.append(Piece(shard, fed, sample.in_past, first, row, prefix_row))
                sample.in_past = sample.num_tokens
        return chunks

    def store(self, state: DecodeState) -> KV:
        """What a sample's chunks are prefilled into."""
        return state.past.kv

    def with_store(self, state: DecodeState, store: KV) -> DecodeState:
        """The state with another such store."""
        return state._replace(past=state.past._replace(kv=store))


def view_of(places: Sequence[tuple[int, int, int, int]], num_slots: int, num_rows: int) -> PastView:
    """The table of the rows of live samples.

    Args:
      places: (slot, past row, position of its first column, its columns) of each.
    """
    row = np.zeros(num_slots, np.int32)
    slot, first, length = np.zeros((3, num_rows), np.int32)
    for at, past_row, position, columns in places:
        row[at] = past_row
        slot[past_row], first[past_row], length[past_row] = at, position, columns
    return PastView(row, slot[:, None], first, length)
