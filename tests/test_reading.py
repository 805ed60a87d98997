"""Long prompts that are read in pieces, against the same prompts prefilled at once."""

import dataclasses

import jax
import numpy as np
import pytest
from golden_models import drawn_model
from test_pages import assert_same, few_programs, policy_of, prompts_of  # noqa: F401  (a fixture)

from adpo_jax import Engine, SamplingParams
from adpo_jax.devices.sharding import make_mesh
from adpo_jax.engine import past, reading
from adpo_jax.engine.continuous import ContinuousBatch

SAMPLING = SamplingParams(n=2, max_tokens=20, stop_token_ids=(3,))
SAMPLING_ALONE = dataclasses.replace(SAMPLING, n=1)
# Shorter than a piece, of one token more, of whole pieces and one more, and of many pieces.
LENGTHS = (5, 18, 33, 34, 90)


@pytest.fixture(scope="module")
def model():
    policy = policy_of()
    return policy, policy.init(jax.random.key(0))


def engine_of(policy, **options):
    sizes = {"max_prompt_length": 96, "max_response_length": 20, "num_slots": 8}
    return Engine(policy, **{**sizes, "steps_per_dispatch": 4, **options})


def sampled(engine, params, **changes):
    sampling = dataclasses.replace(SAMPLING, **changes)
    return engine.generate(params, prompts_of(*LENGTHS), sampling, jax.random.key(3))


@pytest.fixture(scope="module")
def at_once(model):
    policy, params = model
    return sampled(engine_of(policy), params)


def test_prompts_read_in_pieces_have_the_completions_of_prompts_prefilled_at_once(model, at_once):
    policy, params = model
    found = sampled(engine_of(policy, prefill_chunk_size=16), params)
    assert_same(found, at_once)
    assert found.stats["prefill_tokens"] == sum(length - 1 for length in LENGTHS)
    # 17 tokens are two pieces, 32 are two, 33 three and 89 six.
    assert found.stats["prefill_calls"] == 1 + 2 + 2 + 3 + 6


def test_pieces_become_smaller_where_they_would_make_too_many_scores(model, at_once, monkeypatch):
    policy, params = model
    monkeypatch.setattr(past, "CHUNK_SCORES", 1 << 12)
    found = sampled(engine_of(policy, prefill_chunk_size=64), params)
    assert_same(found, at_once)


def test_devices_have_copies_of_what_is_read(model, at_once):
    policy, params = model
    policy = dataclasses.replace(policy, mesh=make_mesh(data=4, fsdp=1, tensor=2))
    assert_same(sampled(engine_of(policy, prefill_chunk_size=32), params), at_once)


def test_an_int8_cache_is_read_in_pieces(model):
    policy, params = model
    whole, pieces = (
        engine_of(policy, prefill_chunk_size=size, cache_dtype="int8") for size in (0, 16)
    )
    options = {"n": 1, "max_tokens": 1, "temperature": 0.0}
    whole, pieces = (sampled(engine, params, **options) for engine in (whole, pieces))
    # Pieces see what those before have left in the cache, and a whole prompt its own keys.
    for ours, theirs in zip(pieces.groups, whole.groups, strict=True):
        np.testing.assert_allclose(ours[0].log_probs, theirs[0].log_probs, atol=0.05)


class Slots:
    """A batch of requests that come and go, and the tokens of each."""

    def __init__(self, model, **options):
        policy, self.params = model
        self.engine = engine_of(policy, prefill_chunk_size=16, **options)
        self.batch, self.tokens, self.ended = ContinuousBatch(self.engine, self.params), {}, []

    def submit(self, prompt, **changes):
        sampling = dataclasses.replace(SAMPLING, n=1, ignore_eos=True, **changes)
        (sample,) = self.batch.submit(prompt, sampling, seed=len(prompt))
        self.tokens[sample] = []
        return sample

    def step(self):
        for new in self.batch.step():
            self.tokens[new.sample] += new.tokens.tolist()
            self.ended += [new.sample] * bool(new.finish_reason)

    def count(self, sample):
        return len(self.tokens[sample])

    def alone(self, prompt):
        sampling = dataclasses.replace(SAMPLING, n=1, ignore_eos=True)
        key = jax.random.key(len(prompt))
        out = self.engine.generate(self.params, [prompt], sampling, key)
        return out.groups[0][0].tokens.tolist()


def test_others_decode_and_overtake_while_a_long_prompt_is_read(model):
    slots, (long, short, late) = Slots(model), prompts_of(90, 9, 12)
    first = slots.submit(short)
    slots.step()
    held = slots.submit(long)
    counts = []
    for _ in range(2):
        slots.step()
        counts.append((slots.count(first), slots.count(held)))
    after = slots.submit(late)
    slots.step()
    # Each piece of the long prompt lies between two dispatches of four tokens.
    assert counts == [(8, 0), (12, 0)]
    assert [slots.count(sample) for sample in (first, after, held)] == [16, 4, 0]
    while slots.batch.busy:
        slots.step()
    assert slots.ended == [first, after, held]
    for sample, prompt in ((first, short), (after, late), (held, long)):
        assert slots.tokens[sample] == slots.alone(prompt)
    assert not slots.batch._loop._reader._readings


def test_an_idle_batch_reads_a_piece_a_step_and_short_requests_overtake(model):
    slots, (long, short) = Slots(model), prompts_of(90, 9)
    held = slots.submit(long)
    slots.step()
    assert slots.batch._loop._reader._readings[held.request].done == 16
    late = slots.submit(short)
    slots.step()
    assert (slots.count(late), slots.count(held)) == (4, 0)
    while slots.batch.busy:
        slots.step()
    assert slots.tokens[held] == slots.alone(long)


def test_long_requests_of_many_samples_keep_no_other_client_waiting(model):
    slots, (short, *longs) = Slots(model, num_slots=4), prompts_of(9, 90, 80, 70)
    sampling = dataclasses.replace(SAMPLING, n=6, ignore_eos=True)
    groups = [slots.batch.submit(p, sampling, seed=len(p), client="one") for p in longs]
    slots.tokens |= {sample: [] for group in groups for sample in group}
    slots.step()
    late, most = slots.submit(short), 0
    slots.step()
    assert slots.count(late) == 4
    while slots.batch.busy:
        slots.step()
        most = max(most, len(slots.batch._loop._reader._readings))
    # One prompt is read and kept at a time, and a group of two rows is read once.
    assert most == 1
    assert slots.batch._loop.stats["prefill_tokens"] == 8 + 89 + 79 + 69
    for prompt, group in zip(longs, groups):
        key = jax.random.key(len(prompt))
        wanted = slots.engine.generate(slots.params, [prompt], sampling, key).groups[0]
        assert [slots.tokens[s] for s in group] == [c.tokens.tolist() for c in wanted]


def test_the_store_never_shrinks_and_is_no_larger_than_the_prompt_needs(model, monkeypatch):
    verbs = engine_of(model[0]).verbs
    monkeypatch.setattr(past, "CHUNK_SCORES", 1 << 19)
    for length in range(1000, 1100, 7):
        columns = [columns for _, columns in reading.shapes(verbs, 256, length)]
        assert columns == sorted(columns)
        assert columns[-1] == max(256, 1 << (length - 1).bit_length())


def test_a_prompt_that_nobody_wants_any_more_is_not_read_on(model):
    slots, (long, short) = Slots(model), prompts_of(90, 9)
    first, held = slots.submit(short), slots.submit(long)
    slots.step()
    assert slots.batch._loop._reader._readings
    slots.batch.cancel(held)
    slots.step()
    assert held.ended
    assert not slots.batch._loop._reader._readings
    while slots.batch.busy:
        slots.step()
    assert slots.ended == [first]
    # Neither where nothing else decodes.
    (alone,) = slots.batch.submit(long, SAMPLING_ALONE, seed=0)
    slots.step()
    assert slots.batch._loop._reader._readings
    slots.batch.cancel(alone)
    slots.step()
    assert not slots.batch._loop._reader._readings
    assert not slots.batch.busy


def test_parameters_may_change_between_two_pieces(model):
    policy, _ = model
    slots, (long, short) = Slots(model), prompts_of(90, 9)
    slots.submit(short)
    held = slots.submit(long)
    slots.step()
    slots.batch.exchange(policy.init(jax.random.key(1)), 1)
    while slots.batch.busy:
        slots.step()
    assert slots.count(held) == 20
    assert slots.tokens[held] != slots.alone(long)
    assert held.request.version == 0


def test_turns_go_on_after_prompts_that_were_read_in_pieces(model):
    policy, params = model
    prompts, found = prompts_of(40, 8), []
    for size in (0, 16):
        engine = engine_of(policy, prefill_chunk_size=size)
        sampling = dataclasses.replace(SAMPLING, max_tokens=20, stop_token_ids=(5, 9, 14))
        with engine.session(params, sampling, jax.random.key(2)) as session:
            for prompt in prompts:
                session.submit(prompt)
            tokens, turns = [], 0
            while session.busy:
                for turn in session.step():
                    tokens.append((turn.sample.index, turn.tokens.tolist()))
                    if turns < 3 and session.room(turn.sample) > 6:
                        turns += 1
                        session.go_on(turn.sample, [7, 8, 11])
                    else:
                        session.end(turn.sample)
        found.append(sorted(tokens))
    assert found[0] == found[1]


def test_the_dry_run_sees_a_piece_and_the_prompt_that_is_read(model):
    policy, _ = model
    whole, pieces = (engine_of(policy, prefill_chunk_size=size) for size in (0, 16))
    assert (whole.prefill_pieces, whole.reading_bytes) == (1, 0)
    assert pieces.prefill_pieces == 6
    assert pieces.reading_bytes == 3 * 128 * pieces.verbs.layout.token_bytes()
    # The last piece of the third is one of 16 tokens, and not the dearest.
    odd = engine_of(policy, prefill_chunk_size=32, max_prompt_length=82)
    even = engine_of(policy, prefill_chunk_size=32, max_prompt_length=97)
    temporary = [
        engine.trace(SAMPLING)["prefill"].lower().compile().memory_analysis().temp_size_in_bytes
        for engine in (whole, pieces, odd, even)
    ]
    assert temporary[1] < temporary[0]
    assert temporary[2] == temporary[3]


@pytest.mark.parametrize("size", [24, 8, -16])
def test_a_piece_is_a_power_of_two(model, size):
    with pytest.raises(ValueError, match=f"prefill_chunk_size is a power of two, .* given {size}"):
        engine_of(model[0], prefill_chunk_size=size)


@pytest.mark.long
@pytest.mark.parametrize("name", ["gemma4_text", "gpt_oss", "llama4_text", "qwen3_moe"])
def test_layers_of_two_kinds_with_sinks_and_in_chunks_are_read_in_pieces_too(name):
    policy, params = drawn_model(name)[:2]
    wanted = sampled(engine_of(policy), params)
    assert_same(sampled(engine_of(policy, prefill_chunk_size=16), params), wanted)
