"""Samples that are decoded in turns, against samples that are decoded in one go."""

import collections
import dataclasses

import jax
import numpy as np
import pytest
import tiny

from adpo_jax import Engine, Policy, SamplingParams
from adpo_jax.devices.sharding import make_mesh
from adpo_jax.engine import past, tuning

V = 61
STOPS = (3, 7, 11, 20, 33, 40)
SAMPLING = SamplingParams(n=4, max_tokens=32, stop_token_ids=STOPS)
MOST_TURNS = 4


def policy_of(**changes):
    return Policy(tiny.model_config(vocab_size=V, qk_norm=True, **changes))


@pytest.fixture(scope="module")
def model():
    policy = policy_of()
    return policy, policy.init(jax.random.key(0))


def engine_of(policy, **options):
    sizes = {"max_prompt_length": 24, "max_response_length": 32, "num_slots": 8}
    return Engine(policy, **{**sizes, "steps_per_dispatch": 5, **options})


def prompts_of(*lengths):
    rng = np.random.default_rng(1)
    return [rng.integers(0, V, length).tolist() for length in lengths]


def answer_of(request, index, turn) -> list[int]:
    """What the tool of a sample says after a turn; its length differs from turn to turn."""
    rng = np.random.default_rng([len(request.prompt), index, turn])
    return rng.integers(0, V, 1 + (3 * index + 2 * turn + len(request.prompt)) % 7).tolist()


class Transcript:
    """The turns of one sample."""

    def __init__(self):
        self.tokens, self.log_probs, self.num_turns, self.reason = [], [], 0, None


def converse(session, prompts, *, delay=lambda index, turn: 0):
    """Runs scripted conversations to their end; a tool's answer comes `delay` steps later."""
    found = collections.defaultdict(Transcript)
    order = [s for p in prompts for s in session.submit(p).samples]
    due, step = [], 0
    while session.busy:
        turns = session.step()
        step += 1
        for turn in turns:
            script = found[turn.sample]
            script.tokens += turn.tokens.tolist()
            script.log_probs += turn.log_probs.tolist()
            script.num_turns, script.reason = script.num_turns + 1, turn.finish_reason
            request, index = turn.sample.request, turn.sample.index
            answer = answer_of(request, index, script.num_turns)
            room = session.room(turn.sample)
            over = turn.finish_reason == "length" or script.num_turns == MOST_TURNS
            if over or room <= len(answer):
                session.end(turn.sample)
            else:
                script.tokens += answer
                script.log_probs += [0.0] * len(answer)
                due.append((step + delay(index, script.num_turns), turn.sample, answer))
        for entry in [entry for entry in due if entry[0] <= step or not session.num_decoding]:
            due.remove(entry)
            session.go_on(entry[1], entry[2])
    return [found[sample] for sample in order]


def assert_same(some, others):
    for one, other in zip(some, others, strict=True):
        assert (one.tokens, one.num_turns, one.reason) == (
            other.tokens,
            other.num_turns,
            other.reason,
        )
        np.testing.assert_allclose(one.log_probs, other.log_probs, atol=2e-5)


@pytest.fixture(scope="module")
def little(model):
    """An engine whose memory holds a past row a slot and no more."""
    engine = engine_of(model[0])
    engine.plan = dataclasses.replace(engine.plan, most_tokens=900)
    return engine


def late(index, turn):
    return (index * 3 + turn) % 5


def test_a_session_of_single_turns_gives_what_generate_gives(model):
    policy, params = model
    engine, prompts = engine_of(policy), prompts_of(5, 12, 5)
    prompts[2] = prompts[0]
    wanted = engine.generate(params, prompts, SAMPLING, jax.random.key(3))
    with engine.session(params, SAMPLING, jax.random.key(3)) as session:
        order = [s for p in prompts for s in session.submit(p).samples]
        turns = {}
        while session.busy:
            for turn in session.step():
                turns[turn.sample] = turn
                session.end(turn.sample)
        assert session.step() == []
        assert session._loop.sizes.past_rows == 0
    for sample, completion in zip(order, wanted.flat, strict=True):
        np.testing.assert_array_equal(turns[sample].tokens, completion.tokens)
        np.testing.assert_allclose(turns[sample].log_probs, completion.log_probs, atol=2e-5)
        assert turns[sample].finish_reason == completion.finish_reason


def test_turns_that_are_kept_say_what_turns_that_are_prefilled_again_say(model, little):
    policy, params = model
    prompts, key = prompts_of(5, 12, 9, 7, 3), jax.random.key(3)
    with engine_of(policy).session(params, SAMPLING, key, keeps_turns=False) as session:
        again = converse(session, prompts)
        prefilled_again = session.stats["prefill_tokens"]
    with little.session(params, SAMPLING, key) as session:
        kept = converse(session, prompts, delay=late)
        assert session.stats["evicted"] > 0
        assert session.stats["prefill_tokens"] < prefilled_again
    assert max(script.num_turns for script in again) == MOST_TURNS
    assert_same(again, kept)


def test_samples_that_were_interrupted_go_on_in_another_session(model, little):
    _, params = model
    prompts, key = prompts_of(5, 12), jax.random.key(4)
    sampling = dataclasses.replace(SAMPLING, stop_token_ids=STOPS[:2])
    wanted = little.generate(params, prompts, sampling, key)
    session = little.session(params, sampling, key)
    requests = [session.submit(p) for p in prompts]
    found = {}
    for _ in range(2):
        for turn in session.step():
            found[turn.sample.request, turn.sample.index] = turn.tokens
            session.end(turn.sample)
    left = session.leave()
    assert len(left) + len(found) == 8
    assert any(len(turn.tokens) for turn in left)
    with little.session(params, sampling, jax.random.key(9)) as session:
        for request in requests:
            turns = [turn for turn in left if turn.sample.request is request]
            keys = request.key_data[[turn.sample.index for turn in turns]]
            new = session.submit(request.prompt, [t.tokens for t in turns], keys=keys)
            for turn, sample in zip(turns, new.samples, strict=True):
                found[sample] = turn
        while session.busy:
            for turn in session.step():
                old = found.pop(turn.sample)
                place = old.sample.request, old.sample.index
                found[place] = np.concatenate([old.tokens, turn.tokens])
                session.end(turn.sample)
    for request, group in zip(requests, wanted.groups, strict=True):
        for index, completion in enumerate(group):
            np.testing.assert_array_equal(found[request, index], completion.tokens)


def test_samples_that_have_unlike_lengths_go_on_together(model, little, monkeypatch):
    _, params = model
    prompts, key = prompts_of(5, 12), jax.random.key(4)
    sampling = dataclasses.replace(SAMPLING, stop_token_ids=())
    wanted = little.generate(params, prompts, sampling, key)
    session = little.session(params, sampling, key)
    keys = [session.submit(p).key_data for p in prompts]
    session.leave()
    lengths, prefill = set(), past._prefill_alike

    def noted(*args):
        lengths.add(args[5])
        return prefill(*args)

    monkeypatch.setattr(past, "_prefill_alike", noted)
    with little.session(params, sampling, jax.random.key(9)) as session:
        for prompt, group, of_group in zip(prompts, wanted.groups, keys, strict=True):
            begun = [c.tokens[:count] for c, count in zip(group, (1, 3, 18, 31), strict=True)]
            session.submit(prompt, begun, keys=of_group)
        found = [turn for _ in range(20) for turn in session.step()]
    assert lengths == {16, 64}
    for turn in found:
        group = wanted.groups[[len(p) for p in prompts].index(len(turn.sample.request.prompt))]
        tokens = group[turn.sample.index].tokens
        np.testing.assert_array_equal(turn.tokens, tokens[len(tokens) - len(turn.tokens) :])
    assert len(found) == 8


def whole_forward(policy, params, prompt, tokens):
    """The log-probs [T] of a completion, of one forward of the whole sequence."""
    row = np.zeros((1, 64), np.int32)
    row[0, : len(prompt) + len(tokens)] = [*prompt, *tokens]
    mask = (np.arange(64) < len(prompt) + len(tokens)).astype(np.int32)[None]
    log_probs = jax.nn.log_softmax(jax.jit(policy.logits)(params, row, mask)[0])
    at = len(prompt) - 1 + np.arange(len(tokens))
    return np.asarray(log_probs)[at, tokens]


VARIANTS = {
    "windows on a mesh": (
        {"windows": (6, None), "attention_soft_cap": 20.0, "attention_sinks": True},
        {},
        1e-4,
    ),
    "int8": ({}, {"cache_dtype": np.int8}, 0.15),
}


@pytest.mark.parametrize(
    "name", ["windows on a mesh", pytest.param("int8", marks=pytest.mark.long)]
)
def test_log_probs_over_turns_are_those_of_one_forward(name, monkeypatch):
    changes, options, tolerance = VARIANTS[name]
    policy, mesh = policy_of(**changes), None
    if name == "windows on a mesh":
        monkeypatch.setattr(tuning, "MAX_UNROLLED_ON_CPU", 0)
        mesh = make_mesh(data=2, fsdp=1, tensor=1, devices=jax.devices()[:2])
    params, prompts = policy.init(jax.random.key(0)), prompts_of(5, 12)
    engine = engine_of(dataclasses.replace(policy, mesh=mesh), **options)
    assert assert_turns_agree(engine, policy, params, prompts, tolerance) >= 3


def assert_turns_agree(engine, policy, params, prompts, tolerance) -> int:
    """Log-probs over turns are those of one forward; returns the most turns of a sample."""
    with engine.session(params, SAMPLING, jax.random.key(5)) as session:
        scripts = converse(session, prompts, delay=late)
    for place, script in enumerate(scripts):
        wanted = whole_forward(policy, params, prompts[place // 4], script.tokens)
        sampled = np.array(script.log_probs) != 0
        found = np.array(script.log_probs)[sampled]
        np.testing.assert_allclose(found, wanted[sampled], atol=tolerance)
    return max(script.num_turns for script in scripts)


def test_what_a_session_cannot_do_is_refused_in_one_sentence(model):
    policy, params = model
    with pytest.raises(ValueError, match="max_tokens is 33, above"):
        engine_of(policy).session(params, SamplingParams(max_tokens=33), jax.random.key(0))
    with engine_of(policy).session(params, SAMPLING, jax.random.key(0)) as session:
        with pytest.raises(ValueError, match="of 1 to 4 samples .n.; given 5"):
            session.submit([1], [[]] * 5)
        with pytest.raises(ValueError, match="outside .0, 61.: 61 to 61"):
            session.submit([1], [[61]])
        with pytest.raises(ValueError, match="has room for 32 tokens of max_tokens 32"):
            session.submit([1], [[5] * 32])
        sample = session.submit([1]).samples[0]
        with pytest.raises(ValueError, match="turn of the sample has not ended"):
            session.go_on(sample, [1])
    with pytest.raises(ValueError, match="has ended, or belongs to another"):
        session.end(sample)
