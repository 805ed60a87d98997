import dataclasses
import types

import jax
import numpy as np
import pytest

from adpo_jax import losses
from adpo_jax.data import arithmetic
from adpo_jax.engine import FinishedGroup
from adpo_jax.engine.sampling import SamplingParams
from adpo_jax.records import Completion, Completions, Prompts, make_batch, token_fields
from adpo_jax.rewards import RewardFunction, RewardModel, good_accuracy
from adpo_jax.rollouts.completing import Answers
from adpo_jax.rollouts.numbering import Numbering
from adpo_jax.rollouts.sampler import (
    Reading,
    Sampler,
    generate_and_grade,
    reward_metrics,
    rollout_metrics,
    sample_records,
    sample_table,
)
from adpo_jax.rollouts.silence import SilenceWatch, silence_preferred_frac

SAMPLING = SamplingParams(n=3, max_tokens=6)
TEXTS = [["#### 4", "#### 5", "no"], ["#### 9", "", "#### 09"]]


class FakeEngine:
    """Says `TEXTS`; its groups finish in reverse order."""

    def generate(self, params, prompts, sampling, key, *, version=0, keys=None, on_group_done=None):
        ids = [arithmetic.make_tokenizer()(texts)["input_ids"] for texts in TEXTS]
        rows = [[np.array([*row, 1][:6]) for row in group] for group in ids]  # 1 is <eos>
        out = Completions(
            [[Completion.sampled(row, row * -0.5, "stop") for row in group] for group in rows]
        )
        for p in (1, 0):
            if on_group_done:
                on_group_done(FinishedGroup(p, out[p]))
        return out


def prompts() -> Prompts:
    return Prompts([[40, 41, 42], [43]], {"solution": ["4", "9"], "question": ["a", "b"]})


def graded(num_workers: int):
    functions = [
        RewardFunction(name="good_accuracy"),
        RewardFunction(
            name="length_penalty", weight=0.5, kwargs={"max_length": 4, "buffer_length": 3}
        ),
    ]
    with RewardModel(functions, num_workers=num_workers) as model:
        return generate_and_grade(
            FakeEngine(),
            None,
            prompts(),
            SAMPLING,
            jax.random.key(0),
            arithmetic.make_tokenizer(),
            model,
        )


def test_every_completion_gets_the_reward_of_its_own_prompt():
    result = graded(num_workers=0)
    assert result.texts == [text for texts in TEXTS for text in texts]
    accuracy = result.scores.components["good_accuracy"].reshape(2, 3)
    np.testing.assert_array_equal(accuracy == 1.0, [[True, False, False], [True, False, True]])
    penalty = result.scores.components["length_penalty"]
    np.testing.assert_allclose(
        result.scores.total, result.scores.components["good_accuracy"] + 0.5 * penalty, atol=1e-6
    )
    assert penalty.min() < 0.0


def test_grading_while_others_decode_gives_the_same_rewards():
    here, workers = graded(num_workers=0), graded(num_workers=2)
    assert here.texts == workers.texts
    np.testing.assert_array_equal(here.scores.total, workers.scores.total)
    assert here.scores.counts == workers.scores.counts


def test_every_iteration_and_attempt_samples_with_a_key_of_its_own():
    sampler = Sampler(None, None, None, None, seed=3, keep_sample=None)
    numbering = Numbering(None, batch_size=4, seed=3, n=2)

    def data(key):
        return tuple(jax.random.key_data(key).tolist())

    places = [(0, None), (1, None), (0, 0), (0, 1), (1, 0)]
    keys = [data(sampler.key(*place)) for place in places]
    assert keys[1] == data(jax.random.fold_in(jax.random.key(3), 1))
    assert len(set(keys)) == len(places)
    ahead = np.concatenate([numbering.keys(number) for number in range(8)])  # of two batches
    assert len({tuple(key) for key in ahead.tolist()}) == 16


def test_reward_metrics_count_groups_and_skip_what_was_not_graded():
    scores = graded(num_workers=0).scores
    components = scores.components | {"half": np.array([1, np.nan, np.nan, 0, np.nan, 1])}
    components |= {"never": np.full(6, np.nan)}
    scores = dataclasses.replace(
        scores, components=components, total=np.array([0, 0, -1, 1, 1, 1], np.float32)
    )
    metrics = reward_metrics(scores, G=3)
    assert metrics["reward/half"] == pytest.approx(2 / 3)
    assert "reward/never" not in metrics
    assert metrics["groups/zero_std_frac"] == 0.5
    assert metrics["groups/all_wrong_frac"] == 0.5
    assert metrics["reward/mean"] == pytest.approx(1 / 3)


def test_a_batch_has_prompts_to_the_left_of_their_completions():
    out = graded(num_workers=0).completions
    batch = make_batch(prompts().token_ids, out.groups, prompt_length=5, completion_length=6)
    np.testing.assert_array_equal(batch.tokens_PGS[0, 1, :5], [0, 0, 40, 41, 42])
    np.testing.assert_array_equal(batch.attention_mask_PGS[1, 2, :5], [0, 0, 0, 0, 1])
    np.testing.assert_array_equal(batch.tokens_PGS[:, :, 5:], out.padded("tokens", 6))
    np.testing.assert_array_equal(batch.completion_mask_PGT, out.padded("present", 6))
    longest = int(out.lengths.max())
    for field, length, text in (
        ("colour", None, "a completion has tokens, .*; given 'colour'"),
        ("present", longest - 1, f"length={longest - 1} is below the longest completion"),
        ("full_log_probs", None, "not all completions have full_log_probs"),
    ):
        with pytest.raises(ValueError, match=text):
            out.padded(field, length)
    ids, sizes = prompts().token_ids, {"prompt_length": 5, "completion_length": 6}
    for given, groups, more, text in (
        (ids, out.groups[:1], {}, "a group of G completions for each"),
        (ids, [*out.groups[:-1], out.groups[-1][:1]], {}, "a group of G completions for each"),
        ([[], *ids[1:]], out.groups, {}, "prompts have 1 to prompt_length=5 tokens; given 0"),
        (ids, out.groups, {"completion_length": longest - 1}, "completions have up to"),
    ):
        with pytest.raises(ValueError, match=text):
            make_batch(given, groups, **sizes | more)
    assert batch.num_completion == 6


def test_a_rectangle_and_back_are_the_same_sequences():
    groups = graded(num_workers=0)
    holes = groups.completions.map(
        lambda c: dataclasses.replace(c, trained=np.arange(len(c)) % 3 != 1)
    )
    batch = make_batch(prompts().token_ids, holes.groups, prompt_length=5, completion_length=6)
    back = batch.sequences()
    assert [list(ids) for ids in back.prompts] == prompts().token_ids
    for group, wanted in zip(back.completions, holes.groups, strict=True):
        for found, completion in zip(group, wanted, strict=True):
            for name in set(token_fields()) - {"full_log_probs"}:
                value = getattr(completion, name)
                np.testing.assert_array_equal(getattr(found, name), value, err_msg=name)


def test_groups_are_selected_and_put_together_field_by_field():
    groups = graded(num_workers=0)
    again = type(groups).concatenate([groups.select([1]), groups.select([0]), groups.select([])])
    assert again.prompts == groups.prompts.select([1, 0])
    assert again.texts == groups.texts[3:] + groups.texts[:3]
    np.testing.assert_array_equal(again.rewards, groups.rewards[[1, 0]])
    assert again.completions.flat == groups.completions[1] + groups.completions[0]
    # Metrics are of the groups that they came with, and of no others.
    counted = dataclasses.replace(groups, metrics={"ahead/waited": 1.0})
    assert counted.select([0, 1]).metrics == {}
    assert type(groups).concatenate([counted]).metrics == {}
    assert type(groups).concatenate([counted, counted]).metrics == {}


def test_answers_put_together_keep_what_was_logged_and_sum_their_counts():
    completions = Completions([[Completion.sampled([2], [-1.0], "stop")]], {"steps": 3})
    one = Answers(Prompts([[1]], {}), completions, ["a"], logged={"env/turns": [2.0]})
    two = dataclasses.replace(one, texts=["b"], logged={"env/turns": [1.0], "env/other": [0.5]})
    both = Answers.concatenate([one, two])
    assert both.texts == ["a", "b"]
    assert both.logged == {"env/turns": [2.0, 1.0], "env/other": [0.5]}
    assert both.completions.stats == {"steps": 6}
    assert Answers.concatenate([one, two], {"steps": 4}).completions.stats == {"steps": 4}


def test_a_group_in_which_saying_nothing_is_the_best_wrong_answer_is_counted_and_told(caplog):
    words = "she sold some of the clips in april and the rest of the clips in may so "
    texts = ["", words, words * 2, words * 3, words * 4, words * 5]
    penalties = np.array([good_accuracy(texts, ["72"] * 6)], np.float32)
    lengths = np.array([[1, 17, 34, 51, 68, 85]])
    target = losses.target_distribution(penalties)[0]
    assert target[0] > 0.3  # this is what is published
    assert target[-1] < 0.1
    assert silence_preferred_frac(penalties, lengths) == 1.0
    assert silence_preferred_frac(penalties, lengths, min_reward_std=0.05) == 0.0
    one_right = penalties.copy()
    one_right[0, 4] = 1.0
    assert silence_preferred_frac(one_right, lengths) == 0.0
    assert silence_preferred_frac(0 * penalties, lengths) == 0.0
    assert silence_preferred_frac(penalties, lengths[:, ::-1]) == 0.0

    groups = types.SimpleNamespace(
        rewards=penalties, completions=types.SimpleNamespace(lengths=lengths)
    )
    watch = SilenceWatch(min_reward_std=0.0, is_off=False)
    with caplog.at_level("WARNING"):
        assert watch.metrics(groups) == {"groups/silence_preferred_frac": 1.0}
        watch.metrics(groups)
    assert caplog.text.count("algorithm.min_reward_std=0.05") == 1
    dropping = SilenceWatch(min_reward_std=0.0, is_off=True)
    assert dropping.metrics(groups) == {"groups/silence_preferred_frac": 0.0}


def test_special_tokens_that_a_reward_needs_stay_in_the_text():
    tokenizer = arithmetic.make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<answer>", "</answer>"]})
    ids = tokenizer("<answer>72</answer>")["input_ids"]
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    completion = Completion.sampled([pad, *ids, eos], np.zeros(len(ids) + 2), "stop")
    assert Reading().texts(tokenizer, [completion]) == ["<answer>72</answer>"]
    assert Reading(skip_special_tokens=True).texts(tokenizer, [completion]) == ["72"]
    (close,) = tokenizer("</answer>")["input_ids"]
    assert Reading(stop_token_ids=(close,)).texts(tokenizer, [completion]) == ["<answer>72"]


def test_truncated_completions_are_not_trained_on_where_asked():
    groups = graded(num_workers=0)
    cut = groups.completions.map(
        lambda c: dataclasses.replace(c, finish_reason="length") if len(c) == 6 else c
    )
    groups = dataclasses.replace(groups, completions=cut)
    whole = [completion.finish_reason == "stop" for completion in cut.flat]
    assert 0 < sum(whole) < len(whole)
    masked = groups.without_truncated()
    assert [bool(c.trained.any()) for c in masked.completions.flat] == whole
    np.testing.assert_array_equal(masked.rewards, groups.rewards)
    assert rollout_metrics(groups)["rollout/masked_frac"] == 0.0
    assert rollout_metrics(masked)["rollout/masked_frac"] == pytest.approx(1.0 - np.mean(whole))


def test_rewards_are_given_the_prompts_and_the_iteration(tmp_path):
    (tmp_path / "r.py").write_text(
        "def f(prompts, completions, completion_ids, trainer_state, question, log_extra):\n"
        "    assert prompts == question and trainer_state.max_steps == 7\n"
        "    log_extra('asked', prompts)\n"
        "    return [len(i) + 100 * trainer_state.global_step for i in completion_ids]\n"
    )
    with RewardModel([RewardFunction(str(tmp_path / "r.py"), "f")]) as model:
        sampler = Sampler(
            FakeEngine(),
            SAMPLING,
            arithmetic.make_tokenizer(),
            model,
            seed=0,
            keep_sample=None,
            reading=Reading(prompt_key="question"),
            num_steps=7,
        )
        result = sampler(2, None, prompts(), None)
    np.testing.assert_array_equal(result.rewards, 200 + result.completions.lengths)
    records = sample_records(["a"] * 3 + ["b"] * 3, result)
    assert [record["extra"] for record in records] == [{"asked": p} for p in "aaabbb"]
    del records[0]["extra"]
    records[1]["turns"] = "many"
    table = sample_table(records)
    (names,) = {tuple(row) for row in table}
    assert {"asked", "turns", *records[0]["components"]} <= set(names)
    assert not {"components", "extra"} & set(names)
    assert (table[0]["asked"], table[1]["asked"], table[1]["turns"]) == ("", "a", "many")
