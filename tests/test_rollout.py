import dataclasses

import jax
import numpy as np
import pytest

from adpo_jax import arithmetic
from adpo_jax.engine import GroupOutput, RolloutOutput
from adpo_jax.rewards import RewardFunction, RewardModel
from adpo_jax.rollout import Prompts, generate_and_grade, make_batch, reward_metrics
from adpo_jax.sampling import SamplingParams

SAMPLING = SamplingParams(n=3, max_tokens=6)
TEXTS = [["#### 4", "#### 5", "no"], ["#### 9", "", "#### 09"]]


class FakeEngine:
    """Says `TEXTS`; its groups finish in reverse order."""

    def generate(self, params, prompts, sampling, key, *, on_group_done=None):
        ids = [arithmetic.make_tokenizer()(texts)["input_ids"] for texts in TEXTS]
        tokens = np.zeros((2, 3, 6), np.int32)
        mask = np.zeros_like(tokens)
        for p, g in np.ndindex(2, 3):
            row = [*ids[p][g], 1][:6]  # 1 is <eos>
            tokens[p, g, : len(row)], mask[p, g, : len(row)] = row, 1
        out = RolloutOutput(
            tokens, mask, mask.sum(-1), mask * -0.5, np.full((2, 3), "stop"), None, {}
        )
        for p in (1, 0):
            if on_group_done:
                fields = {f.name for f in dataclasses.fields(GroupOutput)} - {"prompt_index"}
                values = {name: getattr(out, name) for name in fields}
                group = {name: v if v is None else v[p] for name, v in values.items()}
                on_group_done(GroupOutput(prompt_index=p, **group))
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
    assert result.completions == [text for texts in TEXTS for text in texts]
    accuracy = result.scores.components["good_accuracy"].reshape(2, 3)
    np.testing.assert_array_equal(accuracy == 1.0, [[True, False, False], [True, False, True]])
    penalty = result.scores.components["length_penalty"]
    np.testing.assert_allclose(
        result.scores.total, result.scores.components["good_accuracy"] + 0.5 * penalty, atol=1e-6
    )
    assert penalty.min() < 0.0


def test_grading_while_others_decode_gives_the_same_rewards():
    here, workers = graded(num_workers=0), graded(num_workers=2)
    assert here.completions == workers.completions
    np.testing.assert_array_equal(here.scores.total, workers.scores.total)
    assert here.scores.counts == workers.scores.counts


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
    out = graded(num_workers=0).out
    batch = make_batch(prompts(), out, max_prompt_length=5)
    np.testing.assert_array_equal(batch.tokens_PGS[0, 1, :5], [0, 0, 40, 41, 42])
    np.testing.assert_array_equal(batch.attention_mask_PGS[1, 2, :5], [0, 0, 0, 0, 1])
    np.testing.assert_array_equal(batch.tokens_PGS[:, :, 5:], out.tokens * out.mask)
    np.testing.assert_array_equal(batch.completion_mask_PGT, out.mask)
    assert batch.num_completion == 6
