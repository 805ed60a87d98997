"""Pages: where the tokens of long completions go when the ring is too short for them.

A ring with a column for each token of the longest completion takes that memory in every slot, and
most completions are shorter. With pages the ring is short. When it is nearly full, the samples that
fill half of it or more leave whole pages of their oldest tokens to a pool that all slots share
(`moves`, `past.put_all`), and the ring has room for as many steps again. Short completions end
before that and never touch a page.

Column c of a sample's pages is the token before place c of its completion, as in a past row. The
slot's table says which page holds columns 0 .. page - 1, which the next ones, and so on. Attention
reads the pages where they lie (`kv_cache.attend_part`, with a table).

A page belongs to one sample, and to the device of its slot. Where a device has too few of them,
its youngest samples lose slot and pages. They wait before all others, and their completions are
prefilled again when there are pages (`past.prefill_all`). The random numbers of a token are those
of its place in the completion, so such a sample goes on as if nothing had happened.

This is the host's side; it has no arrays of JAX. Letters: B slots, N pages of a slot.
"""

import collections
from collections.abc import Hashable, Iterable, Sequence

import numpy as np

from adpo_jax.engine.past import Copies
from adpo_jax.engine.verbs import PageSizes


class PageTables:
    """Which pages belong to which sample.

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

    def begin(self, sample: Hashable, shard: int, columns: int, spare: int) -> bool:
        """Gives a sample that takes a slot pages for what it has, if there are enough of them.

        Args:
          spare: pages that have to be free beyond these, for what samples write next; none where no
            other sample has any.
        """
        further, free = self._further(sample, columns), self._free[shard]
        if further and further + (spare if len(free) < self._part else 0) > len(free):
            return False
        self.take(sample, shard, columns)
        return True

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
            copies.append(Copies(pages[at // page], slot, column, at % page, count))
            at += count
        return copies

    def _further(self, sample: Hashable, columns: int) -> int:
        return max(0, -(-columns // self.sizes.page) - len(self._pages.get(sample, ())))
