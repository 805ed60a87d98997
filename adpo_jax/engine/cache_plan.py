"""How many slots and prefix rows the key/value cache has, from the memory it may take.

    tokens = slots x columns + prefix rows x prefix tokens + second copies

A store is there twice while it is copied into another size. The ring is copied where it grows in
stages and where the batch shrinks, the prefix rows where the batch shrinks (in a `ContinuousBatch`
also where either grows). The two stores are never copied at the same time.

With `Paging` the ring is short, and the tokens that have left it lie in pages, which are never
copied:

    tokens = slots x short columns + pages x page + prefix rows x prefix tokens + second copies
"""

import bisect
import contextlib
import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax

from adpo_jax.devices.chips import chip_of
from adpo_jax.engine.kv_cache import CacheLayout, PageSizes
from adpo_jax.engine.sizes import column_buckets, length_bucket, up_to_multiple

MAX_SLOTS = 256
# Columns of a page: a block of keys that TPUs read in 512 kB with 8 heads of 128 in bf16.
PAGE = 256
# Pages that the ring has room for. Samples leave it when they fill half of it.
RING_PAGES = 4


class Copied(NamedTuple):
    """Which of the two stores, ring and prefix rows, are ever copied into another size."""

    ring: bool
    rows: bool

    def tokens(self, ring: int, rows: int) -> int:
        """Tokens of both stores at the peak, when the larger copied store is there twice."""
        return ring + rows + max(self.ring * ring, self.rows * rows)


@dataclasses.dataclass(frozen=True)
class Paging:
    """How memory is shared out where completions leave a short ring for pages (`pages`).

    Attributes:
      expected: tokens of a completion for which each slot adds pages to the pool.
      longest: tokens of the longest completion, for which each shard has pages.
      page: columns of a page, a power of two.
      shards: devices that slots and pages are split over.
    """

    expected: int
    longest: int
    page: int
    shards: int

    @property
    def ring(self) -> int:
        """Columns of the ring at its longest."""
        return RING_PAGES * self.page

    def for_longest(self, longest: int) -> "Paging | None":
        """The same for completions of at most so many tokens; None where the ring holds them."""
        return dataclasses.replace(self, longest=longest) if longest > self.ring else None

    def columns(self, stages: int) -> list[int]:
        """Lengths that the ring grows through."""
        return [self.ring * (i + 1) // stages for i in range(stages)]

    def pages_of(self, tokens: int) -> int:
        """Pages of a completion of so many tokens."""
        return -(-tokens // self.page)

    def pages(self, slots: int) -> int:
        """Pages for completions of expected length in so many slots, and for a longest one."""
        expected = slots // self.shards * self.pages_of(min(self.expected, self.longest))
        return self.shards * max(expected, self.pages_of(self.longest))

    def tokens(self, slots: int) -> int:
        """Tokens that these pages hold."""
        return self.pages(slots) * self.page

    def sizes(self, slots: int) -> PageSizes:
        """The pool for so many slots."""
        return PageSizes(self.page, self.pages(slots), self.pages_of(self.longest))


@dataclasses.dataclass(frozen=True)
class CachePlan:
    """The sizes of the cache, and what they cost on one device.

    Attributes:
      rows: prefix rows for groups of the planned size.
      device_bytes: bytes of the cache on each device at its peak.
      most_tokens: the most tokens that the cache may hold at its peak on all devices together; None
        for no limit.
      copied: the stores that are there twice for a while.
      row_tokens: tokens whose keys and values take the memory that a row, of either store, has
        besides its columns.
      paging: how completions are kept in pages; None where the ring holds the longest one.
    """

    num_slots: int
    rows: int
    device_bytes: int
    most_tokens: int | None
    copied: Copied
    row_tokens: int = 0
    paging: Paging | None = None

    def most_rows(self, slots: int, columns: int, prefix: int, beside: int = 0) -> int | None:
        """Prefix rows of `prefix` tokens that fit beside so many slots; None for no limit.

        Args:
          beside: tokens of further stores.
        """
        if self.most_tokens is None:
            return None
        ring = slots * (columns + self.row_tokens)
        left = self.most_tokens - ring - beside
        most = min(left - ring * self.copied.ring, left // (1 + self.copied.rows))
        return most // (prefix + self.row_tokens)


def prefix_rows(num_slots: int, group_size: int) -> int:
    """Prefix rows that keep the slots busy.

    There are three times as many rows as whole groups fill the slots, since a group that waits for
    its last sample keeps its row while its other slots are refilled. So at most 3% of the slots are
    idle where lengths are lognormal; with twice as many rows it would be 15% for groups of 8 and
    30% for groups of 16 (`tests/test_cache_plan.py`).
    """
    return num_slots if group_size == 1 else 3 * -(-num_slots // group_size)


def memory_budget(
    utilization: float, device: jax.Device, *, resident: int = 0, copied: int = 0
) -> tuple[int | None, str]:
    """Bytes that the cache may take on one device, and the arithmetic behind that number as text.

    On GPUs and TPUs it is utilization x the device's memory less the larger of `resident` and the
    bytes in use now, less `copied`. On a CPU it is utilization x the machine's free memory, shared
    by the devices simulated on it, less `resident` and `copied`. It is None where the memory is not
    known.

    Args:
      resident: bytes of the trainer's state while the engine samples, even if they are not
        allocated yet.
      copied: bytes of the copy of the parameters to sample with; 0 where there is no copy.
    """
    share, text, in_use = _device_share(utilization, device)
    if share is None:
        return None, text
    resident = max(resident, in_use)
    text += f" - {readable(resident)} of state" if resident else ""
    text += f" - {readable(copied)} of parameters to sample with" if copied else ""
    return share - resident - copied, text


def _device_share(utilization: float, device: jax.Device) -> tuple[int | None, str, int]:
    """Bytes that may be in use on a device, the same as text, and the bytes in use now."""
    if device.platform != "cpu" and device.client is not jax.local_devices()[0].client:
        chip = chip_of(device)  # the device belongs to a topology that is not there
        if chip is None:
            raise ValueError(f"the memory of a {device.device_kind} is not known; see chips.py")
        return int(utilization * chip.usable), f"{utilization} x {readable(chip.usable)}", 0
    stats = device.memory_stats()
    if device.platform != "cpu" and stats and "bytes_limit" in stats:
        limit = stats["bytes_limit"]
        text = f"{utilization} x {readable(limit)} of device memory"
        return int(utilization * limit), text, stats.get("bytes_in_use", 0)
    free, local = free_memory(), len(jax.local_devices())
    if free is None:
        return None, "unknown", 0
    text = f"{utilization} x {readable(free)} of free memory / {local} device(s)"
    return int(utilization * free / local), text, 0


def free_memory(root: Path = Path("/")) -> int | None:
    """Bytes of the machine's memory that can be had, those that cache files included.

    On Linux this is what the kernel calls available, or less where a container (cgroup v2) may take
    less. Elsewhere it is the whole memory, or None where the system does not say.
    """
    with contextlib.suppress(OSError, KeyError):
        available = 1024 * _numbers(root / "proc/meminfo")["MemAvailable:"]
        return min([available, *_rooms_of_cgroups(root)])
    if "SC_PHYS_PAGES" in getattr(os, "sysconf_names", ()):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def _rooms_of_cgroups(root: Path) -> Iterator[int]:
    """Bytes that may still be taken in each group of this process that has a limit."""
    top = root / "sys/fs/cgroup"
    lines = (root / "proc/self/cgroup").read_text().splitlines()
    own = next((line.removeprefix("0::/") for line in lines if line.startswith("0::/")), "")
    for group in (top / own, *(top / own).parents):
        with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
            limit = int((group / "memory.max").read_text())
            used = int((group / "memory.current").read_text())
            yield limit - used + _numbers(group / "memory.stat")["inactive_file"]


def _numbers(path: Path) -> dict[str, int]:
    """The first number of each line by the word before it."""
    words = (line.split() for line in path.read_text().splitlines())
    return {name: int(number) for name, number, *_ in words}


def plan(
    layout: CacheLayout,
    *,
    max_prompt_length: int,
    max_response_length: int,
    group_size: int,
    most_slots: int,
    multiple: int,
    splits: int,
    stages: int,
    shrinks: bool,
    budget: int | None,
    budget_text: str = "",
    tile: int = 1,
    paging: Paging | None = None,
) -> CachePlan:
    """The most slots, up to `most_slots`, whose cache fits the budget.

    Args:
      group_size: samples of a prompt.
      multiple: devices that slots and rows are split over; both are multiples of it.
      splits: all devices that the cache is split over, along slots and along heads.
      stages: lengths that the ring of columns grows through.
      shrinks: whether slots and prefix rows are gathered into smaller batches.
      budget: bytes of one device; None for no limit.
      budget_text: how the budget came about, for the error.
      tile: slots of a device that are computed at once; the slots that fit are rounded down to
        whole tiles.
      paging: how completions are kept in pages; None for a ring that holds the longest one.

    Raises:
      ValueError: when not even one group fits, with the arithmetic.
    """
    columns = column_buckets(max_response_length, stages)
    if paging is not None:
        columns = paging.columns(stages)
    prefix = length_bucket(max_prompt_length - 1, max_prompt_length)
    token, state = layout.token_bytes(), layout.row_tokens()
    copied = Copied(ring=shrinks or len(columns) > 1, rows=shrinks)
    most_tokens = None if budget is None else max(budget, 0) * splits // token

    def of(slots: int) -> CachePlan:
        rows = up_to_multiple(prefix_rows(slots, group_size), multiple)
        tokens = copied.tokens(slots * (columns[-1] + state), rows * (prefix + state))
        if paging is not None:
            tokens += paging.tokens(slots)
        size = -(-token * tokens // splits)
        return CachePlan(slots, rows, size, most_tokens, copied, state, paging)

    smallest = up_to_multiple(min(group_size, most_slots), multiple)
    largest = max(smallest, up_to_multiple(most_slots, multiple))
    if budget is None or of(largest).device_bytes <= budget:
        return of(largest)
    one_group = of(smallest)
    if one_group.device_bytes > budget:
        ring, rows = smallest * (columns[-1] + state), one_group.rows * (prefix + state)
        beside = f" (+ {state} for the state of linear attention)" if state else ""
        in_pages = ""
        if paging is not None:
            in_pages = f"+ {paging.pages(smallest)} pages x {paging.page} tokens "
        raise ValueError(
            "the key/value cache of one group does not fit: "
            f"{smallest} slots x {columns[-1]}{beside} tokens + {one_group.rows} prompts x "
            f"{prefix}{beside} tokens {in_pages}"
            f"+ {copied.tokens(ring, rows) - ring - rows} of second copies, at {readable(token)} a "
            f"token over {splits} device(s), is {readable(one_group.device_bytes)} a device; there "
            f"are {readable(max(budget, 0))} ({budget_text}). Raise gpu_memory_utilization, "
            "shorten max_response_length or max_prompt_length, take a smaller cache dtype, or give "
            "expected_response_length where most completions are much shorter"
        )
    sizes = range(smallest, largest, multiple)
    # More slots never take fewer bytes.
    fitting = bisect.bisect_right(sizes, budget, key=lambda slots: of(slots).device_bytes)
    most = sizes[fitting - 1]
    whole = most // (tile * multiple) * (tile * multiple)
    return of(whole if whole >= smallest else most)


def readable(count: int) -> str:
    """Bytes with a binary unit."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} GiB"
