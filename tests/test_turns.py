"""Samples that are decoded in turns, against samples that are decoded in one go."""

import collections

import jax
import numpy as np
import pytest
import tiny

from adpo_jax import Engine, Policy, SamplingParams

V = 61
STOPS = (3, 7, 11, 20, 33, 40)
SAMPLING = SamplingParams(n=4, max_tokens=40, stop_token_ids=STOPS)
MOST_TURNS = 4


def policy_of(**changes):
    return Policy(tiny.model_config(vocab_size=V, qk_norm=True, **changes))


@pytest.fixture(scope="module")
def model():
    policy = policy_of()
    return policy, policy.init(jax.random.key(0))


def engine_of(policy, **options):
    sizes = {"max_prompt_length": 24, "max_response_length": 40, "num_slots": 8}
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
    for sample, completion in zip(order, wanted.flat, strict=True):
        np.testing.assert_array_equal(turns[sample].tokens, completion.tokens)
        np.testing.assert_allclose(turns[sample].log_probs, completion.log_probs, atol=2e-5)
        assert turns[sample].finish_reason == completion.finish_reason


def test_a_transcript_is_the_same_whatever_the_time_that_tools_take(model):
    policy, params = model
    prompts = prompts_of(5, 12, 9)
    with engine_of(policy).session(params, SAMPLING, jax.random.key(3)) as session:
        one = converse(session, prompts)
    engine = engine_of(policy, num_slots=4, steps_per_dispatch=3)
    with engine.session(params, SAMPLING, jax.random.key(3)) as session:
        other = converse(session, prompts, delay=lambda index, turn: (index * 3 + turn) % 5)
    assert max(script.num_turns for script in one) == MOST_TURNS
    assert_same(one, other)
