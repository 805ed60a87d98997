"""Dynamic sampling, with a sampler whose rewards are given."""

import dataclasses
import types

import numpy as np
import pytest

from adpo_jax.records import Completion, Completions, GradedGroups, Prompts
from adpo_jax.rewards import Scores
from adpo_jax.rollouts.elsewhere import FilteredBatches
from adpo_jax.rollouts.filtering import GroupFilter
from adpo_jax.rollouts.sampler import reward_metrics
from adpo_jax.rollouts.source import SourceError

P, G, T = 3, 2, 4


def prompts_of(number):
    """Batch `number`: prompts P * number and on."""
    names = list(range(P * number, P * number + P))
    return Prompts([[name + 1] for name in names], {"question": [str(name) for name in names]})


class Sampler:
    """Prompts in `useful` have one right completion, all others none.

    Args:
      metrics: of each call, in turn.
    """

    def __init__(self, useful, metrics=()):
        self.useful, self.calls, self.metrics = useful, [], metrics

    def __call__(self, step, attempt, prompts, params):
        metrics = self.metrics[len(self.calls)] if self.metrics else {}
        self.calls.append((step, attempt))
        names = [ids[0] - 1 for ids in prompts.token_ids]
        rewards = np.array([[float(name in self.useful), 0.0] for name in names], np.float32)
        out = Completions(
            [
                [Completion.sampled([name + 1] * T, [-0.5] * T, "stop", version=step)] * G
                for name in names
            ],
            {"preempted": 5},
        )
        texts = [f"{name}.{g}" for name in names for g in range(G)]
        counts = {"timeouts": 1, "crashes": 2, "unparsed": 3, "grader_faults": 4}
        scores = Scores(rewards.reshape(-1), {"right": rewards.reshape(-1)}, counts)
        return GradedGroups(prompts, out, texts, scores, (1.0, 0.5), metrics)


def made(folder, useful, max_attempts=4, metrics=(), of=prompts_of, **kwargs):
    sampler = Sampler(useful, metrics)
    rules = {"num_generations": G, "max_attempts": max_attempts} | kwargs
    return GroupFilter(sampler, of, folder, **rules), sampler


def questions(groups):
    return [int(question) for question in groups.prompts.columns["question"]]


def test_groups_without_spread_are_replaced_and_the_surplus_comes_first_next_time(tmp_path):
    filtered, sampler = made(tmp_path, useful={1, 3, 4, 5, 7, 8, 9, 11})
    graded = filtered.next(0, None)
    assert questions(graded) == [1, 3, 4]
    assert graded.texts == ["1.0", "1.1", "3.0", "3.1", "4.0", "4.1"]
    assert [group[0].tokens[0] for group in graded.completions.groups] == [2, 4, 5]
    np.testing.assert_array_equal(graded.scores.components["right"], [1, 0] * 3)
    assert graded.seconds == (2.0, 1.0)
    assert graded.metrics == {
        # Of both batches, as the seconds are.
        "reward/timeouts": 2.0,
        "reward/crashes": 4.0,
        "reward/unparsed_frac": 6 / (2 * P * G),
        "reward/grader_faults": 8.0,
        "rollout/tokens_per_s": 2 * P * G * T / 2.0,
        "rollout/preempted": 10.0,
        "filter/attempts": 2.0,
        "filter/dropped_frac": 2 / 6,
        "filter/fillers": 0.0,
        "filter/carried": 1.0,
        "filter/sampled_reward": pytest.approx(4 / 12),
    }
    assert "reward/unparsed_frac" not in reward_metrics(graded.scores, G)  # of these: unknown
    carried = filtered.next(1, None)
    assert questions(carried) == [5, 7, 8]
    # The group that waited was drawn by the weights of the iteration before.
    assert [group[0].versions[0] for group in carried.completions.groups] == [0, 1, 1]
    assert sampler.calls == [(0, 0), (0, 1), (1, 0)]


def test_what_comes_with_each_batch_is_summed_where_it_is_a_count_or_seconds(tmp_path):
    names = ("ahead/waited", "samplers/taken_back", "samplers/doubles", "samplers/connected")
    each = [dict(zip(names, values)) for values in ((1.5, 2.0, 0.0, 3.0), (0.25, 1.0, 1.0, 4.0))]
    filtered, _ = made(tmp_path, useful={1, 3, 4, 5}, metrics=each)
    found = filtered.next(0, None).metrics
    assert found["filter/attempts"] == 2
    assert [found[name] for name in names] == [1.75, 3.0, 1.0, 4.0]


def test_the_age_of_groups_from_samplers_elsewhere_is_of_what_is_trained_on(tmp_path):
    batches = types.SimpleNamespace(sample=Sampler({1, 3, 4, 5, 7, 8}))
    filtered = FilteredBatches(batches, prompts_of, tmp_path, num_generations=G, max_attempts=4)
    assert filtered.next(0, None).metrics["ahead/staleness_max"] == 0
    carried = filtered.next(1, None)
    assert questions(carried) == [5, 7, 8]
    assert carried.metrics["ahead/staleness_max"] == 1
    assert carried.metrics["ahead/staleness_mean"] == pytest.approx(1 / 3)
    assert carried.metrics["ahead/lag_1_frac"] == pytest.approx(1 / 3)


def test_after_the_last_attempt_groups_without_spread_fill_the_batch(tmp_path):
    filtered, sampler = made(tmp_path, useful={4}, max_attempts=2)
    graded = filtered.next(0, None)
    assert questions(graded) == [4, 0, 1]
    np.testing.assert_array_equal(graded.completions.lengths, np.full((P, G), T))
    assert graded.metrics["filter/fillers"] == 2.0
    assert graded.metrics["filter/carried"] == 0.0
    assert graded.metrics["filter/attempts"] == 2.0
    assert questions(filtered.next(1, None)) == [6, 7, 8]
    assert len(sampler.calls) == 4


def test_a_resumed_run_goes_on_with_the_same_groups(tmp_path):
    useful = set(range(0, 60, 4)) | set(range(1, 60, 4))
    whole, _ = made(tmp_path / "whole", useful)
    expected = [questions(whole.next(step, None)) for step in range(6)]
    first, _ = made(tmp_path / "run", useful)
    for step in range(3):
        first.next(step, None)
    first.save(3)
    first.next(3, None)  # lost with the process
    second, sampler = made(tmp_path / "run", useful)
    second.restore(3)
    assert [questions(second.next(step, None)) for step in range(3, 6)] == expected[3:]
    assert sampler.calls[0] == (3, 0)
    (tmp_path / "run" / ".DS_Store").touch()  # what a file browser leaves
    second.save(6, kept=[4])
    (tmp_path / "run" / ".DS_Store").unlink()
    assert {path.name[:6] for path in (tmp_path / "run").iterdir()} == {"000006"}
    lost, _ = made(tmp_path / "run", useful)
    with pytest.raises(ValueError, match="is missing, in which iteration 2 left its surplus"):
        lost.restore(2)
    (tmp_path / "run" / "000002.json").write_text("{")
    with pytest.raises(ValueError, match="is no JSON"):
        lost.restore(2)
    fresh, _ = made(tmp_path / "fresh", useful)
    fresh.check(-1)  # in the supervised stage nothing has been kept yet


def test_groups_that_are_left_over_from_others_are_refused(tmp_path):
    first, _ = made(tmp_path, useful={1, 3, 4, 5})
    first.next(0, None)
    first.save(1)
    made(tmp_path, useful=())[0].check(1)
    with pytest.raises(SourceError, match=r"have 2 completions each, and .*num_generations is 4"):
        made(tmp_path, useful=(), num_generations=4)[0].check(1)
    with pytest.raises(SourceError, match="of a sampler that does not truncate; set .*top_k"):
        made(tmp_path, useful=(), full_log_probs=True)[0].check(1)

    def with_level(number):
        prompts = prompts_of(number)
        columns = prompts.columns | {"level": prompts.columns["question"]}
        return dataclasses.replace(prompts, columns=columns)

    with pytest.raises(SourceError, match="columns question, and the data has level, question"):
        made(tmp_path, useful=(), of=with_level)[0].check(1)


def test_a_kill_while_the_state_is_written_again_leaves_the_earlier_one(tmp_path, monkeypatch):
    def half(path, text):
        path.write_bytes(text.encode()[:3])
        raise KeyboardInterrupt

    filtered, _ = made(tmp_path, useful=set(range(30)))
    filtered.next(0, None)
    filtered.save(1)
    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.write_text", half)
        with pytest.raises(KeyboardInterrupt):
            filtered.save(1)
    again, _ = made(tmp_path, useful=set(range(30)))
    again.restore(1)
    again.save(1)
    assert {path.name for path in tmp_path.glob("*.json*")} == {"000001.json"}


def test_the_surplus_of_the_checkpoints_that_are_kept_stays_and_no_other(tmp_path):
    filtered, _ = made(tmp_path, useful=set(range(60)))
    # The best checkpoint is 2; that of the step before is still being written at each save.
    for step, kept in enumerate([(), (), (1, 2), (2, 3), (2, 4)]):
        filtered.next(step, None)
        filtered.save(step + 1, kept=kept)
    left = {path.name for path in tmp_path.glob("*.json")}
    assert left == {"000002.json", "000004.json", "000005.json"}
    again, _ = made(tmp_path, useful=set())
    again.restore(2)


def test_a_spread_below_min_reward_std_is_none(tmp_path):
    filtered, _ = made(tmp_path, useful=set(range(9)), max_attempts=1, min_reward_std=0.8)
    assert filtered.next(0, None).metrics["filter/fillers"] == 3.0  # the standard deviation is 0.71
    just = float(np.array([1, 0], np.float32).std(ddof=1))
    filtered, _ = made(tmp_path, useful=set(range(9)), max_attempts=1, min_reward_std=just)
    assert filtered.next(0, None).metrics["filter/fillers"] == 0.0
