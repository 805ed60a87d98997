"""Packed streams with shared prompts give what padded rows give."""

import dataclasses
import functools
import json
import runpy
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from test_update import assert_same, step

from adpo_jax import losses, update
from adpo_jax.devices import sharding
from adpo_jax.model.attention import LayerInfo
from adpo_jax.model.tile_attention import Stream, stream_attention
from adpo_jax.policy import Policy
from adpo_jax.records import Batch, Completion, Sequences
from adpo_jax.update import streams
from adpo_jax.update.packing import Packing, balanced, pack
from adpo_jax.update.stream_sizes import TILE, KnownSizes, Size, tile_of


def anchored(batch: Batch) -> np.ndarray:
    """Anchor log-probs that are not the policy's, [P, G, T]."""
    rng = np.random.default_rng(1)
    return rng.normal(-3.0, 0.3, batch.completion_mask_PGT.shape).astype(np.float32)


def ragged_of(batch: Batch, anchor: bool) -> Sequences:
    """The same sequences, with the log-probs of `anchored` where they are wanted."""
    sequences = batch.sequences()
    if not anchor:
        return sequences
    values = [
        [row[: len(c)] for row, c in zip(rows, group)]
        for rows, group in zip(anchored(batch), sequences.completions)
    ]
    return dataclasses.replace(sequences, log_probs={"anchor": values})


@functools.cache
def in_rows(anchor: bool):
    policy, params = tiny.policy_and_params()
    batch, rewards = tiny.batch()
    others = {"anchor": anchored(batch)} if anchor else None
    return step(policy, params, batch, rewards, algorithm=ALGORITHM, log_probs=others)


ALGORITHM = losses.Adpo(drop_all_failed_prompts=True, beta_anchor_kl=0.1)


@pytest.mark.parametrize(
    ("cut", "anchor"),
    [
        ({}, False),
        ({"completions_per_micro": 1}, True),  # groups of 4 split, a forward first
        ({"completions_per_micro": 3}, False),
        ({"completions_per_micro": 5, "whole_groups": True}, True),
        ({"share_prompts": False, "completions_per_micro": 6}, False),
    ],
    ids=str,
)
def test_every_cut_gives_the_gradient_and_metrics_of_padded_rows(cut, anchor):
    policy, params = tiny.policy_and_params()
    batch, rewards = tiny.batch()
    packed = pack(ragged_of(batch, anchor), tile=4, **cut)
    found = step(policy, params, packed, rewards, algorithm=ALGORITHM)
    assert_same(in_rows(anchor), found)


def test_a_loss_that_needs_log_probs_beforehand_is_the_same_in_every_layout():
    """Its weights depend on log-probs of whole groups, which a cut group finds by a forward."""
    algorithm = losses.Tpo(sampler_correction="truncate", entropy_bonus=0.2)
    policy, params = tiny.policy_and_params()
    batch, rewards = tiny.batch()
    rows = step(policy, params, batch, rewards, algorithm=algorithm)
    for cut in ({"completions_per_micro": 4, "whole_groups": True}, {"completions_per_micro": 3}):
        packed = pack(batch.sequences(), tile=4, **cut)
        assert_same(rows, step(policy, params, packed, rewards, algorithm=algorithm))
    assert 0 < rows[1]["tpo/sampler_clip_frac"] < 1
    assert rows[1]["tpo/entropy_bonus"] == pytest.approx(rows[1]["rollout/entropy"], rel=1e-5)


# What a tool said lies between what the policy wrote: it is there, and nobody trains on it.
HOLES = np.array([1, 1, 0, 0, 0, 1, 1, 1], bool)


def with_holes() -> tuple[Batch, np.ndarray]:
    """Completions of up to 8 tokens; of every second one some tokens are not trained on."""
    batch, rewards = tiny.batch(completion=8)
    mask = batch.completion_mask_PGT.copy()
    mask[0] = batch.attention_mask_PGS[0, :, 5:] = 1  # whole ones, so that all holes are there
    mask[::2, ::2] *= HOLES
    return batch._replace(completion_mask_PGT=mask), rewards


@pytest.mark.parametrize(
    ("cut", "anchor"),
    [({}, False), ({"completions_per_micro": 3}, True), ({"completions_per_micro": 4}, False)],
    ids=str,
)
def test_holes_in_what_is_trained_on_are_honoured_by_both_layouts(cut, anchor):
    policy, params = tiny.policy_and_params()
    batch, rewards = with_holes()
    others = {"anchor": anchored(batch)} if anchor else None
    rows = step(policy, params, batch, rewards, algorithm=ALGORITHM, log_probs=others)
    packed = pack(ragged_of(batch, anchor), tile=4, **cut)
    assert_same(rows, step(policy, params, packed, rewards, algorithm=ALGORITHM))
    assert rows[1]["update/tokens"] == batch.completion_mask_PGT.sum()


def test_log_probs_behind_a_hole_are_those_of_the_whole_completion():
    """What was not trained on is seen all the same."""
    policy, params = tiny.policy_and_params()
    batch, _ = with_holes()
    whole = batch._replace(
        completion_mask_PGT=batch.attention_mask_PGS[:, :, 5:].astype(np.float32)
    )
    in_rows, _ = update.make_log_probs(policy)(params, jax.tree.map(jnp.asarray, batch))
    packing_of = Packing(batch.sequences(), tile=4)
    for given in (batch, whole):
        packed = jax.tree.map(jnp.asarray, packing_of.batch(given.sequences()))
        found = packing_of.unpacked(np.asarray(update.make_log_probs(policy)(params, packed)[0]))
        for p, g in np.ndindex(8, 4):
            wanted = np.asarray(in_rows)[p, g, : len(found[p][g])]
            np.testing.assert_allclose(found[p][g], wanted, atol=1e-5)


# Windows of some layers, soft caps and a rope of its own a layer; a window of every layer.
@pytest.mark.parametrize("family", ["gemma2", "gemma3", "window"])
def test_windows_soft_caps_and_ropes_of_each_layer_are_those_of_padded_rows(family):
    changes = {
        "gemma2": {"windows": (None, 4), "attention_soft_cap": 1.5, "logit_soft_cap": 2.0},
        "gemma3": {"windows": (3, None), "layer_ropes": (1, 0), "qk_norm": True},
        "window": {"windows": (4, 4), "tie_embeddings": False},
    }[family]
    ropes = (tiny.Rope(), tiny.Rope(theta=100.0))
    policy = Policy(tiny.model_config(ropes=ropes, **changes))
    params = policy.init(jax.random.key(0))
    batch, _ = tiny.batch(P=3)
    weights = jnp.cos(jnp.arange(batch.completion_mask_PGT.size)).reshape(3, 4, -1)
    packing_of = Packing(batch.sequences(), tile=4)
    sequences = dataclasses.replace(
        batch.sequences(),
        log_probs={
            "anchor": [
                [w[: len(c)] for w, c in zip(ws, group)]
                for ws, group in zip(np.asarray(weights), batch.sequences().completions)
            ]
        },
    )
    packed = packing_of.batch(sequences)

    def weighted(params, batch, weights, trained):
        log_probs, entropy = update.make_log_probs(policy)(params, batch)
        return jnp.where(trained, weights * (log_probs + 0.3 * entropy), 0.0).sum()

    rows, streams = jax.tree.map(jnp.asarray, (batch, packed))
    gradient = jax.value_and_grad(weighted)
    wanted = gradient(params, rows, weights, rows.completion_mask_PGT > 0)
    found = gradient(params, streams, streams.log_probs["anchor"], streams.trained)
    jax.tree.map(assert_same_but_for_rounding, wanted, found)


def assert_same_but_for_rounding(wanted, found):
    """Every entry to 5e-6 of the array's largest.

    The terms of an entry are as large as the largest entries, and may nearly cancel, so the float32
    rounding of an entry is no fraction of the entry itself. Here both layouts are up to 5e-5 away
    from the float64 gradient, whose largest entry is 24; in float64 they agree to 3e-15 of it.
    """
    largest = np.max(np.abs(wanted))
    np.testing.assert_allclose(found, wanted, rtol=0, atol=5e-6 * largest)


def test_streams_on_eight_devices_give_what_one_device_gives():
    batch, rewards = tiny.batch()
    policy, params = tiny.policy_and_params()
    mesh = sharding.make_mesh(2, 2, 2)
    on_mesh = dataclasses.replace(policy, mesh=mesh)
    layout = jax.tree.map(lambda s: s.sharding, on_mesh.abstract_params())
    packed = pack(batch.sequences(), num_shards=4, completions_per_micro=3, tile=4)
    found = step(
        on_mesh,
        jax.device_put(params, layout),
        packed,
        rewards,
        algorithm=ALGORITHM,
        put=sharding.BatchSharding(mesh).put,
    )
    assert_same(in_rows(False), found, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("remat", "scan_layers"),
    [("full", True), ("save_dots", True), ("offload", True), ("none", False), ("full", False)],
)
def test_recomputing_changes_nothing(remat, scan_layers):
    policy, params = tiny.policy_and_params(gradient_checkpointing=remat, scan_layers=scan_layers)
    batch, rewards = tiny.batch()
    found = step(policy, params, pack(batch.sequences(), tile=4), rewards, algorithm=ALGORITHM)
    assert_same(in_rows(False), found)


@pytest.mark.parametrize("scan_layers", [True, False])
def test_layers_are_the_turns_of_a_loop_or_written_out(scan_layers):
    policy, params = tiny.policy_and_params(scan_layers=scan_layers)
    tokens = np.zeros((1, 4), np.int32)
    text = jax.jit(policy.hidden).lower(params, tokens, np.ones_like(tokens)).as_text()
    assert ("stablehlo.while" in text) == scan_layers


def test_what_is_offloaded_are_the_hidden_states_between_layers_in_the_memory_of_the_host():
    policy, params = tiny.policy_and_params(gradient_checkpointing="offload")
    tokens = np.zeros((2, 5), np.int32)

    def total(params):
        return jnp.sum(policy.hidden(params, tokens, np.ones_like(tokens)))

    text = str(jax.make_jaxpr(jax.grad(total))(params))
    kept = [line for line in text.splitlines() if "<host>[" in line and "2,2,5,16" in line]
    assert kept, text


def test_every_token_has_one_place_and_a_prompt_runs_once():
    sequences, _ = tiny.sequences()
    packing_of = Packing(sequences, completions_per_micro=4, whole_groups=True, tile=4)
    packed = packing_of.batch(sequences)
    for p, group in enumerate(packing_of.unpacked(packed.micro.targets)):
        for targets, completion in zip(group, sequences.completions[p], strict=True):
            np.testing.assert_array_equal(targets, completion.tokens)
    num_tokens = sequences.lengths.sum()
    assert packed.trained.sum() == num_tokens
    prompt_tokens = sum(len(ids) - 1 for ids in sequences.prompts)
    assert np.count_nonzero(packed.micro.segments) == prompt_tokens + num_tokens


def test_experts_lie_where_their_tokens_do_one_above_their_number():
    sequences, _ = tiny.sequences()
    first = sequences.completions[0][1]
    experts = np.arange(6 * len(first), dtype=np.uint8).reshape(len(first), 3, 2)
    sequences.completions[0][1] = dataclasses.replace(first, experts=experts)
    packing_of = Packing(sequences, completions_per_micro=3, tile=4)
    whole = packing_of.batch(sequences).experts
    found = packing_of.unpacked(whole[:, :, packing_of.num_prompt :])
    np.testing.assert_array_equal(found[0][1], experts + 1)
    assert not found[0][0].any()  # a completion that says nothing of its experts
    assert not whole[:, :, : packing_of.num_prompt].any()


def ragged(P=32, G=8, T=512, mean=120.0, seed=0, prompts=(70, 0.4)) -> Sequences:
    """Lengths as on GSM8K: prompts around 70 tokens, completions around 120, few at the limit."""
    rng = np.random.default_rng(seed)
    median, spread = prompts
    prompt_lengths = np.clip(rng.lognormal(np.log(median), spread, P), 20, 4 * median - 1)
    lengths = np.clip(rng.lognormal(np.log(mean), 0.5, (P, G)), 8, T).astype(int)
    ones = np.ones(T)
    return Sequences(
        [[1] * int(length) for length in prompt_lengths],
        [[Completion.sampled(ones[:n], ones[:n], "stop") for n in row] for row in lengths],
    )


@pytest.mark.parametrize("micro", [0, 8, 16, 64])
def test_padding_stays_under_a_tenth_on_lengths_like_those_of_gsm8k(micro):
    batches = [ragged(seed=seed) for seed in range(4)]
    cut = {"completions_per_micro": micro, "full_length": 512}
    fracs = [Packing(batch, **cut).padding_frac for batch in batches]
    assert np.mean(fracs) < 0.1


@pytest.mark.parametrize("micro", [16, 64])
def test_whole_groups_share_the_fewest_micro_batches_that_hold_them(micro):
    for seed in range(2):
        batch = ragged(seed=seed)
        cut = {"completions_per_micro": micro, "full_length": 512, "prompt_length": 512}
        packing_of = Packing(batch, **cut, whole_groups=True)
        assert packing_of.num_micro == -(-batch.lengths.sum() // (micro * 512))


@pytest.mark.parametrize(
    ("micro", "group", "prompts", "whole_groups"),
    [
        (8, 8, 1, False),
        (8, 8, 1, True),
        (12, 4, 3, False),
        (12, 4, 3, True),
        (6, 4, 2, True),
        (6, 8, 2, False),
        (2, 8, 1, False),
        (1, 1, 1, False),
    ],
)
def test_short_completions_take_no_more_places_than_those_of_full_length(
    micro, group, prompts, whole_groups
):
    cut = {"completions_per_micro": micro, "full_length": 64, "whole_groups": whole_groups}
    most = micro * 64 + prompts * 39

    def needed(length, prompt_length=40):
        ones = np.ones(length)
        completion = Completion.sampled(ones, ones, "stop")
        sequences = Sequences([[1] * 40] * 24, [[completion] * group] * 24)
        return Packing(sequences, **cut, prompt_length=prompt_length, tile=4).needed

    full = needed(64)
    assert full == needed(64, prompt_length=10**6)  # where there is room the completions decide
    for size in (full, *map(needed, (32, 8, 1))):
        assert most / 3 < size.places <= most
        assert size.room <= full.room


@pytest.mark.parametrize("lengths", ["one of full length", "lognormal"])
def test_long_prompts_and_ragged_completions_need_no_more_micro_batches_than_full_ones(lengths):
    P, G, prompt, full = 16, 2, 511, 64
    budget = streams.Budget(8 * full, 8 * full + 4 * prompt)  # 4 groups fit, whatever their lengths
    rng = np.random.default_rng(0)
    for _ in range(20):
        costs_PG = np.ones((P, G), int)
        if lengths == "lognormal":
            costs_PG = np.clip(rng.lognormal(1.5, 1.2, (P, G)).astype(int), 1, full)
        else:
            costs_PG[rng.integers(P)] = full
        assert len(streams.cut(costs_PG, [prompt] * P, range(P), budget, True)) == P // 4


@pytest.mark.parametrize(
    ("lengths", "prompt", "places", "together"),
    [
        ((540, 640), 1, 10**6, 1),
        ((350, 500), 1, 10**6, 2),
        ((8, 9), 2000, 3000, 1),
    ],
    ids=["above half", "above a third", "prompts above half"],
)
def test_groups_of_which_few_fit_together_are_cut_soon(lengths, prompt, places, together):
    P = 1536
    costs_PG = np.random.default_rng(0).integers(*lengths, (P, 8))
    started = time.process_time()
    budget = streams.Budget(8 * 1024, places)
    micros = streams.cut(costs_PG, [prompt] * P, range(P), budget, True)
    assert time.process_time() - started < 1.5
    assert len(micros) == P // together


@pytest.mark.parametrize("micro", [0, 16])
def test_long_prompts_are_padded_by_less_than_a_sixth(micro):
    fracs = []
    for seed in range(4):
        batch = ragged(P=16, T=64, mean=40.0, seed=seed, prompts=(550, 0.1))
        cut = {"completions_per_micro": micro, "full_length": 64}
        fracs.append(Packing(batch, **cut).padding_frac)
    assert np.mean(fracs) < 1 / 6


def test_what_is_kept_for_the_gradient_does_not_grow_with_the_listed_tiles():
    rng = np.random.default_rng(0)
    B, N, H, K, D = 1, 1024, 4, 2, 8
    n = N // TILE
    ones = jnp.ones((B, N), jnp.int32)
    positions = jnp.arange(N, dtype=jnp.int32)[None]
    lists = np.where(np.tri(n, dtype=bool), np.arange(n), -1)[None].astype(np.int32)
    attend = stream_attention(Stream(positions, ones, ones, jnp.asarray(lists)), scale=1.0)
    layer = LayerInfo(0, None, None)

    def pullback(q, k, v):
        return jax.vjp(lambda *x: attend(*x, layer, None)[0], q, k, v)[1]

    q, k, v = (jnp.asarray(rng.normal(size=(B, N, h, D)), jnp.float32) for h in (H, K, K))
    kept = jax.tree.leaves(jax.eval_shape(pullback, q, k, v))
    floats = [x for x in kept if x.dtype == jnp.float32]
    assert sum(x.size for x in floats) <= q.size + k.size + v.size + q.size + B * N * H


def test_balanced_shards_hold_equally_many_prompts_and_nearly_as_many_tokens():
    batches = [ragged(P=64, seed=seed) for seed in range(4)]
    before, after = [], []
    for batch in batches:
        order = balanced(batch.tokens_of_groups, 8)
        assert sorted(order) == list(range(64))
        even = batch.select(order)
        before.append(Packing(batch, num_shards=8).padding_frac)
        after.append(Packing(even, num_shards=8).padding_frac)
        tokens = even.lengths.reshape(8, -1).sum(1)
        assert tokens.max() < 1.03 * tokens.mean()
    assert np.mean(after) < 0.1 < np.mean(before)


def test_sizes_are_few_so_that_few_updates_are_compiled():
    cut = {"completions_per_micro": 32, "full_length": 512}
    shapes = {
        tuple(x.shape for x in Packing(ragged(seed=seed), **cut).abstract().micro)
        for seed in range(24)
    }
    assert len(shapes) <= 10


def test_sizes_are_rounded_up_to_a_few_values_an_octave():
    def values(name, sizes):
        return sorted({getattr(size.rounded(1), name) for size in sizes})

    listed = [Size(1, 64, 64, n) for n in range(1, 33)]
    assert values("listed", listed) == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32]
    completions = [Size(1, 64, n, 1) for n in range(1025, 2049)]
    assert values("completion", completions) == list(range(1088, 2049, 64))
    prompts = [Size(1, n, 1024, 1) for n in range(1, 1025)]
    assert values("prompt", prompts) == list(range(32, 1025, 32))


# All that is known of lengths beforehand is a guess: they stay, or fall as the policy learns.
@pytest.mark.parametrize(("shards", "means"), [(1, (120, 120)), (8, (220, 150))])
def test_sizes_used_again_keep_the_programs_of_sixty_iterations_few(shards, means, monkeypatch):
    script = Path(__file__).resolve().parents[1] / "scripts" / "bench_compiles.py"
    monkeypatch.syspath_prepend(script.parent)
    found = runpy.run_path(str(script))["count"](shards, means=means)
    assert found["programs"] <= {1: 4, 8: 5}[shards]
    assert found["places"] <= 1.06
    assert found["smallest"] > 2 * found["programs"]


def test_a_run_that_knows_the_sizes_of_before_chooses_as_if_it_had_gone_on():
    cut = {"completions_per_micro": 8, "full_length": 512}
    batches = [ragged(P=8, seed=seed) for seed in range(8)]

    def sizes_of(batches, sizes: KnownSizes) -> list[Size]:
        found = []
        for batch in batches:
            found.append(Packing(batch, sizes=sizes.of("update"), **cut).size)
            sizes.note("update", found[-1])
        return found

    whole = KnownSizes()
    wanted = sizes_of(batches, whole)
    before = KnownSizes()
    sizes_of(batches[:4], before)
    resumed = KnownSizes()
    resumed.restore(json.loads(json.dumps(before.saved)))
    assert sizes_of(batches[4:], resumed) == wanted[4:]
    assert resumed.saved == whole.saved
    # Without them it would have chosen the smallest sizes.
    assert sizes_of(batches[4:], KnownSizes()) != wanted[4:]
    # Sizes of another tile fit none of its own.
    assert Packing(batches[0], sizes=resumed.of("update"), tile=48, **cut).size.prompt % 48 == 0


def test_a_known_size_is_not_asked_to_hold_a_group_that_it_is_too_small_for():
    ones = np.ones(8)
    group = [Completion.sampled(ones, ones, "stop")] * 2
    sequences = Sequences([[1] * 60] * 2, [group] * 2)
    cut = {"whole_groups": True, "count_prompts": True, "completions_per_micro": 2, "tile": 4}
    # It holds the completions, of 16 tokens a group, and not their prompts beside them.
    small = Size(2, 20, 24, 8)
    found = Packing(sequences, **cut, sizes=[small])
    assert found.num_micro == 2
    assert found.size != small


def test_a_size_that_was_used_before_changes_no_gradient():
    batch, rewards = tiny.batch()
    policy, params = tiny.policy_and_params()
    smallest = Packing(batch.sequences(), tile=4).size
    larger = smallest._replace(prompt=smallest.prompt + 4, completion=smallest.completion + 4)
    packed = Packing(batch.sequences(), tile=4, sizes=[larger])
    assert packed.size == larger
    found = step(policy, params, packed.batch(batch.sequences()), rewards, algorithm=ALGORITHM)
    assert_same(in_rows(False), found)


def test_a_tpu_has_wide_tiles_and_narrower_ones_for_short_completions():
    tiles = [tile_of("tpu", length) for length in (0, 256, 511, 512, 4096)]
    assert tiles == [128, 128, 128, 256, 256]
    assert tile_of("cpu", 4096) == tile_of("gpu", 0) == TILE


def test_what_cannot_be_laid_out_is_refused():
    batch, _ = tiny.batch()
    sequences = batch.sequences()
    with pytest.raises(ValueError, match="does not hold a group of 4"):
        pack(sequences, completions_per_micro=3, whole_groups=True)
    with pytest.raises(ValueError, match="do not spread over 3 streams"):
        pack(sequences, num_shards=3)
    tokens = batch.tokens_PGS.copy()
    tokens[0, 1, 4] += 1
    with pytest.raises(ValueError, match="different prompts"):
        batch._replace(tokens_PGS=tokens).sequences()


def test_micro_batches_that_hold_nothing_are_memory_that_nobody_touched():
    """Room for completions of full length, of which few come."""
    batch = ragged(P=64, T=4096, mean=60.0)
    packed = Packing(batch, completions_per_micro=4, full_length=4096).batch(batch)
    num_micro, room = int(packed.num_micro_B[0]), packed.trained.shape[1]
    assert num_micro * 8 < room
    for leaf in jax.tree.leaves((packed.micro, packed.trained, packed.completion)):
        assert not leaf[:, num_micro:].any()
