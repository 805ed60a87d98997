"""Slots from bytes."""

import dataclasses
import heapq
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from adpo_jax import Engine, Policy, SamplingParams
from adpo_jax.devices import sharding
from adpo_jax.engine import cache_plan
from adpo_jax.engine.kv_cache import CacheLayout
from adpo_jax.engine.verbs import Verbs

LAYOUT = CacheLayout(28, 8, 128, jnp.bfloat16, stacked=True, transposed_keys=False)
SIZES = {"max_prompt_length": 512, "max_response_length": 1024, "group_size": 8}
PLAIN = {"multiple": 1, "splits": 1, "stages": 1, "shrinks": False}


def small_policy():
    return Policy(tiny.model_config())


def test_a_token_costs_its_keys_and_values_in_every_layer():
    assert LAYOUT.token_bytes() == 2 * 28 * 8 * 128 * 2
    int8 = CacheLayout(28, 8, 128, jnp.int8, stacked=True, transposed_keys=False)
    assert int8.token_bytes() == 2 * 28 * 8 * (128 + 4)


def test_the_plan_counts_what_is_allocated():
    plan = cache_plan.plan(LAYOUT, **SIZES, **PLAIN, most_slots=16, budget=None)
    assert (plan.num_slots, plan.rows) == (16, 6)
    kv = jax.eval_shape(lambda: (LAYOUT.zeros(16, 1024), LAYOUT.zeros(6, 512)))
    assert plan.device_bytes == sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(kv))


@pytest.mark.parametrize(("prompt", "response"), [(64, 1024), (1024, 64)])
def test_a_store_that_is_gathered_anew_is_counted_twice(prompt, response):
    sizes = {"max_prompt_length": prompt, "max_response_length": response, "group_size": 8}

    def tokens(**changes):
        plan = cache_plan.plan(LAYOUT, **sizes, **PLAIN | changes, most_slots=16, budget=None)
        return plan.device_bytes // LAYOUT.token_bytes()

    ring, rows = 16 * response, 6 * prompt
    assert tokens() == ring + rows
    assert tokens(shrinks=True) == ring + rows + max(ring, rows)
    if response > 64:
        assert tokens(stages=4) == 2 * ring + rows


def test_a_budget_is_filled_and_not_passed():
    budget = 10 * 2**30
    plan = cache_plan.plan(LAYOUT, **SIZES, **PLAIN, most_slots=256, budget=budget)
    assert plan.device_bytes <= budget
    more = cache_plan.plan(LAYOUT, **SIZES, **PLAIN, most_slots=plan.num_slots + 1, budget=None)
    assert more.device_bytes > budget
    eight = PLAIN | {"multiple": 4, "splits": 8}
    split = cache_plan.plan(LAYOUT, **SIZES, **eight, most_slots=1024, budget=budget)
    assert split.num_slots > 6 * plan.num_slots
    assert split.num_slots % 4 == 0


@pytest.mark.parametrize("group_size", [1, 8])
def test_the_most_slots_that_fit_are_found_by_few_tries(group_size, monkeypatch):
    sizes, tries = SIZES | {"group_size": group_size}, []
    device_bytes = {
        slots: cache_plan.plan(LAYOUT, **sizes, **PLAIN, most_slots=slots, budget=None).device_bytes
        for slots in range(group_size, 200)
    }
    assert sorted(device_bytes.values()) == list(device_bytes.values())
    budget = 5 * 2**30
    fitting = max(slots for slots, size in device_bytes.items() if size <= budget)
    rows = cache_plan.prefix_rows
    monkeypatch.setattr(
        cache_plan, "prefix_rows", lambda *given: tries.append(given) or rows(*given)
    )
    plan = cache_plan.plan(LAYOUT, **sizes, **PLAIN, most_slots=10**9, budget=budget)
    assert plan.num_slots == fitting
    assert len(tries) < 50


@pytest.mark.parametrize(("shards", "wanted"), [(1, 48), (2, 48), (4, 32)])
def test_slots_fill_whole_tiles_of_every_device(shards, wanted):
    plain = PLAIN | {"multiple": shards}
    most = cache_plan.plan(LAYOUT, **SIZES, **plain, most_slots=52, budget=None)
    budget = most.device_bytes
    plan = cache_plan.plan(LAYOUT, **SIZES, **plain, most_slots=256, budget=budget, tile=8)
    assert plan.num_slots == wanted
    few = cache_plan.plan(LAYOUT, **SIZES, **plain, most_slots=8, budget=None).device_bytes
    plan = cache_plan.plan(LAYOUT, **SIZES, **plain, most_slots=256, budget=few, tile=32)
    assert plan.num_slots == 8


def test_one_group_too_many_is_refused_with_the_arithmetic():
    with pytest.raises(ValueError, match="8 slots x 1024 tokens") as refused:
        cache_plan.plan(
            LAYOUT, **SIZES, **PLAIN, most_slots=64, budget=2**29, budget_text="0.5 x 1 GiB"
        )
    for part in (
        "3 prompts x 512 tokens",
        "0 of second copies",
        "112 KiB a token",
        "512 MiB (0.5 x 1 GiB)",
    ):
        assert part in str(refused.value)


def test_the_engine_takes_what_fits_its_memory(monkeypatch):
    policy = small_policy()
    sizes = {"max_prompt_length": 16, "max_response_length": 32, "gpu_memory_utilization": 0.5}
    token = 2 * 2 * 2 * 16 * 4
    one_slot = token * (32 + 16 + 32)
    monkeypatch.setattr(cache_plan, "memory_budget", lambda *_, **__: (11 * one_slot, ""))
    assert Engine(policy, **sizes).num_slots == 11
    too_little = (one_slot // 2, "half a slot")
    monkeypatch.setattr(cache_plan, "memory_budget", lambda *_, **__: too_little)
    with pytest.raises(ValueError, match="half a slot"):
        Engine(policy, **sizes)


@pytest.mark.parametrize("n", [1, 64])
def test_groups_of_another_size_than_planned_for_use_all_slots_that_memory_allows(monkeypatch, n):
    sizes = {"max_prompt_length": 16, "max_response_length": 32, "num_slots": 64, "group_size": 8}

    def engine_with(tokens):
        budget = tokens * 2 * 2 * 2 * 16 * 4, ""
        monkeypatch.setattr(cache_plan, "memory_budget", lambda *_, **__: budget)
        return Engine(small_policy(), **sizes, gpu_memory_utilization=0.5)

    planned = 64 * 32 + 24 * 16 + 64 * 32
    roomy, exact = engine_with(planned + 10_000), engine_with(planned)
    assert roomy.sizes_for(256, n, 32, 16) == (64, cache_plan.prefix_rows(64, n))
    slots, rows = exact.sizes_for(256, n, 32, 16)
    assert (slots, rows) == ((48, 48) if n == 1 else (64, 3))
    assert exact.plan.copied.tokens(slots * 32, rows * 16) <= planned
    assert exact.sizes_for(256, 8, 32, 16) == (64, 24)
    shape = exact.trace(SamplingParams(n=n)).get("decode").in_avals
    assert any(x.shape[:1] == (rows,) for x in jax.tree.leaves(shape) if x.ndim == 4)


def test_greedy_answers_on_an_engine_planned_for_groups_fill_its_slots():
    policy = small_policy()
    engine = Engine(
        policy,
        max_prompt_length=8,
        max_response_length=8,
        num_slots=16,
        group_size=8,
        gpu_memory_utilization=0.5,
    )
    params, greedy = policy.init(jax.random.key(0)), SamplingParams(temperature=0, max_tokens=8)
    prompts = [[1 + i, 2] for i in range(16)]
    assert engine.generate(params, prompts, greedy, jax.random.key(0)).stats["steps"] == 8


def test_free_memory_counts_what_caches_files_and_stays_within_the_limits_of_groups(tmp_path):
    group = tmp_path / "sys/fs/cgroup/a/b"
    for folder in (tmp_path / "proc/self", group):
        folder.mkdir(parents=True)
    meminfo = "MemTotal: 900 kB\nMemFree: 20 kB\nMemAvailable: 500 kB\nHugePages_Total: 0\n"
    (tmp_path / "proc/meminfo").write_text(meminfo)
    (tmp_path / "proc/self/cgroup").write_text("4:memory:/x\n0::/a/b\n")
    assert cache_plan.free_memory(tmp_path) == 500 * 1024
    files = {"memory.max": "max", "memory.current": "90000", "memory.stat": "inactive_file 10000"}
    for name, content in files.items():
        (group / name).write_text(content + "\n")
    assert cache_plan.free_memory(tmp_path) == 500 * 1024
    (group / "memory.max").write_text("100000\n")
    assert cache_plan.free_memory(tmp_path) == 20_000
    # No Linux: all there is, or no limit.
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert cache_plan.free_memory(tmp_path / "none") == whole


def test_memory_that_is_not_known_is_no_limit(monkeypatch):
    monkeypatch.setattr(cache_plan, "free_memory", lambda: None)
    engine = Engine(
        small_policy(), max_prompt_length=8, max_response_length=8, gpu_memory_utilization=0.5
    )
    assert engine.num_slots == 64
    assert engine.plan.most_tokens is None


class Accelerator:
    """A device with a gigabyte, a tenth of it in use."""

    platform = "gpu"
    client = jax.local_devices()[0].client

    def memory_stats(self):
        return {"bytes_limit": 10**9, "bytes_in_use": 10**8}


@pytest.mark.parametrize(
    ("taken", "left"),
    [
        ({}, 700),
        ({"resident": 300 * 10**6}, 500),
        ({"resident": 50 * 10**6}, 700),  # it lies there already
        ({"resident": 300 * 10**6, "copied": 200 * 10**6}, 300),
    ],
)
def test_the_budget_leaves_room_for_what_is_still_to_come(taken, left):
    budget, text = cache_plan.memory_budget(0.8, Accelerator(), **taken)
    assert budget == left * 10**6
    assert ("of parameters to sample with" in text) == ("copied" in taken)


def test_what_a_rollout_copies_of_the_parameters():
    wide = Policy(tiny.model_config(), param_dtype=jnp.float32, dtype=jnp.bfloat16)
    narrow = dataclasses.replace(wide, param_dtype=jnp.bfloat16)
    stacked = dataclasses.replace(LAYOUT, num_layers=wide.config.num_layers)
    count = sum(x.size for x in jax.tree.leaves(wide.abstract_params()))
    norms = sum(
        x.size
        for path, x in jax.tree_util.tree_leaves_with_path(wide.abstract_params())
        if path[-1].key.endswith("norm")
    )
    assert Verbs(wide, stacked).copied_bytes(wide) == 2 * (count - norms)
    assert Verbs(narrow, stacked).copied_bytes(narrow) == 0
    unstacked = dataclasses.replace(stacked, stacked=False)
    assert Verbs(narrow, unstacked).copied_bytes(narrow) == 2 * count

    mesh = sharding.make_mesh(1, 4, 2)
    trained = dataclasses.replace(narrow, mesh=mesh)
    sampled = dataclasses.replace(narrow, mesh=sharding.rollout_mesh(mesh))
    whole = sharding.device_bytes(sampled.abstract_params())
    assert Verbs(sampled, stacked).copied_bytes(trained) == whole
    assert count < whole < 2 * count  # split over `tensor` but for the norms


def test_a_kept_cache_is_used_again_and_can_be_freed():
    policy = small_policy()
    params = policy.init(jax.random.key(0))
    engine = Engine(
        policy,
        max_prompt_length=8,
        max_response_length=64,
        num_slots=4,
        free_cache_engine=False,
    )
    sampling = SamplingParams(n=2, max_tokens=8)
    first = engine.generate(params, [[1, 2], [3]], sampling, jax.random.key(0))
    # Long enough for the ring to grow from where the first call left it.
    longer = dataclasses.replace(sampling, max_tokens=64)
    engine.generate(params, [[1, 2], [3]], longer, jax.random.key(0))
    engine.generate(params, [[1, 2], [3]], sampling, jax.random.key(0))
    kept = engine._kept.ring[0].k.unsafe_buffer_pointer()
    second = engine.generate(params, [[1, 2], [3]], sampling, jax.random.key(0))
    np.testing.assert_array_equal(second.padded("tokens"), first.padded("tokens"))
    assert engine._kept.ring[0].k.unsafe_buffer_pointer() == kept
    third = engine.generate(params, [[1, 2], [3]], longer, jax.random.key(0))
    np.testing.assert_array_equal(third.padded("tokens")[..., :8], first.padded("tokens"))
    engine.free_cache()
    fresh = engine.generate(params, [[1, 2], [3]], longer, jax.random.key(0))
    np.testing.assert_array_equal(third.padded("tokens"), fresh.padded("tokens"))
    # The ring has grown; what is kept is what the next call begins with.
    kept = engine._kept.ring[0].k.unsafe_buffer_pointer()
    engine.generate(params, [[1, 2], [3]], longer, jax.random.key(1))
    assert engine._kept.ring[0].k.unsafe_buffer_pointer() == kept
    engine.free_cache()
    assert engine._kept is None
    by_default = Engine(policy, max_prompt_length=8, max_response_length=64, num_slots=4)
    by_default.generate(params, [[1, 2], [3]], sampling, jax.random.key(0))
    assert by_default._kept is None


def test_a_batch_that_shrinks_keeps_nothing_that_no_call_could_use():
    policy = small_policy()
    params, sizes = policy.init(jax.random.key(0)), {"max_prompt_length": 8, "num_slots": 16}
    engine = Engine(policy, max_response_length=64, free_cache_engine=False, **sizes)
    sampling = SamplingParams(n=4, max_tokens=64, stop_token_ids=tuple(range(12)))
    prompts = [[1 + i] for i in range(4)]
    first = engine.generate(params, prompts, sampling, jax.random.key(0))
    assert first.stats["resizes"] > 0
    assert engine._kept is None


def test_a_kept_cache_holds_no_samples_that_a_stop_string_ended():
    policy = small_policy()
    params = policy.init(jax.random.key(0))
    engine = Engine(
        policy,
        max_prompt_length=8,
        max_response_length=16,
        num_slots=8,
        steps_per_dispatch=4,
        free_cache_engine=False,
        detokenize=lambda ids: "a" * len(ids),
    )
    by_string = SamplingParams(n=2, max_tokens=16, stop=("aaa",))
    out = engine.generate(params, [[1], [2], [3], [4]], by_string, jax.random.key(0))
    assert (out.lengths == 3).all()
    assert engine._kept.slots.active.all()  # nobody told the device
    engine.generate(params, [[1], [2], [3]], SamplingParams(n=2, max_tokens=8), jax.random.key(0))
    assert not engine._kept.slots.active.any()


def test_pages_for_the_mean_hold_three_times_the_samples_of_a_ring_for_the_longest():
    """Qwen3-8B on a v5p host, as scripts/bench_pages.py plans it."""
    layout = CacheLayout(36, 8, 128, jnp.bfloat16, stacked=True, transposed_keys=False)
    paging = cache_plan.Paging(expected=8_000, longest=30_000, page=256, shards=1)

    def slots(paging):
        plan = cache_plan.plan(
            layout,
            max_prompt_length=1024,
            max_response_length=30_000,
            group_size=8,
            **PLAIN | {"splits": 4},
            most_slots=256,
            budget=75 * 2**30,
            tile=8,
            paging=paging,
        )
        assert plan.device_bytes <= 75 * 2**30
        return plan.num_slots

    assert slots(None) <= 72
    assert slots(paging) >= 3 * slots(None) >= 180


def test_a_pool_holds_the_expected_of_all_slots_and_a_longest_one_on_each_device():
    paging = cache_plan.Paging(expected=20, longest=100, page=8, shards=2)
    assert paging.pages(64) == 64 * 3
    assert paging.pages(8) == 2 * 13
    assert dataclasses.replace(paging, expected=1000).pages(8) == 8 * 13
    assert paging.columns(4) == [8, 16, 24, 32]


@pytest.mark.parametrize(("slots", "n"), [(64, 8), (256, 8), (256, 16), (64, 16)])
def test_groups_that_wait_for_their_last_sample_leave_no_slots_idle(slots, n):
    """Groups of lognormal lengths, cut off, each in a row until its last sample ends."""
    rng, groups = np.random.default_rng(0), 100 * slots // n // 4
    lengths = np.minimum(rng.lognormal(6.0, 0.8, groups * n), 2048)
    rows, left = cache_plan.prefix_rows(slots, n), {}
    live, following, now, idle = [], 0, 0.0, 0.0
    while True:
        while following < lengths.size and len(live) < slots:
            group = following // n
            if group not in left and len(left) == rows:
                break
            left.setdefault(group, n)
            heapq.heappush(live, (now + lengths[following], group))
            following += 1
        if following == lengths.size:
            break
        end, group = heapq.heappop(live)
        idle, now = idle + (end - now) * (slots - 1 - len(live)), end
        left[group] -= 1
        if not left[group]:
            del left[group]
    assert idle < 0.03 * slots * now
