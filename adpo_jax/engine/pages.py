"""Pages: where the tokens of long completions go when the ring is too short for them.

A ring with a column for each token of the longest completion takes that memory in every slot, and
most completions are shorter. With pages the ring is short. When it is nearly full, the samples that
fill half of it or more leave whole pages of their oldest tokens to a pool that all slots share
(`moves`, `past.put_all`), and the ring has room for as many steps again. Short completions end
before that and never touch a page.

Column c of a sample's pages is the token before place c of its completion, as in a past row. The
slot's table says which page holds columns 0 .. page - 1, which the next ones, and so on. Attention
reads the pages where they lie (`group_attention.attend_part`, with a table).

A page belongs to one sample, and to the device of its slot. Where a device has too few of them,
its youngest samples lose slot and pages. They wait before all others, and their completions are
prefilled again when there are pages (`past.prefill_all`). The random numbers of a token are those
of its place in the completion, so such a sample goes on as if nothing had happened.

Samples in turns keep in pages what they have when a turn ends, and what a tool answers is prefilled
behind it. While they wait they lose their pages before any sample that decodes loses its own, those
that have waited longest first.

Letters: B slots, N pages of a slot.
"""

import collections
from collections.abc import Hashable, Iterable, Sequence

import numpy as np

from adpo_jax.engine import kv_cache
from adpo_jax.engine import past as past_lib
from adpo_jax.engine.decode_state import DecodeState, Sizes
from adpo_jax.engine.keeper import EndedTurn, Keeper, Prefill, first_to_lose, missing
from adpo_jax.engine.kv_cache import KV, Copies, PageSizes
from adpo_jax.engine.past import Piece
from adpo_jax.engine.requests import Sample
from adpo_jax.engine.schedule import Schedule, Start
from adpo_jax.engine.verbs import Verbs


class PageTables:
    """Which pages belong to which sample, with no arrays of JAX.

    Pages lie in equal parts, one a shard, as slots do. A shard has enough of them for the longest
    completion, so that a sample which is alone there always finds its pages.
    """

    def __init__(self, sizes: PageSizes, num_shards: int):
        self.sizes = sizes
        part = sizes.pages // num_shards
        assert part >= sizes.most
        self._free = [list(range((s + 1) * part - 1, s * part - 1, -1)) for s in range(num_shards)]
        self._part = part
        self._pages: dict[Hashable, list[int]] = collections.defaultdict(list)

    def lacks(self, shard: int, wanted: Iterable[tuple[Hashable, int]]) -> bool:
        """Whether a shard has too few free pages for these samples with so many columns each."""
        further = sum(self._further(sample, columns) for sample, columns in wanted)
        return further > len(self._free[shard])

    def holds(self, sample: Hashable) -> bool:
        """Whether a sample has any page."""
        return bool(self._pages.get(sample))

    def take(self, sample: Hashable, shard: int, columns: int):
        """Gives a sample further pages of a shard, which has them, up to so many columns."""
        further = self._further(sample, columns)
        self._pages[sample] += [self._free[shard].pop() for _ in range(further)]

    def try_take(self, sample: Hashable, shard: int, columns: int, spare: int) -> bool:
        """Gives a sample that takes a slot pages for what it has, if there are enough of them.

        Args:
          spare: pages that have to be free beyond these, for what samples write next; none where no
            other sample has any.

        Returns:
          Whether there were enough.
        """
        further, free = self._further(sample, columns), self._free[shard]
        others_have_some = len(free) + len(self._pages.get(sample, ())) < self._part
        if further and further + (spare if others_have_some else 0) > len(free):
            return False
        self.take(sample, shard, columns)
        return True

    def could_begin(
        self,
        sample: Hashable,
        shard: int,
        columns: int,
        spare: int,
        idle: Iterable[Hashable],
    ) -> bool:
        """Whether `try_take` would give a sample its pages if these others had none."""
        free, own = len(self._free[shard]), len(self._pages.get(sample, ()))
        free += sum(len(self._pages.get(other, ())) for other in idle if other is not sample)
        others_have_some = free + own < self._part
        return self._further(sample, columns) + (spare if others_have_some else 0) <= free

    def release(self, sample: Hashable):
        """Frees the pages of a sample, if it has any."""
        for page in self._pages.pop(sample, ()):
            self._free[page // self._part].append(page)

    def table(self, sample: Hashable) -> np.ndarray:
        """[N] int32, the pages of a sample, 0 past the last one."""
        row = np.zeros(self.sizes.most, np.int32)
        pages = self._pages.get(sample, ())
        row[: len(pages)] = pages
        return row

    def tables(self, live: Sequence[tuple[int, Hashable]], num_slots: int) -> np.ndarray:
        """[B, N] int32, the pages of the sample in each slot."""
        table = np.zeros((num_slots, self.sizes.most), np.int32)
        for slot, sample in live:
            table[slot] = self.table(sample)
        return table

    def moves(
        self, sample: Hashable, slot: int, first: int, start: int, stop: int, ring: int
    ) -> list[Copies]:
        """The copies of columns start .. stop - 1 of a sample from the ring into its pages.

        Args:
          first: column of the ring where they begin.
          ring: columns of the ring.
        """
        page, pages, copies, at = self.sizes.page, self._pages[sample], [], start
        while at < stop:
            count = min(page - at % page, stop - at)
            column = (first + at - start) % ring
            copies.append(Copies(pages[at // page], slot, column, at % page, count, slot))
            at += count
        return copies

    def _further(self, sample: Hashable, columns: int) -> int:
        return max(0, -(-columns // self.sizes.page) - len(self._pages.get(sample, ())))


class Pager(Keeper):
    """What a batch does with its pages.

    Args:
      schedule: which sample runs in which slot.
      ring: columns of the ring at its longest.
    """

    copies_ring = True

    def __init__(self, verbs: Verbs, schedule: Schedule, sizes: PageSizes, ring: int):
        self._verbs, self._schedule, self._ring = verbs, schedule, ring
        self._page, self._tables = sizes.page, PageTables(sizes, schedule.num_shards)
        # What is prefilled again where a sample has to wait.
        self._drawn: dict[Hashable, list[np.ndarray]] = collections.defaultdict(list)
        # The samples without a slot that have pages, the one that paused first first.
        self._idle: dict[Sample, int] = {}
        self.num_evicted = 0

    def remember(self, sample: Sample, tokens: np.ndarray):
        self._drawn[sample].append(np.array(tokens))

    def release(self, sample: Sample):
        """Forgets a sample that has ended; its pages are free."""
        self._tables.release(sample)
        self._drawn.pop(sample, None)
        self._idle.pop(sample, None)

    def try_begin(self, sample: Sample, shard: int) -> bool:
        """Gives a sample pages of a shard for what it has so far, if there are enough of them.

        Samples that wait lose theirs for it. A sample that has pages of another shard loses them.

        Returns:
          Whether there were enough.
        """
        if self._idle.get(sample, shard) != shard:
            self._forget(sample)
        spare, count = self._ring // self._page, sample.num_tokens
        begins = self._tables.try_take(sample, shard, count, spare)
        if not begins and self._tables.could_begin(sample, shard, count, spare, self._of(shard)):
            while not begins and self._give_up_idle(shard, sample):
                begins = self._tables.try_take(sample, shard, count, spare)
        if begins:
            self._idle.pop(sample, None)
        return begins

    def keep(self, state: DecodeState, ended: Sequence[EndedTurn]) -> DecodeState:
        """Copies turns that have ended out of the ring into the pages of their samples.

        A sample for which there are none is prefilled again when it goes on.
        """
        schedule, copies = self._schedule, []
        columns = kv_cache.num_columns(state.ring)  # it may not be at its longest
        for sample, slot, first, count in ended:
            shard, stop = schedule.shard_of_slot(slot), sample.before + count
            self._make_room(shard, [(sample, stop)], sample)
            if self._tables.lacks(shard, [(sample, stop)]):
                self._forget(sample)
                self.num_evicted += 1
                continue
            self._tables.take(sample, shard, stop)
            moves = self._tables.moves(sample, slot, first, sample.before, stop, columns)
            copies += [(shard, copy) for copy in moves]
            sample.in_past, self._idle[sample] = stop, shard
        kv = past_lib.put_all(self._verbs, state.pages.kv, state.ring, copies, schedule.num_shards)
        return state._replace(pages=state.pages._replace(kv=kv))

    def _make_room(
        self, shard: int, wanted: Sequence[tuple[Sample, int]], keeps: Sample | None = None
    ):
        """Takes pages from samples of a shard that wait, while these have too few."""
        while self._tables.lacks(shard, wanted) and self._give_up_idle(shard, keeps):
            pass

    def _give_up_idle(self, shard: int, keeps: Sample | None) -> bool:
        """Takes the pages of one sample of a shard that waits, if there is any."""
        idle = [sample for sample in self._of(shard) if sample is not keeps]
        if idle:
            self._forget(first_to_lose(idle))
        return bool(idle)

    def _of(self, shard: int) -> list[Sample]:
        """The samples of a shard that wait with pages, the one that paused first first."""
        return [sample for sample, at in self._idle.items() if at == shard]

    def _forget(self, sample: Sample):
        """Takes the pages of a sample, which is prefilled again when it goes on."""
        self.num_evicted += sample in self._idle
        sample.in_past = 0
        self._tables.release(sample)
        self._idle.pop(sample, None)

    def leave_ring(self, state: DecodeState, written: int) -> tuple[DecodeState, list[int]]:
        """Moves whole pages of tokens out of the ring, of all samples that fill half of it.

        Where a shard has too few pages for that, its youngest samples give up their slots.

        Args:
          written: steps since the ring began at its first column.

        Returns:
          The state, and the slots that were given up.
        """
        schedule, page, copies = self._schedule, self._page, []
        long = {
            sample: sample.num_tokens // page * page
            for _, sample in schedule.live()
            if 2 * sample.age >= self._ring
        }
        waiting = [s for shard in range(schedule.num_shards) for s in self._preempt(shard, long)]
        before = np.zeros(schedule.num_slots, np.int32)
        for slot, sample in schedule.live():
            if sample in long:
                shard, stop = schedule.shard_of_slot(slot), long[sample]
                self._tables.take(sample, shard, stop)
                first = (written - sample.age) % self._ring
                moves = self._tables.moves(sample, slot, first, sample.before, stop, self._ring)
                copies += [(shard, copy) for copy in moves]
                sample.before = stop
            before[slot] = sample.before
        kv = past_lib.put_all(self._verbs, state.pages.kv, state.ring, copies, schedule.num_shards)
        slots = state.slots._replace(before=past_lib.placed(self._verbs, before))
        state = state._replace(slots=slots, pages=state.pages._replace(kv=kv))
        return self._placed(state), waiting

    def _preempt(self, shard: int, long: dict[Sample, int]) -> list[int]:
        """Lets the youngest samples of a shard wait until the others have the pages they need.

        Args:
          long: the samples that need pages, and the columns that they will have in them.

        Returns:
          The slots of those that wait.
        """
        users = [
            (sample.num_tokens, slot, sample)
            for slot, sample in self._schedule.live()
            if self._schedule.shard_of_slot(slot) == shard
            and (sample in long or self._tables.holds(sample))
        ]
        users.sort(key=lambda user: user[:2], reverse=True)
        self._make_room(shard, [(s, long[s]) for *_, s in users if s in long])
        slots = []
        while self._tables.lacks(shard, ((s, long[s]) for *_, s in users if s in long)):
            _, slot, sample = users.pop()
            sample.completion = np.concatenate(self._drawn[sample])
            self._forget(sample)
            self._schedule.preempt(slot)
            slots.append(slot)
        return slots

    def refilled(
        self, state: DecodeState, starts: Sequence[Start], prefill: Prefill
    ) -> DecodeState:
        chunks = self._chunks(starts)
        if not chunks:
            return state
        # No piece goes across the end of a page.
        longest = min(self._page, past_lib.CHUNK_LENGTHS[-1])
        return self._with_store(state, prefill(self._store(state), chunks, longest))

    def started(self, state: DecodeState, starts: Sequence[Start]) -> DecodeState:
        return self._placed(state) if any(s.sample.num_tokens for s in starts) else state

    def resized(self, state: DecodeState, now: Sizes, sizes: Sizes) -> DecodeState:
        return self._placed(state) if sizes.moves(now) else state

    def _chunks(self, starts: Sequence[Start]) -> list[Piece]:
        """What is prefilled for samples that go on: all that their pages do not hold yet."""
        chunks = []
        for _, sample, slot, row, _ in starts:
            if sample.num_tokens:
                self._drawn[sample] = [sample.completion]
                shard, table = self._schedule.shard_of_slot(slot), self._tables.table(sample)
                chunks += missing(sample, shard, slot, row, table)
        return chunks

    def _store(self, state: DecodeState) -> KV:
        """What a sample's chunks are prefilled into: its pages, and the state in its slot."""
        states = state.ring[-1:] if self._verbs.layout.linear else ()
        return (*state.pages.kv, *states) if states else state.pages.kv

    def _with_store(self, state: DecodeState, store: KV) -> DecodeState:
        """The state with another such store."""
        if self._verbs.layout.linear:
            *store, states = store
            state, store = state._replace(ring=(*state.ring[:-1], states)), tuple(store)
        return state._replace(pages=state.pages._replace(kv=store))

    def _placed(self, state: DecodeState) -> DecodeState:
        """The state with the present tables, split over the devices as the slots are."""
        table = self._tables.tables(self._schedule.live(), self._schedule.num_slots)
        table = past_lib.placed(self._verbs, table)
        return state._replace(pages=state.pages._replace(table=table))
