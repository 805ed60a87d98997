"""The few sizes that programs are compiled for, to which lengths, rows and slots are rounded up.

With few sizes a bounded number of programs is compiled, and what is split over devices is split
evenly.
"""

import numbers
from collections.abc import Iterable, Sequence
from typing import Any

MIN_BUCKET = 16
# The most tokens of one prefill call, padding included; they bound its activations.
PREFILL_TOKENS = 8192
COLUMN_STEP = 32
# The most columns that are no multiple of four steps.
FEW_COLUMNS = 512


def is_whole(value: Any) -> bool:
    """Whether a value is a whole number; True and False are none."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def is_power_of_two(value: Any, *, least: int) -> bool:
    """Whether a value is a whole number, a power of two and `least` or more."""
    return is_whole(value) and value >= least and value & (value - 1) == 0


def length_bucket(length: int, limit: int) -> int:
    """The smallest power of two that holds `length`, at least 16 and at most about `limit`.

    The limit is rounded up to `whole_tiles`, and wins where it is below 16.
    """
    limit = whole_tiles(limit)
    return max(min(max(MIN_BUCKET, power_of_two(length)), limit), length, 1)


def whole_tiles(columns: int) -> int:
    """So many columns rounded up to what kernels cut at whole tiles.

    Few are rounded to a multiple of 32, many to one of 128, and below 32 they are one piece.
    """
    if columns <= COLUMN_STEP:
        return columns
    step = COLUMN_STEP if columns <= FEW_COLUMNS else 4 * COLUMN_STEP
    return up_to_multiple(columns, step)


def up_to_multiple(x: int, multiple: int) -> int:
    """The smallest multiple that is at least x."""
    return -(-x // multiple) * multiple


def power_of_two(x: int) -> int:
    """The smallest power of two that is at least x."""
    return 1 << max(x - 1, 0).bit_length()


def prefill_rows(length: int, multiple: int, most: int | None = None) -> int:
    """The most prompts of this length that are prefilled at once.

    It is a power of two, since the rows of a call are padded to one, rounded up to `multiple`.

    Args:
      most: rows that there may be whatever their length; None for no limit.
    """
    rows = max(1, PREFILL_TOKENS // length)
    rows = rows if most is None else max(1, min(rows, most))
    rows = 1 << (rows.bit_length() - 1)
    return up_to_multiple(rows, multiple)


def column_buckets(max_tokens: int, stages: int) -> list[int]:
    """Lengths that the ring of columns grows through; the last one is at least `max_tokens`."""
    step = -(-max_tokens // (stages * COLUMN_STEP)) * COLUMN_STEP
    if max_tokens <= COLUMN_STEP:
        step = length_bucket(max_tokens, COLUMN_STEP)
    step = whole_tiles(step)
    return [step * (i + 1) for i in range(-(-max_tokens // step))]


def slot_buckets(
    num_slots: int, fractions: tuple[float, ...], multiple: int, smallest: int
) -> list[int]:
    """Batch sizes that the slots shrink through, rising; the last one is `num_slots`."""
    sizes = {up_to_multiple(round(num_slots * f), multiple) for f in fractions}
    return sorted({s for s in sizes if smallest <= s < num_slots} | {num_slots})


def doubling_sizes(most: int, multiple: int, smallest: int) -> list[int]:
    """`smallest`, twice that and so on, each rounded up to `multiple`; the last one is `most`."""
    doubled = (smallest << i for i in range(most.bit_length()))
    sizes = {up_to_multiple(size, multiple) for size in doubled}
    return sorted({size for size in sizes if size < most} | {most})


def smallest_holding(sizes: Sequence[int], needed: int) -> int:
    """The smallest of rising sizes that holds so many."""
    return next(size for size in sizes if size >= needed)


def largest_below(sizes: Iterable[int], limit: int) -> int:
    """The largest of some sizes that is smaller than the limit; 0 for none."""
    return max((size for size in sizes if size < limit), default=0)


def rows_of_a_group(num_groups: int, n: int, num_shards: int) -> int:
    """Prefix rows of one group: several where there are fewer groups than shards."""
    return min(n, -(-num_shards // max(num_groups, 1)))
