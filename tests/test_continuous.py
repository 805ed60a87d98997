"""Requests that come and go, against the engine that knows them all from the start."""

import dataclasses
import types
from concurrent.futures import Future

import jax
import numpy as np
import pytest
import tiny

from adpo_jax import Engine, Policy, SamplingParams
from adpo_jax.engine import cache_plan
from adpo_jax.engine.batching import DecodeLoop
from adpo_jax.engine.continuous import ContinuousBatch, LoadSizing
from adpo_jax.engine.decode_state import Sizes
from adpo_jax.engine.generation import CallSizing
from adpo_jax.engine.programs import Decode, Programs
from adpo_jax.engine.requests import Request
from adpo_jax.engine.schedule import Schedule
from adpo_jax.engine.verbs import Verbs

V = 61
LENGTHS = [5, 1, 12, 20, 2, 23]
# Few lengths, so that the engine compiles few programs to compare with.
SETTINGS = [
    SamplingParams(n=2, max_tokens=32, temperature=0.7, stop_token_ids=(1, 2)),
    SamplingParams(max_tokens=40, temperature=0),
    SamplingParams(n=2, max_tokens=31, top_k=7, top_p=0.8, stop_token_ids=(3,)),
    SamplingParams(max_tokens=30, min_p=0.05, min_tokens=6, stop_token_ids=tuple(range(20))),
    SamplingParams(max_tokens=1),
    SamplingParams(max_tokens=32, ignore_eos=True, stop_token_ids=tuple(range(30))),
]


@pytest.fixture(scope="module")
def engine():
    policy = Policy(tiny.model_config(vocab_size=V, qk_norm=True))
    engine = Engine(
        policy, max_prompt_length=24, max_response_length=40, num_slots=8, steps_per_dispatch=4
    )
    return engine, policy.init(jax.random.key(0))


@pytest.fixture(scope="module")
def expected(engine):
    """What the engine gives each request alone."""
    engine, params = engine
    return [
        engine.generate(params, [prompt], sampling, jax.random.key(seed))
        for seed, (prompt, sampling) in enumerate(zip(prompts(), SETTINGS))
    ]


def prompts():
    rng = np.random.default_rng(0)
    return [rng.integers(0, V, length).tolist() for length in LENGTHS]


class Collector:
    """Runs a batch and keeps what comes."""

    def __init__(self, batch):
        self.batch, self.tokens, self.log_probs, self.reasons = batch, {}, {}, {}

    def step(self):
        for new in self.batch.step():
            assert new.sample not in self.reasons
            self.tokens.setdefault(new.sample, []).extend(new.tokens.tolist())
            self.log_probs.setdefault(new.sample, []).extend(new.log_probs.tolist())
            if new.finish_reason:
                self.reasons[new.sample] = new.finish_reason

    def run(self):
        while self.batch.busy:
            self.step()

    def assert_equal(self, samples, out):
        for sample, completion in zip(samples, out[0], strict=True):
            np.testing.assert_array_equal(self.tokens[sample], completion.tokens)
            np.testing.assert_allclose(self.log_probs[sample], completion.log_probs, atol=1e-5)
            assert self.reasons[sample] == completion.finish_reason


def submit(batch, which, client=None):
    return batch.submit(prompts()[which], SETTINGS[which], seed=which, client=client)


def test_requests_that_arrive_while_others_decode_get_what_the_engine_gives_them_alone(
    engine, expected
):
    batch = ContinuousBatch(*engine)
    collector, submitted = Collector(batch), {}
    for which in range(len(SETTINGS)):
        submitted[which] = submit(batch, which)
        collector.step()
        collector.step()
    collector.run()
    for which, samples in submitted.items():
        collector.assert_equal(samples, expected[which])


def test_more_requests_than_slots_all_end_and_the_memory_goes_back(engine, expected):
    batch = ContinuousBatch(*engine)
    collector = Collector(batch)
    submitted = [(which % 6, submit(batch, which % 6)) for which in range(30)]
    assert batch.num_waiting > batch.engine.num_slots
    collector.run()
    for which, samples in submitted:
        collector.assert_equal(samples, expected[which])
    batch.step()
    assert batch._loop._state is None


def sizing(num_shards=1):
    return LoadSizing([4, 16, 64], [32, 128, 512], [64, 256], steps=4, num_shards=num_shards)


def started(sizing, groups, now=None, schedule=None):
    """The sizes for groups of so many samples when they have started, and their schedule."""
    schedule = schedule or Schedule(num_shards=sizing.num_shards)
    for n in groups:
        request = Request(np.ones(9, np.int32), SamplingParams(n=n), keys=None)
        schedule.add(request, request.samples, sizing.per_row(n))
    now = sizing.room(now, schedule, 0)
    schedule.lay_out(now.slots, now.rows, now.width)
    schedule.start()
    return now, schedule


@pytest.mark.parametrize(
    ("groups", "num_shards", "width"),
    [
        ([1], 1, 1),
        ([1] * 9, 1, 1),
        ([2] * 30, 1, 1),
        ([1] * 100, 2, 1),
        ([8], 1, 8),
        ([4] * 16, 1, 8),
        ([100], 1, 8),
        ([8, 1, 8], 1, 8),
        ([8] * 8, 2, 4),
        ([8] * 8, 4, 1),  # two samples a device: a row for every two would be no fewer rows
    ],
)
def test_whoever_has_a_slot_to_come_to_starts(groups, num_shards, width):
    now, schedule = started(sizing(num_shards), groups)
    assert schedule.num_live == min(sum(groups), 64)
    assert now.slots == next(size for size in (4, 16, 64) if size >= schedule.num_live)
    assert now.width == width
    assert now.rows == (now.slots if width == 1 else 2 * now.slots // width)


def test_rows_are_shared_until_they_are_too_few_and_again_when_the_load_is_gone():
    follows = sizing()
    now, schedule = started(follows, [8, 8])
    assert (now.slots, now.rows, now.width) == (16, 4, 8)
    now, _ = started(follows, [1, 1], now, schedule)
    assert (now.slots, now.rows, now.width) == (64, 16, 8)
    now, _ = started(follows, [1] * 20, now, schedule)
    assert (now.slots, now.rows, now.width) == (64, 64, 1)
    first = schedule.in_slot[0][0]
    for slot, _ in schedule.live():
        if schedule.in_slot[slot][0] is not first:
            schedule.finish(slot)
    now = follows.fitted(now, schedule, 0)
    assert (now.slots, now.rows, now.width) == (16, 4, 8)


def test_samples_of_a_request_share_its_prompt_until_there_are_too_many_prompts(engine, expected):
    sampling, prompt = SamplingParams(n=4, max_tokens=40), prompts()[3]
    alone = engine[0].generate(engine[1], [prompt], sampling, jax.random.key(7))
    batch = ContinuousBatch(*engine)
    collector, loop = Collector(batch), batch._loop
    group = batch.submit(prompt, sampling, seed=7)
    collector.step()
    assert (loop.sizes.slots, loop.sizes.rows, loop.sizes.width) == (4, 1, 8)
    assert loop.stats["prefill_tokens"] == len(prompt) - 1
    others = [submit(batch, 1) for _ in range(4)]
    collector.step()
    assert (loop.sizes.slots, loop.sizes.rows, loop.sizes.width) == (8, 8, 1)
    late = batch.submit(prompt, sampling, seed=7)
    collector.run()
    for samples in (group, late):
        collector.assert_equal(samples, alone)
    for samples in others:
        collector.assert_equal(samples, expected[1])


def test_a_server_on_several_devices_samples_what_one_does(engine):
    from adpo_jax.devices.sharding import make_mesh

    on_one, params = engine
    mesh = make_mesh(data=2, fsdp=1, devices=jax.devices()[:2])
    policy = dataclasses.replace(on_one.policy, mesh=mesh)
    params = jax.device_put(params, policy.shardings(params))
    sizes = {"max_prompt_length": 24, "max_response_length": 40, "num_slots": 8}
    batch = ContinuousBatch(Engine(policy, **sizes, steps_per_dispatch=4), params)
    collector, sampling = Collector(batch), SamplingParams(n=8, max_tokens=12)
    alone = on_one.generate(engine[1], prompts()[:1], sampling, jax.random.key(3))
    group = batch.submit(prompts()[0], sampling, seed=3)
    collector.step()
    # Half of the samples on each device, beside a copy of the prompt.
    assert (batch._loop.sizes.rows, batch._loop.sizes.width) == (4, 4)
    collector.run()
    collector.assert_equal(group, alone)


def test_a_cancelled_request_frees_its_slot_and_disturbs_nobody(engine, expected):
    batch = ContinuousBatch(*engine)
    collector = Collector(batch)
    kept, gone, waiting = submit(batch, 1), submit(batch, 5), submit(batch, 0)
    collector.step()
    for sample in gone:
        batch.cancel(sample)
    seen = {sample: len(collector.tokens[sample]) for sample in gone}
    collector.step()
    assert batch.num_running == sum(not sample.ended for sample in kept + waiting)
    late = submit(batch, 2)
    for sample in late:
        batch.cancel(sample)  # before it began
    collector.run()
    assert {sample: len(collector.tokens[sample]) for sample in gone} == seen
    assert all(sample.ended for sample in gone + late)
    assert not set(late) & set(collector.tokens)
    collector.assert_equal(kept, expected[1])
    collector.assert_equal(waiting, expected[0])


def test_a_cancelled_request_leaves_the_queue_wherever_it_stands(engine):
    batch = ContinuousBatch(*engine)
    before = [sample for _ in range(9) for sample in submit(batch, 1)]
    gone, after = submit(batch, 2), submit(batch, 1)
    for sample in gone:
        batch.cancel(sample)
    batch.step()
    assert batch.num_waiting == 2  # one of the nine, and the last
    assert all(sample.ended for sample in gone)
    assert not any(sample.ended for sample in before + after)


def test_a_batch_that_grows_stays_within_the_memory_it_was_planned_for(monkeypatch):
    policy = Policy(tiny.model_config(vocab_size=V))
    columns, prefix, slots = 16, 128, 16
    most = slots * (columns + prefix + prefix)
    token = 2 * 2 * 2 * 16 * 4
    monkeypatch.setattr(cache_plan, "memory_budget", lambda *_, **__: (most * token, ""))
    # An accelerator never copies the engine's own rows.
    gpu = types.SimpleNamespace(platform="gpu", device_kind="one")
    monkeypatch.setattr("adpo_jax.engine.engine._device", lambda _: gpu)
    engine = Engine(
        policy,
        max_prompt_length=prefix,
        max_response_length=columns,
        gpu_memory_utilization=0.9,
        steps_per_dispatch=4,
        attention="xla",
    )
    batch = ContinuousBatch(engine, policy.init(jax.random.key(0)))
    assert engine.num_slots > batch.num_slots == slots

    # Held, so that no array of another test is counted, and none is freed in the middle.
    others = jax.live_arrays()
    known = {id(x) for x in others}

    def cached():
        new = (x for x in jax.live_arrays() if id(x) not in known)
        return sum(x.nbytes for x in new if x.ndim == 4)

    peaks = []

    def watched(verb):
        def call(*args):
            made = verb(*args)
            peaks.append(cached())
            return made

        return call

    for name in ("gather_slots", "rows_of", "with_columns"):
        monkeypatch.setattr(Verbs, name, watched(getattr(Verbs, name)))
    sampling = SamplingParams(max_tokens=columns)
    batch.submit([1] * prefix, sampling, seed=0)
    batch.step()
    for seed in range(slots - 1):
        batch.submit([2] * 9, sampling, seed=seed)
    batch.step()
    assert batch.num_running == slots
    assert prefix * slots * token < max(peaks) <= most * token


def test_few_programs_serve_all_settings(engine):
    batch = ContinuousBatch(*engine)
    collector = Collector(batch)

    def all_at_once(seed, warmth):
        for prompt, sampling in zip(prompts(), SETTINGS):
            # All tokens that there may be, so that slots are taken and left as in any other round.
            whole = dataclasses.replace(sampling, stop_token_ids=(), ignore_eos=True)
            warmer = dataclasses.replace(whole, temperature=sampling.temperature * warmth)
            batch.submit(prompt, warmer, seed=seed)
        collector.run()

    all_at_once(0, 1.1)
    all_at_once(1, 1.2)  # begins with the slots and rows that the first round grew to
    before = type(batch.verbs).generate._cache_size()
    all_at_once(2, 1.3)
    assert type(batch.verbs).generate._cache_size() == before


def test_alternatives_come_to_whom_they_are_due(engine):
    batch = ContinuousBatch(*engine)
    (with_five,) = batch.submit([1, 2], SamplingParams(max_tokens=6), seed=0, num_alternatives=5)
    (without,) = batch.submit([1, 2], SamplingParams(max_tokens=6), seed=0)
    for new in batch.step():
        if new.sample is without:
            assert new.alternatives is None
            continue
        ids, log_probs = new.alternatives
        assert ids.shape == log_probs.shape == (len(new.tokens), 5)
        assert (np.diff(log_probs) <= 0).all()
        for token, log_prob, row, scored in zip(new.tokens, new.log_probs, ids, log_probs):
            if token in row:
                np.testing.assert_allclose(scored[row.tolist().index(token)], log_prob, atol=1e-5)
            assert log_prob <= scored[0] + 1e-5
    batch.cancel(with_five)


@pytest.mark.parametrize(
    ("prompt", "changes", "message"),
    [
        ([], {}, "1 to 24 token ids"),
        ([1] * 25, {}, "1 to 24 token ids"),
        ([V], {}, "outside"),
        ([1], {"max_tokens": 41}, "max_response_length"),
        ([1], {"routed_experts": True}, "routed_experts needs a mixture"),
    ],
)
def test_what_cannot_be_sampled_is_refused_at_once(engine, prompt, changes, message):
    batch = ContinuousBatch(*engine)
    with pytest.raises(ValueError, match=message):
        batch.submit(prompt, SamplingParams(**{"max_tokens": 4} | changes), seed=0)
    assert not batch.busy


@pytest.mark.parametrize("program", ["prefill", "assign", "generate"])
def test_no_step_follows_one_that_failed(engine, program, monkeypatch):
    def fails(*args):
        raise MemoryError(program)

    batch = ContinuousBatch(*engine)
    batch.submit([1, 2, 3], SamplingParams(max_tokens=4), seed=0)
    monkeypatch.setattr(Verbs, program, fails)
    with pytest.raises(MemoryError, match=program):
        batch.step()
    monkeypatch.undo()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="an earlier step failed .* make a new batch"):
            batch.step()


def test_a_client_that_asks_for_much_does_not_keep_another_waiting(engine):
    batch = ContinuousBatch(*engine)
    many = [sample for _ in range(20) for sample in submit(batch, 1, client="greedy")]
    modest = submit(batch, 1, client="modest")
    while not all(sample.ended for sample in modest):
        batch.step()
    assert sum(sample.ended for sample in many) < len(many) / 2
    for sample in many:
        batch.cancel(sample)
    batch.step()
    assert not batch.busy
    assert all(sample.ended for sample in many)


def test_a_prompt_that_cannot_be_scored_is_refused(engine):
    scorer = ContinuousBatch(*engine).scorer
    for prompts, num_alternatives, text in (
        ([[1], []], 0, "prompt 1 is a list of token ids"),
        ([[V]], 0, "prompt 0 is a list of token ids"),
        ([[-1]], 0, "prompt 0 is a list of token ids"),
        ([[1, 2]], scorer.num_alternatives + 1, "num_alternatives is 0 to"),
    ):
        with pytest.raises(ValueError, match=text):
            scorer.score(prompts, num_alternatives)


def test_a_prompt_is_scored_as_the_policy_scores_it(engine):
    made, params = engine
    prompts = [np.arange(1, n + 1, dtype=np.int32) % V for n in (1, 2, 17, 9, 16, 3, 5)]
    scored = ContinuousBatch(made, params).scorer.score(prompts, 3)
    rows = np.stack([np.pad(prompt, (0, 17 - len(prompt))) for prompt in prompts])
    there = np.arange(17) < np.array([[len(prompt)] for prompt in prompts])
    logits = made.policy.logits(params, rows, there.astype(np.int32))
    for row, prompt in enumerate(prompts):
        log_probs, (ids, likeliest), *_ = scored[row]
        assert ids.shape == likeliest.shape == (len(prompt) - 1, 3)
        expected = np.asarray(jax.nn.log_softmax(logits[row]))[: len(prompt) - 1]
        of_tokens = np.take_along_axis(expected, prompt[1:, None], axis=1)[:, 0]
        np.testing.assert_allclose(log_probs, of_tokens, rtol=2e-5, atol=2e-5)
        best = np.sort(expected, axis=-1)[:, :-4:-1]
        np.testing.assert_allclose(likeliest, best, rtol=2e-5, atol=2e-5)
        # To the last bit: clients tell a greedy token by it.
        for value, top, target, id_ in zip(log_probs, likeliest, prompt[1:], ids[:, 0]):
            assert (value == top[0]) == (target == id_)


class AtOnce:
    """Compiles when it is told to, in the thread that tells it; keeps that out of `compiled`."""

    def __init__(self, compiled):
        self.compiled = compiled

    def submit(self, function, *args):
        job, known = Future(), len(self.compiled)
        job.set_result(function(*args))
        del self.compiled[known:]
        return job

    def shutdown(self, **_):
        pass


@pytest.fixture
def compiled(monkeypatch):
    """The names of the programs that are compiled from here on."""
    from jax._src import compiler

    names, compile_ = [], compiler.compile_or_get_cached

    def noting(backend, computation, *args, **kwargs):
        names.append(computation.operation.attributes["sym_name"].value)
        return compile_(backend, computation, *args, **kwargs)

    monkeypatch.setattr(compiler, "compile_or_get_cached", noting)
    return names


@pytest.mark.parametrize("written", [0, 40])
@pytest.mark.parametrize(
    "changes",
    [
        {"slots": 8},
        {"rows": 2, "width": 2},
        {"columns": 64},
        {"prefix": 32},
        {"slots": 8, "columns": 64, "rows": 8, "prefix": 32},
    ],
    ids=lambda changes: " and ".join(changes),
)
def test_a_change_of_sizes_runs_what_was_compiled_for_it(changes, written, compiled):
    """With more steps `written` than columns the ring has gone round."""
    policy = Policy(tiny.model_config(vocab_size=V + 3))
    verbs = Engine(policy, max_prompt_length=32, max_response_length=64).verbs
    old = Sizes(slots=4, columns=32, rows=4, width=1, prefix=16)
    new = old._replace(**changes)
    sizing = CallSizing(old, slot_sizes=(4, 8), column_sizes=(32, 64), steps=4)
    loop = DecodeLoop(verbs, policy.init(jax.random.key(0)), sizing, None)
    loop._resize(old, 0)
    loop._written = written
    Programs(verbs, lambda: loop.params, 4)._compile_move(old, new)
    compiled.clear()
    loop._resize(new, 5)
    assert compiled == []
    assert jax.tree.map(np.shape, loop._state) == jax.tree.map(
        np.shape, jax.eval_shape(lambda: verbs.init_decode_state(new))
    )


def test_what_a_new_kind_of_request_needs_is_compiled_ahead_of_it(compiled):
    """Other settings, more slots, a prompt in pieces: the loop meets no program new to it."""
    policy = Policy(tiny.model_config(vocab_size=V + 2))  # with programs of its own
    lengths = {"max_prompt_length": 96, "max_response_length": 32}
    engine = Engine(policy, **lengths, num_slots=8, steps_per_dispatch=4, prefill_chunk_size=16)
    params = policy.init(jax.random.key(0))
    batch = ContinuousBatch(engine, params, compile_ahead=True)
    batch._programs._thread = AtOnce(compiled)
    batch.submit([1, 2, 3], SamplingParams(max_tokens=32), seed=0)
    batch.step()
    batch.step()
    compiled.clear()
    truncated = SamplingParams(max_tokens=20, top_k=5)
    batch.submit([4, 5], truncated, seed=1)
    batch.step()
    assert batch.num_running == 2
    batch.submit([4, 5], dataclasses.replace(truncated, n=4), seed=1)
    batch.step()
    assert (batch.num_running, batch.sizes.slots) == (6, 8)
    long = batch.submit(list(range(60)), truncated, seed=2)[0]
    while not long.num_tokens:
        batch.step()
    # A prompt of several rows is copied, and one in pieces begun, by programs that take no time.
    assert set(compiled) <= {"jit_rows_of", "jit_insert", "jit_empty"}


def test_a_request_whose_programs_are_missing_waits_while_others_stream_and_come(
    engine, expected, monkeypatch
):
    made, params = engine
    batch, missing = ContinuousBatch(made, params, compile_ahead=True), {"truncated", "slots"}
    slots = []

    def ready(self, programs):
        decodes = [program for program in programs if isinstance(program, Decode)]
        needed = {"truncated"} if any(decode.method.top_k for decode in decodes) else set()
        slots.extend(decode.sizes.slots for decode in decodes)
        if any(decode.sizes.slots > 4 for decode in decodes):
            needed.add("slots")
        return not needed & missing

    monkeypatch.setattr(Programs, "ready", ready)
    collector = Collector(batch)
    streaming = submit(batch, 1)
    collector.step()
    held, plain = submit(batch, 2, client="a"), submit(batch, 0, client="b")
    collector.step()
    collector.step()
    assert set(collector.tokens) == {*streaming, *plain}
    missing.remove("truncated")
    collector.step()
    assert held[0] in collector.tokens  # in the last of the four slots
    more = [sample for _ in range(4) for sample in submit(batch, 1, client="b")]
    collector.step()
    assert batch.sizes.slots == 4
    assert max(slots) == 8  # asked for
    missing.clear()
    collector.run()
    for samples, which in ((streaming, 1), (held, 2), (plain, 0), (more[-1:], 1)):
        collector.assert_equal(samples, expected[which])
    batch.close()
