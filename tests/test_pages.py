"""Long completions in pages, against the same completions in a ring that holds them whole."""

import collections
import dataclasses

import jax
import numpy as np
import pytest
import tiny
from golden_models import drawn_model
from test_turns import assert_same as assert_scripts_agree
from test_turns import converse, late

from adpo_jax import Engine, Policy, SamplingParams
from adpo_jax.devices.sharding import make_mesh
from adpo_jax.dry_run.hlo import Program
from adpo_jax.engine import tuning
from adpo_jax.engine.kv_cache import PageSizes
from adpo_jax.engine.pages import PageTables
from adpo_jax.model.model_config import LinearAttention

V = 61
# Ends of all lengths, from a few tokens up to the limit.
SAMPLING = SamplingParams(n=4, max_tokens=100, stop_token_ids=(3,))
TURNS = dataclasses.replace(SAMPLING, stop_token_ids=(3, 11))
ROOMY, TIGHT = {"expected_response_length": 100}, {"expected_response_length": 16}


@pytest.fixture(scope="module", autouse=True)
def few_programs():
    """Rings do not grow, so that each engine compiles one program for decoding."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuning, "COLUMN_STAGES", 1)
        yield


def policy_of(**changes):
    changes = {"qk_norm": True, "windows": (20, None), "attention_soft_cap": 20.0} | changes
    return Policy(tiny.model_config(vocab_size=V, **changes))


@pytest.fixture(scope="module")
def model():
    policy = policy_of()
    return policy, policy.init(jax.random.key(0))


def engine_of(policy, **options):
    sizes = {"max_prompt_length": 24, "max_response_length": 100, "num_slots": 8, "page_size": 8}
    return Engine(policy, **{**sizes, "steps_per_dispatch": 5, **options})


def prompts_of(*lengths):
    rng = np.random.default_rng(1)
    return [rng.integers(0, V, length).tolist() for length in lengths]


def sampled(engine, params, **changes):
    prompts, sampling = prompts_of(5, 1, 12, 20, 2), dataclasses.replace(SAMPLING, **changes)
    return engine.generate(params, prompts, sampling, jax.random.key(3))


@pytest.fixture(scope="module")
def in_ring(model):
    policy, params = model
    found = sampled(engine_of(policy), params)
    assert np.ptp(found.lengths) > 70
    return found


def assert_same(found, wanted, atol=1e-4):
    for ours, theirs in zip(found.groups, wanted.groups, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert a.tokens.tolist() == b.tokens.tolist()
            assert a.finish_reason == b.finish_reason
            np.testing.assert_allclose(a.log_probs, b.log_probs, atol=atol)


def test_samples_in_pages_are_those_in_a_ring(model, in_ring):
    policy, params = model
    found = sampled(engine_of(policy, **ROOMY), params)
    assert_same(found, in_ring)
    assert found.stats["preempted"] == 0
    assert found.stats["prefill_tokens"] == in_ring.stats["prefill_tokens"]


def test_samples_that_wait_for_pages_go_on_as_if_they_had_not(model, in_ring):
    policy, params = model
    found = sampled(engine_of(policy, **TIGHT), params)
    assert_same(found, in_ring)
    assert found.stats["preempted"] > 0


def test_an_int8_cache_lies_in_pages_with_its_scales(model):
    policy, params = model
    int8 = {"cache_dtype": "int8"}
    wanted = sampled(engine_of(policy, **int8), params, n=2)
    found = sampled(engine_of(policy, **TIGHT, **int8), params, n=2)
    # What another program rounds to the neighbour of 255 numbers moves a log-prob by some 1e-4.
    assert_same(found, wanted, atol=2e-3)
    assert found.stats["preempted"] > 0


def test_a_batch_shrinks_beside_its_pages(model, monkeypatch):
    policy, params = model
    monkeypatch.setattr(tuning, "MIN_SLOTS", 2)
    arguments = params, prompts_of(5, 1), SAMPLING, jax.random.key(3)
    wanted = engine_of(policy).generate(*arguments)
    found = engine_of(policy, **ROOMY).generate(*arguments)
    assert found.stats["resizes"] > 1
    assert_same(found, wanted)


def test_the_tpu_kernel_interpreted_reads_the_pages_of_an_engine():
    policy = policy_of(head_dim=128, num_heads=2, num_kv_heads=1)
    params = policy.init(jax.random.key(0))
    wanted = sampled(engine_of(policy), params, n=1)
    kernel = {"attention": "pallas_tpu_interpret"}
    assert_same(sampled(engine_of(policy, **TIGHT, **kernel), params, n=1), wanted)


def test_pages_stay_on_the_devices_of_their_slots(model, in_ring):
    _, params = model
    policy = dataclasses.replace(model[0], mesh=make_mesh(data=4, fsdp=1, tensor=2))
    engine = engine_of(policy, **TIGHT)
    found = sampled(engine, params)
    assert_same(found, in_ring)
    assert found.stats["preempted"] > 0
    decode = engine.trace(SAMPLING)["decode"].lower().compile()
    sources = {c.source for c in Program(decode.as_text()).collectives}
    assert not [source for source in sources if "attention/" in source and "dot" not in source]


def test_a_kept_pool_serves_the_next_call(model, in_ring):
    policy, params = model
    engine = engine_of(policy, **TIGHT, free_cache_engine=False)
    first = sampled(engine, params)
    pool = engine._kept.pages.kv
    second = sampled(engine, params)
    assert all(x.is_deleted() for x in jax.tree.leaves(pool))  # it was written in place
    assert_same(second, in_ring)
    assert second.stats == first.stats


def test_a_stop_string_gives_pages_back(model):
    policy, params = model
    text = {"detokenize": lambda tokens: "".join(chr(65 + token) for token in tokens)}
    wanted = sampled(engine_of(policy, **text), params, stop=("K",))
    assert_same(sampled(engine_of(policy, **TIGHT, **text), params, stop=("K",)), wanted)


def test_a_call_and_turns_of_few_tokens_stay_in_the_ring(model):
    policy, params = model
    engine = engine_of(policy, **TIGHT)
    short = dataclasses.replace(SAMPLING, n=1, max_tokens=32)
    found = engine.generate(params, prompts_of(5), short, jax.random.key(3))
    with engine.session(params, short, jax.random.key(3)) as session:
        session.submit(prompts_of(5)[0])
        turns = []
        while not turns:
            turns = session.step()
        assert session._loop._state.pages is None
    tokens = found.groups[0][0].tokens
    assert turns[0].tokens.tolist() == tokens.tolist()


def test_the_tables_of_pages():
    tables = PageTables(PageSizes(page=8, pages=8, most=4), num_shards=2)
    assert tables.try_take("a", 0, 0, spare=4)
    assert not tables.holds("a")
    tables.take("a", 0, 24)
    assert tables.table("a").tolist() == [0, 1, 2, 0]
    assert tables.lacks(0, [("a", 40), ("b", 1)])
    assert not tables.lacks(0, [("a", 32)])
    assert not tables.try_take("b", 0, 1, spare=1)
    assert tables.try_take("c", 1, 32, spare=4)
    assert tables.table("c").tolist() == [4, 5, 6, 7]
    # Columns 20 .. 25, of which two lie past the end of the ring.
    copies = tables.moves("c", slot=5, first=28, start=20, stop=26, ring=32)
    assert [tuple(copy) for copy in copies] == [(6, 5, 28, 4, 4, 5), (7, 5, 0, 0, 2, 5)]
    tables.release("a")
    assert tables.try_take("b", 0, 32, spare=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"page_size": 24}, "page_size is a power of two, 8 or more; given 24"),
        ({"expected_response_length": 0}, "expected_response_length is a whole number"),
    ],
)
def test_what_cannot_be_is_refused(model, options, message):
    with pytest.raises(ValueError, match=message):
        engine_of(model[0], **options)


@pytest.mark.parametrize(
    "on_mesh", [False, pytest.param(True, marks=pytest.mark.long)], ids=["one device", "mesh"]
)
def test_samples_with_a_state_beside_their_pages_go_on_after_they_waited(on_mesh):
    linear = LinearAttention((True, False), 2, 8, 2, 8, taps=4, by_key_head=True)
    policy = policy_of(linear_attention=linear, windows=(None, None))
    params = policy.init(jax.random.key(0))
    wanted = sampled(engine_of(policy), params)
    if on_mesh:
        mesh = make_mesh(data=2, fsdp=1, tensor=2, devices=jax.devices()[:4])
        policy = dataclasses.replace(policy, mesh=mesh)
    found = sampled(engine_of(policy, **TIGHT), params)
    assert_same(found, wanted)
    assert found.stats["preempted"] > 0


@pytest.mark.long
@pytest.mark.parametrize("name", ["gemma4_text", "gpt_oss", "llama4_text"])
def test_layers_of_two_kinds_with_sinks_and_in_chunks_have_pages_too(name):
    policy, params = drawn_model(name)[:2]
    wanted = sampled(engine_of(policy), params, n=2)
    assert_same(sampled(engine_of(policy, **TIGHT), params, n=2), wanted)


# --- samples in turns


@pytest.fixture(scope="module")
def turns_in_ring(model):
    policy, params = model
    with engine_of(policy).session(params, TURNS, jax.random.key(4)) as session:
        found = converse(session, prompts_of(5, 12, 20), delay=late)
    assert max(len(script.tokens) for script in found) > 70
    return found


@pytest.mark.parametrize("room", [ROOMY, TIGHT], ids=["roomy", "tight"])
def test_turns_kept_in_pages_say_what_turns_in_a_ring_say(room, model, turns_in_ring):
    policy, params = model
    engine = engine_of(policy, **room)
    with engine.session(params, TURNS, jax.random.key(4)) as session:
        found = converse(session, prompts_of(5, 12, 20), delay=late)
        stats, sizes = session.stats, session._loop.sizes
    assert_scripts_agree(found, turns_in_ring)
    assert (sizes.columns, sizes.past_rows) == (32, 0)
    lost = stats["preempted"] + stats["evicted"]
    assert lost == 0 if room is ROOMY else lost > 0
    assert max(script.num_turns for script in found) > 2


def test_samples_that_were_interrupted_go_on_in_pages(model):
    policy, params = model
    engine, sampling = engine_of(policy, **TIGHT), dataclasses.replace(SAMPLING, stop_token_ids=())
    prompts, key = prompts_of(5, 12), jax.random.key(6)
    wanted = engine_of(policy).generate(params, prompts, sampling, key)
    session = engine.session(params, sampling, key)
    requests = [session.submit(p) for p in prompts]
    for _ in range(9):
        assert session.step() == []
    left = session.leave()
    assert max(len(turn.tokens) for turn in left) > 32
    with engine.session(params, sampling, jax.random.key(9)) as session:
        found = {}
        for request in requests:
            turns = [turn for turn in left if turn.sample.request is request]
            new = session.submit(
                request.prompt, [turn.tokens for turn in turns], keys=request.key_data
            )
            found |= {s: (t.sample, t.tokens) for s, t in zip(new.samples, turns, strict=True)}
        while session.busy:
            for turn in session.step():
                first, tokens = found[turn.sample]
                group = wanted.groups[requests.index(first.request)]
                whole = np.concatenate([tokens, turn.tokens])
                np.testing.assert_array_equal(whole, group[first.index].tokens)
                session.end(turn.sample)


# Some long turns, whose ring is at its longest, and many short ones, whose ring never grows.
@pytest.mark.parametrize(
    ("stops", "page", "stages", "columns"),
    [((3, 7, 11, 20), 8, 1, 32), (range(0, V, 2), 16, 4, 16)],
    ids=["long", "short"],
)
def test_turns_that_go_on_at_once_have_their_own_pages(
    stops, page, stages, columns, model, monkeypatch
):
    monkeypatch.setattr(tuning, "COLUMN_STAGES", stages)
    policy, params = model
    sampling, found = dataclasses.replace(TURNS, stop_token_ids=tuple(stops)), []
    for room in ({}, ROOMY | {"page_size": page}):
        engine, said = (
            engine_of(policy, steps_per_dispatch=2, **room),
            collections.defaultdict(list),
        )
        with engine.session(params, sampling, jax.random.key(4)) as session:
            samples = [s for p in prompts_of(5, 12, 20) for s in session.submit(p).samples]
            while session.busy:
                for turn in session.step():
                    said[turn.sample] += turn.tokens.tolist()
                    if session.room(turn.sample):
                        session.go_on(turn.sample)
                    else:
                        session.end(turn.sample)
            sizes = session._loop.sizes
        found.append([said[sample] for sample in samples])
    assert (sizes.columns, sizes.past_rows) == (columns, 0)
    assert found[0] == found[1]
