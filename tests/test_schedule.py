"""Which sample is in which slot, beside which prompt."""

import numpy as np
import pytest

from adpo_jax.engine.schedule import Schedule
from adpo_jax.engine.sizes import (
    PREFILL_TOKENS,
    column_buckets,
    doubling_sizes,
    length_bucket,
    power_of_two,
    prefill_rows,
    rows_of_a_group,
    whole_tiles,
)


def schedule_of(num_groups, n, num_slots, num_rows, num_shards=1):
    """A schedule with groups of n samples in its queue, each (group, sample)."""
    width = -(-n // rows_of_a_group(num_groups, n, num_shards))
    schedule = Schedule(num_slots, num_rows, width, num_shards)
    for group in range(num_groups):
        schedule.add(group, [(group, sample) for sample in range(n)])
    return schedule


def shrunk(schedule, num_slots, n):
    """Lays a schedule out as a call does whose batch shrinks."""
    rows = min(schedule.num_rows, num_slots)
    return schedule.lay_out(num_slots, rows, schedule.narrow_width(num_slots, rows, n))


def test_the_rows_of_a_prefill_are_as_many_as_it_is_padded_to():
    for length in (16, 512, 1200, 5000, 20_000):
        rows = prefill_rows(length, 1)
        assert rows == power_of_two(rows)
        assert rows * length <= PREFILL_TOKENS or rows == 1
        assert 2 * rows * length > PREFILL_TOKENS
    assert prefill_rows(5000, 6) == 6


def test_columns_come_in_whole_tiles():
    found = [whole_tiles(n) for n in (16, 32, 33, 160, 500, 513, 4000)]
    assert found == [16, 32, 64, 160, 512, 640, 4096]
    assert length_bucket(499, 500) == 512
    assert length_bucket(159, 160) == 160
    assert column_buckets(4000, 1) == [4096]
    assert column_buckets(300, 4) == [96, 192, 288, 384]


def test_sizes_double_up_to_the_largest():
    assert doubling_sizes(256, 1, 8) == [8, 16, 32, 64, 128, 256]
    assert doubling_sizes(100, 12, 8) == [12, 24, 36, 72, 100]
    assert doubling_sizes(3, 1, 8) == [3]


def assert_consistent(schedule: Schedule, prompt_in_row: np.ndarray):
    """Every live sample is in the table of members, on a row of its shard with its prompt."""
    B, P, shards = schedule.num_slots, len(schedule.members), schedule.num_shards
    for slot, _ in schedule.live():
        row, rank = schedule.row_of[slot], schedule.rank_of[slot]
        assert schedule.members[row, rank] == slot
        group, sample = schedule.in_slot[slot]
        assert prompt_in_row[row] == group == sample[0]
        assert slot * shards // B == row * shards // P


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("shards", "groups"), [(1, 9), (2, 9), (4, 9), (4, 3), (4, 1)])
def test_every_sample_stays_beside_its_prompt_as_the_batch_shrinks(seed, shards, groups):
    rng = np.random.default_rng(seed)
    schedule = schedule_of(groups, n=4, num_slots=16, num_rows=8, num_shards=shards)
    prompt_in_row = np.full(8, -1)
    started, ended = set(), 0
    while ended < 4 * groups:
        starts, admitted = schedule.start()
        for row, group in admitted.items():
            prompt_in_row[row] = group
        assert not started & {start.sample for start in starts}
        started |= {start.sample for start in starts}
        assert len(started) - ended == schedule.num_live == len(schedule.live())
        assert 4 * groups - len(started) == schedule.num_waiting
        assert_consistent(schedule, prompt_in_row)
        for slot in rng.permutation([slot for slot, _ in schedule.live()])[: rng.integers(1, 4)]:
            ended += 1
            schedule.finish(slot)
        smaller = max(2, shards, schedule.num_slots // 2)
        fits = schedule.needed_slots <= smaller < schedule.num_slots
        if fits and not schedule.num_waiting:
            _, old_rows = shrunk(schedule, smaller, 4)
            prompt_in_row = prompt_in_row[old_rows]
            assert_consistent(schedule, prompt_in_row)
    assert len(schedule.live()) == 0
    assert len(started) == 4 * groups


def test_a_prompt_that_no_row_holds_waits_and_those_behind_it_too():
    schedule = Schedule(4, 4)
    for group in ("short", "long", "short too"):
        schedule.add(group, [group])
    starts, _ = schedule.start(lambda group: group != "long")
    assert [start.group for start in starts] == ["short"]
    starts, _ = schedule.start()
    assert [start.group for start in starts] == ["long", "short too"]


def test_one_group_keeps_every_shard_busy():
    schedule = schedule_of(num_groups=1, n=8, num_slots=8, num_rows=4, num_shards=4)
    starts, admitted = schedule.start()
    assert len(starts) == 8
    assert set(admitted.values()) == {0}
    assert sorted(admitted) == [0, 1, 2, 3]
    assert schedule.members.shape == (4, 2)


def test_each_batch_size_has_at_most_two_tables_of_members():
    shapes = {}
    for seed in range(50):
        rng = np.random.default_rng(seed)
        schedule = schedule_of(num_groups=16, n=8, num_slots=128, num_rows=16)
        schedule.start()
        for slots in (96, 64, 48, 32, 24, 16, 8):
            for slot in rng.permutation([slot for slot, _ in schedule.live()])[slots:]:
                schedule.finish(slot)
            shrunk(schedule, slots, 8)
            shapes.setdefault(slots, set()).add(schedule.members.shape)
    assert all(len(seen) <= 2 for seen in shapes.values())
    assert shapes[96] == shapes[64] == {(16, 8)}
    assert shapes[16] == {(16, 1)}
    assert shapes[8] == {(8, 1)}


def test_the_table_of_members_narrows_as_samples_end():
    schedule = schedule_of(num_groups=2, n=8, num_slots=16, num_rows=2)
    schedule.start()
    assert schedule.members.shape == (2, 8)
    for slot in (0, 1, 2, 3, 4, 8, 9, 10, 11, 12, 13, 14):
        schedule.finish(slot)
    old_slots, old_rows = shrunk(schedule, 4, 8)
    assert old_slots.tolist() == [5, 6, 7, 15]
    assert old_rows.tolist() == [0, 1]
    assert schedule.members.tolist() == [[0, 1, 2, 0], [3, 0, 0, 0]]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("shards", [1, 2])
def test_every_sample_stays_beside_its_prompt_through_sizes_of_all_kinds(seed, shards):
    """Groups of any size come, are dropped and end while slots, rows and their width change."""
    rng = np.random.default_rng(seed)
    schedule, prompt_in_row = Schedule(num_shards=shards), np.zeros(0, int)
    added, started, ended, dropped = 0, set(), 0, set()
    for turn in range(60):
        if turn < 40:
            n = int(rng.integers(1, 9))
            schedule.add(turn, [(turn, sample) for sample in range(n)], -(-n // shards))
            added += n
        slots = max(int(rng.integers(4, 9)) * shards, schedule.needed_slots)
        width = int(rng.choice([1, 4]))
        rows = -(-max(schedule.rows_needed(width), slots // width) // shards) * shards
        if turn % 3 == 0:  # enough for the live ones; those that wait may lose their rows
            rows = slots
        _, old_rows = schedule.lay_out(slots, rows, width)
        prompt_in_row = prompt_in_row[old_rows] if len(prompt_in_row) else np.full(rows, -1)
        assert_consistent(schedule, prompt_in_row)
        starts, admitted = schedule.start()
        for row, group in admitted.items():
            prompt_in_row[row] = group
        assert not started & {start.sample for start in starts}
        started |= {start.sample for start in starts}
        assert schedule.num_waiting == added - len(started) - len(dropped)
        assert_consistent(schedule, prompt_in_row)
        for slot in rng.permutation([slot for slot, _ in schedule.live()])[: rng.integers(1, 5)]:
            ended += 1
            schedule.finish(slot)
        if turn == 20:
            waited = schedule.num_waiting
            dropped = set(schedule.drop(lambda s: s[0] % 2 == 0))
            assert schedule.num_waiting == waited - len(dropped)
            assert dropped
    while schedule.num_live or schedule.num_waiting:
        starts, _ = schedule.start()
        started |= {start.sample for start in starts}
        for slot, _ in schedule.live():
            ended += 1
            schedule.finish(slot)
    assert ended == len(started) == added - len(dropped)
    assert not started & dropped
    assert schedule.rows_in_use == 0


def test_a_sample_that_gives_up_its_slot_goes_on_before_others_when_there_is_memory():
    schedule = schedule_of(num_groups=3, n=2, num_slots=4, num_rows=4, num_shards=2)
    starts, _ = schedule.start()
    of_first = [start.slot for start in starts if start.group == 0]
    (shard,) = {schedule.shard_of_slot(slot) for slot in of_first}
    row, rank = schedule.row_of[of_first[0]], schedule.rank_of[of_first[0]]
    for slot in of_first:
        schedule.preempt(slot)
    assert (schedule.num_live, schedule.num_waiting) == (2, 4)
    # The third group waits behind the samples of the first, whose shard has no memory for them.
    starts, admitted = schedule.start(try_begin=lambda sample, at: at != shard)
    assert (starts, admitted) == ([], {})
    # The one that gave up its slot last goes on first, in the place that it had beside its prompt.
    starts, admitted = schedule.start(try_begin=lambda sample, at: sample != (0, 0))
    assert ([start.sample for start in starts], admitted) == ([(0, 1)], {})
    starts, admitted = schedule.start()
    assert ([start.sample for start in starts], admitted) == ([(0, 0)], {})
    assert (starts[0].row, starts[0].rank) == (row, rank)


def test_samples_that_paused_keep_their_rows_while_others_wait_for_memory():
    schedule = schedule_of(num_groups=4, n=1, num_slots=4, num_rows=8)
    *first, last = schedule.start()[0]
    for start in first:
        schedule.pause(start.slot)
    schedule.preempt(last.slot)
    schedule.add("next", ["next"])
    for _ in range(2):
        assert schedule.start(try_begin=lambda sample, shard: False) == ([], {})
    for start in first:
        schedule.resume(start.sample, start.group)
    starts, admitted = schedule.start()
    assert [(start.sample, start.row) for start in starts] == [
        (start.sample, start.row) for start in (last, *first)
    ]
    assert not admitted


def test_the_sample_that_paused_first_gives_its_row_to_one_that_can_start_in_its_shard():
    schedule = schedule_of(num_groups=2, n=1, num_slots=2, num_rows=4, num_shards=2)
    (_, start), _ = schedule.start()  # the first one stays in its slot, beside a free row
    rows = []
    for number in range(3):
        rows.append(start.row)
        schedule.pause(start.slot)
        schedule.add(number, [number])
        ((start,), _) = schedule.start()
        assert start.sample == number
    assert [*rows, start.row] == [2, 3, 2, 3]
