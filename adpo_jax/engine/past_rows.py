"""Which past row belongs to which sample: the host's side of the third store (`past`).

Where a live sample needs a row and none is free, the sample that has waited longest for its tool
gives its row back. When it goes on, its whole completion is a chunk.

Letters: S past rows.
"""

import heapq
from collections.abc import Sequence

import numpy as np

from adpo_jax.engine import past as past_lib
from adpo_jax.engine.decode_state import DecodeState, Past, Sizes, with_before
from adpo_jax.engine.group_attention import PastView
from adpo_jax.engine.keeper import EndedTurn, Keeper, Prefill, first_to_lose, missing
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
        self._row: dict[Sample, int] = {}
        self._free: list[list[int]] = [[] for _ in range(num_shards)]
        # The samples without a slot that have rows, the one that paused first first.
        self._idle: dict[Sample, None] = {}

    def row(self, sample: Sample) -> int | None:
        return self._row.get(sample)

    def take(self, sample: Sample, shard: int) -> bool:
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

    def pause(self, sample: Sample):
        """Lets others take the row of a sample that has given up its slot."""
        if sample in self._row:
            self._idle[sample] = None

    def release(self, sample: Sample):
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
        of_shard: list[list[Sample]] = [[] for _ in range(self.num_shards)]
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
        """Frees the row of a sample without a slot."""
        idle = [sample for sample in self._idle if self._shard(self._row[sample]) == shard]
        self.release(first_to_lose(idle))
        self.num_evicted += 1


class PastKeeper(Keeper):
    """What a batch does with its past rows; there are none until a first turn has ended.

    Args:
      schedule: which sample runs in which slot.
    """

    copies_ring = True

    def __init__(self, verbs: Verbs, schedule: Schedule):
        self._verbs, self._schedule = verbs, schedule
        self._rows = PastRows(schedule.num_shards)
        self.longest = 0

    @property
    def num_evicted(self) -> int:
        return self._rows.num_evicted

    def expect(self, num_tokens: int):
        self.longest = max(self.longest, num_tokens)

    def pause(self, sample: Sample):
        self._rows.pause(sample)

    def release(self, sample: Sample):
        self._rows.release(sample)

    def resized(self, state: DecodeState, now: Sizes, sizes: Sizes) -> DecodeState:
        """The state with past rows of these sizes; samples keep theirs, or get their first ones."""
        if not sizes.past_rows:
            return state
        verbs, past, old_rows = self._verbs, state.past, None
        changed = sizes.past_rows != now.past_rows
        if past is None:
            self._rows.lay_out(sizes.past_rows)
            for slot, sample in self._schedule.live():
                self._rows.take(sample, self._schedule.shard_of_slot(slot))
            past = Past(past_lib.empty(verbs, sizes.past_rows, sizes.past), None)
            state = state._replace(past=past, slots=with_before(state.slots))
        else:
            if changed:
                old_rows = self._rows.lay_out(sizes.past_rows)
            state = _with_kv(state, past_lib.resized(verbs, past.kv, old_rows, sizes.past))
        return self._placed(state) if changed or sizes.moves(now) else state

    def started(self, state: DecodeState, starts: Sequence[Start]) -> DecodeState:
        return state if state.past is None else self._placed(state)

    def _placed(self, state: DecodeState) -> DecodeState:
        """The state whose tables say which past row belongs to which slot now."""
        places = [
            (slot, self._rows.row(s), len(s.request.prompt) - 1, s.before)
            for slot, s in self._schedule.live()
        ]
        view = view_of(places, self._schedule.num_slots, self._rows.num_rows)
        view = past_lib.placed(self._verbs, view)
        return state._replace(past=state.past._replace(view=view))

    def keep(self, state: DecodeState, ended: Sequence[EndedTurn]) -> DecodeState:
        """Copies turns that have ended out of the ring into the past rows of their samples."""
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
        return _with_kv(state, kv)

    def refilled(
        self, state: DecodeState, starts: Sequence[Start], prefill: Prefill
    ) -> DecodeState:
        if state.past is None:
            return state
        chunks = self._chunks(starts)
        if not chunks:
            return state
        return _with_kv(state, prefill(state.past.kv, chunks, past_lib.CHUNK_LENGTHS[-1]))

    def _chunks(self, starts: Sequence[Start]) -> list[Piece]:
        """What is prefilled for samples that start: all that their past rows do not hold yet.

        Each of them gets a row first.
        """
        chunks = []
        for _, sample, slot, prefix_row, _ in starts:
            shard = self._schedule.shard_of_slot(slot)
            if not self._rows.take(sample, shard):
                sample.in_past = 0
            chunks += missing(sample, shard, self._rows.row(sample), prefix_row)
        return chunks


def _with_kv(state: DecodeState, kv: KV) -> DecodeState:
    """The state with these past rows."""
    return state._replace(past=state.past._replace(kv=kv))


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
