"""Rollouts ahead of the update: the schedule, and the samples that go on from one to the next."""

import dataclasses

import jax
import numpy as np
import pytest
import tiny
from parsing import parse

from adpo_jax.config import default_config
from adpo_jax.engine.engine import Engine
from adpo_jax.engine.sampling import SamplingParams
from adpo_jax.engine.session import Turn
from adpo_jax.model.mixture import ROUTED
from adpo_jax.policy import Policy
from adpo_jax.records import Completion, Completions, GradedGroups, Prompts
from adpo_jax.rewards import RewardFunction, RewardModel, Scores
from adpo_jax.rollouts.ahead import Ahead
from adpo_jax.rollouts.filtering import has_spread
from adpo_jax.rollouts.flight import ExpertLimits, Flight, FlyingSample, Limits, age_metrics
from adpo_jax.rollouts.flight_files import FlightFiles
from adpo_jax.rollouts.pacing import Pacing
from adpo_jax.rollouts.sampler import Sampler
from adpo_jax.rollouts.sieve import Sieve
from adpo_jax.rollouts.source import SourceError
from adpo_jax.run import preparation
from adpo_jax.run.folder import RunFolder
from adpo_jax.train import trained_on


@pytest.mark.parametrize(("P", "staleness", "ahead"), [(4, 1, 4), (4, 2, 8), (4, 3, 5), (1, 2, 2)])
def test_every_group_is_trained_once_and_none_is_too_old(P, staleness, ahead):
    steps, rng = 30, np.random.default_rng(P)
    pacing = Pacing(P, staleness, ahead, num_steps=steps)
    left = {n: int(rng.lognormal(2, 1.5)) + 1 for n in range(P * steps)}  # work of each group
    at, trained, waited = {}, [], 0
    following = 0
    for step in range(steps):
        new = pacing.admitted(step, following, len(at))
        following += len(new)
        at |= dict.fromkeys(new, step)
        assert len(at) <= P + ahead
        while True:
            chosen = pacing.chosen(step, at, [n for n in at if left[n] <= 0])
            if chosen is not None:
                break
            waited += 1
            for n in at:
                left[n] -= 1
        assert len(chosen) == P
        for n in chosen:
            assert 0 <= step - at.pop(n) <= staleness
        trained += chosen
    assert sorted(trained) == list(range(P * steps))
    assert trained != sorted(trained) or P == 1
    assert waited


def test_more_groups_ahead_than_the_staleness_allows_are_refused():
    with pytest.raises(ValueError, match="ahead is 0 to max_staleness .* iteration, 8; given 9"):
        Pacing(4, 2, 9, num_steps=25)


@pytest.mark.parametrize(("P", "staleness"), [(4, 1), (2, 1), (2, 2), (6, 1)])
def test_a_run_that_goes_on_with_less_staleness_trains_on_old_groups_first(P, staleness):
    old, at = Pacing(4, 4, 16, num_steps=50), {}
    for step in range(6):
        at |= dict.fromkeys(old.admitted(step, 4 * step + len(at), len(at)), step)
        for n in old.chosen(step, at, sorted(at)[:4]):
            del at[n]
    pacing, following = Pacing(P, staleness, staleness * P, num_steps=50), max(at) + 1
    missing = dict.fromkeys(at, 3)  # steps until a group is whole
    for step in range(6, 30):
        new = pacing.admitted(step, following, len(at))
        following += len(new)
        at |= dict.fromkeys(new, step)
        missing |= {n: 1 + n % 5 for n in new}
        while (chosen := pacing.chosen(step, at, [n for n in at if missing[n] <= 0])) is None:
            assert any(missing[n] > 0 for n in at)
            for n in at:
                missing[n] -= 1
        assert len(chosen) == P
        if min(at[n] for n in at) < step - staleness:
            assert chosen == sorted(at)[:P]
        for n in chosen:
            del at[n]
    assert min(at.values()) >= 29 - staleness


PROMPTS = [[3, 1, 4], [1, 5], [9, 2, 6, 5], [3, 5, 8, 9], [7, 9], [3, 2, 3], [8, 4], [6, 2, 6, 4]]
P, G = 2, 2


@pytest.fixture(scope="module")
def parts():
    policy, params = tiny.policy_and_params()
    engine = Engine(
        policy, max_prompt_length=4, max_response_length=12, num_slots=4, steps_per_dispatch=2
    )
    return policy, params, engine


class Letters:
    """A tokenizer of one letter a token."""

    eos_token_id = bos_token_id = pad_token_id = None

    def batch_decode(self, rows, skip_special_tokens):
        return ["".join(chr(97 + token) for token in row) for row in rows]


def made(engine, folder, tmp_path, sieve=None, all_prompts=PROMPTS, **sampling):
    reward = tmp_path / "reward.py"
    reward.write_text(
        "def letters(completions, solution, log_metric, **columns):\n"
        "    log_metric('graded', 7.0)\n"
        "    same = [int(s) % 3 == 0 for s in solution]\n"
        f"    same = [s and {sieve is not None} for s in same]\n"
        "    return [9.0 if s else len(set(c)) + len(c) / 99 for s, c in zip(same, completions)]"
    )
    sampler = Sampler(
        engine,
        SamplingParams(
            n=G,
            max_tokens=12,
            stop_token_ids=(0, 1, 2, 3),
            top_k=20,
            full_log_probs=True,
            **sampling,
        ),
        Letters(),
        RewardModel([RewardFunction(str(reward), "letters")]),
        seed=0,
        keep_sample=lambda *_: None,
    )

    def prompts_of(batch):
        numbers = range(P * batch, P * batch + P)
        prompts = [all_prompts[number % len(PROMPTS)] for number in numbers]
        return Prompts(prompts, {"solution": list(map(str, numbers))})

    return Ahead(sampler, prompts_of, folder, Pacing(P, 2, 3, num_steps=4), sieve=sieve)


def at_step(params, step):
    """Other weights at each step, which sample with other probabilities."""
    return jax.tree.map(lambda x: x * (1 + 0.05 * step), params)


def test_samples_go_on_under_new_weights_and_a_resumed_run_has_the_same(parts, tmp_path):
    policy, params, engine = parts
    source = made(engine, tmp_path / "in_flight", tmp_path)
    groups = []
    for step in range(4):
        groups.append(source.next(step, at_step(params, step)))
        source.save(step + 1)
    trained = [int(s) for g in groups for s in g.prompts.columns["solution"]]
    assert sorted(trained) == list(range(len(PROMPTS)))
    completions = [c for g in groups for c in g.completions.flat]
    assert any(len(set(c.versions)) > 1 for c in completions)
    assert max(g.metrics["ahead/staleness_max"] for g in groups) > 0
    for step, found in enumerate(groups):
        for c in found.completions.flat:
            assert np.all(np.diff(c.versions) >= 0)
            assert step - 2 <= c.versions[0]
            assert c.versions[-1] <= step
            assert len(c.full_log_probs) == len(c) <= 12

    # The log-probs of each token are those of the weights that drew it.
    for found in groups:
        for ids, group in zip(found.prompts.token_ids, found.completions.groups, strict=True):
            for c in group:
                tokens = np.array([[*ids, *c.tokens]], np.int32)
                for version in set(c.versions.tolist()):
                    wanted = log_probs(policy, at_step(params, version), tokens)[0, len(ids) :]
                    drawn = c.versions == version
                    np.testing.assert_allclose(c.full_log_probs[drawn], wanted[drawn], atol=2e-5)

    for stop in (1, 3):
        resumed = made(engine, tmp_path / "in_flight", tmp_path)
        resumed.check(stop)
        resumed.restore(stop)
        for step in range(stop, 4):
            again = resumed.next(step, at_step(params, step))
            assert again.texts == groups[step].texts
            for one, other in zip(again.completions.flat, groups[step].completions.flat):
                for name, value in dataclasses.asdict(one).items():
                    np.testing.assert_array_equal(value, getattr(other, name), err_msg=name)


def test_groups_without_a_spread_are_replaced_ahead_too(parts, tmp_path, monkeypatch):
    _, params, engine = parts
    judged, graded = {}, Sampler.graded  # tokens of each group

    def counted(self, step, answers):
        numbers = answers.prompts.columns["solution"]
        judged.update(zip(numbers, answers.completions.lengths.sum(axis=1)))
        return graded(self, step, answers)

    monkeypatch.setattr(Sampler, "graded", counted)

    def spread(rewards):
        return has_spread(rewards, 0.0)

    source = made(engine, tmp_path / "in_flight", tmp_path, Sieve(spread, most_dropped=6))
    groups = []
    for step in range(4):
        groups.append(source.next(step, at_step(params, step)))
        source.save(step + 1)
    trained = [int(s) for g in groups for s in g.prompts.columns["solution"]]
    assert len(set(trained)) == len(trained) == 4 * P
    assert not [number for number in trained if number % 3 == 0]
    assert sum(g.metrics["filter/dropped_frac"] for g in groups) > 0
    # What is counted and logged is of all that was graded, not of what was chosen alone.
    assert {g.metrics["reward/letters/graded"] for g in groups} == {7.0}
    assert groups[0].metrics["reward/unparsed_frac"] == 0
    assert all(g.seconds[1] > 0 for g in groups)
    assert all(g.metrics["filter/fillers"] == 0 for g in groups)
    assert groups[-1].metrics["ahead/in_flight"] == 0
    # What was sampled is counted in its iteration, trained on or not.
    sampled = sum(g.metrics["rollout/tokens_per_s"] * g.seconds[0] for g in groups)
    assert sampled == pytest.approx(sum(judged.values()))
    assert len(judged) > len(trained)
    resumed = made(engine, tmp_path / "in_flight", tmp_path, Sieve(spread, most_dropped=6))
    resumed.restore(2)
    for step in (2, 3):
        again = resumed.next(step, at_step(params, step))
        assert again.texts == groups[step].texts
        np.testing.assert_array_equal(again.rewards, groups[step].rewards)
        names = ("filter/attempts", "filter/dropped_frac", "filter/carried", "ahead/in_flight")
        assert [again.metrics[n] for n in names] == [groups[step].metrics[n] for n in names]
    # After so many have been dropped, those without a spread fill the batch.
    none = Sieve(lambda rewards: np.zeros(len(rewards), bool), most_dropped=2)
    filled = made(engine, tmp_path / "none", tmp_path, none).next(0, params)
    assert filled.metrics["filter/fillers"] == P
    assert filled.metrics["filter/dropped_frac"] * filled.metrics["filter/attempts"] * P == 2


@pytest.mark.parametrize("has", [True, False])
def test_a_whole_group_that_waits_is_graded_once(parts, tmp_path, monkeypatch, has):
    policy, params, _ = parts
    lengths = {"max_prompt_length": 4, "max_response_length": 12}
    engine = Engine(policy, num_slots=10, steps_per_dispatch=6, **lengths)
    graded, looked_at = Sampler.graded, []

    def counted(self, step, answers):
        looked_at.extend(answers.prompts.columns["solution"])
        return graded(self, step, answers)

    monkeypatch.setattr(Sampler, "graded", counted)
    sieve = Sieve(lambda rewards: np.full(len(rewards), has), most_dropped=1)
    source = made(engine, tmp_path / "in_flight", tmp_path, sieve)
    found = [source.next(step, at_step(params, step)).metrics for step in range(4)]
    assert any(metrics["filter/carried"] for metrics in found)
    assert len(looked_at) == len(set(looked_at))
    attempts, dropped, left = (
        [metrics[f"filter/{name}"] for metrics in found]
        for name in ("attempts", "dropped_frac", "carried")
    )
    # Those that waited are looked at again, as a resumed run does that has to grade them again.
    assert sum(attempts) * P - sum(left[:-1]) == len(looked_at)
    dropped = sum(share * count * P for share, count in zip(dropped, attempts))
    assert dropped == pytest.approx(0 if has else len(looked_at) - 4 * P - left[-1])


MIXTURE = tiny.CONFIG | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 16,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
}


def test_samples_that_go_on_keep_the_experts_that_each_token_went_through(tmp_path):
    policy, params = Policy.from_config(MIXTURE, jax.random.key(0))
    engine = Engine(
        policy, max_prompt_length=4, max_response_length=12, num_slots=4, steps_per_dispatch=2
    )
    asked = {"routed_experts": True, "prompt_experts": True}
    source = made(engine, tmp_path / "in_flight", tmp_path, **asked)
    groups = []
    for step in range(3):
        groups.append(source.next(step, at_step(params, step)))
        source.save(step + 1)
    resumed = made(engine, tmp_path / "in_flight", tmp_path, **asked)
    resumed.restore(2)
    again = resumed.next(2, at_step(params, 2))
    for one, other in zip(again.completions.flat, groups[2].completions.flat, strict=True):
        np.testing.assert_array_equal(one.experts, other.experts)
        np.testing.assert_array_equal(one.prompt_experts, other.prompt_experts)

    sizes = np.array([len(set(c.versions)) for group in groups for c in group.completions.flat])
    assert sizes.max() > 1  # some went on under other weights
    for found in groups:
        prompts = np.repeat(np.arange(len(found.prompts)), G)
        for p, c in zip(prompts, found.completions.flat, strict=True):
            prompt = found.prompts.token_ids[p]
            end = len(prompt) + len(c)
            tokens = np.array([[*prompt, *c.tokens, *[0] * (16 - end)]])
            positions = np.arange(16)[None]
            assert len(c.prompt_experts) == len(prompt) - 1
            for version in set(c.versions):
                extras = policy(at_step(params, version), tokens, positions)[2]
                wanted = np.moveaxis(np.asarray(extras[ROUTED])[:, 0], 0, 1)
                wanted = wanted[len(prompt) - 1 : end - 1]
                mine = c.versions == version
                np.testing.assert_array_equal(
                    np.sort(c.experts[mine], -1), np.sort(wanted[mine], -1)
                )


def log_probs(policy, params, tokens):
    """[1, S], of each token; that of the first is 0."""
    mask = np.ones_like(tokens)
    return np.asarray(policy.log_probs(params, tokens, mask))


def test_a_run_that_does_not_take_up_what_was_left_says_so(tmp_path):
    """Else its prompts would be trained on twice or never."""
    folder, config = RunFolder(tmp_path), default_config()
    for states in (folder.in_flight, folder.surplus):
        states.mkdir()
    (folder.in_flight / "000002.0.of1.npz").touch()
    (folder.surplus / "000003.json").touch()

    def check(step, **changes):
        changed = config.copy_and_resolve_references()
        changed.update_from_flattened_dict(changes)
        preparation._check_that_nothing_is_left(changed, folder, step)

    staleness, filtering = "actor_rollout_ref.rollout.max_staleness", "algorithm.filter_groups"
    with pytest.raises(SourceError, match=rf"{staleness}=0 goes on from iteration 2 without"):
        check(2)
    with pytest.raises(SourceError, match=rf"{filtering}=False goes on from iteration 3 without"):
        check(3, **{staleness: 1})
    check(2, **{staleness: 1})
    check(3, **{filtering: True})
    check(4)


def test_the_ages_are_of_the_tokens_that_are_trained_on_where_what_was_cut_off_is_not():
    old, new = (
        Completion.sampled([4] * length, np.zeros(length), reason, version=version)
        for length, reason, version in ((3, "length", 0), (1, "stop", 2))
    )
    scores = Scores.unknown(2, [])
    groups = GradedGroups(Prompts([[1]], {}), Completions([[old, new]]), ["a", "b"], scores)
    groups = dataclasses.replace(groups, metrics={"ahead/waited": 1.0} | age_metrics(groups, 2))
    assert groups.metrics["ahead/lag_2_frac"] == 0.75
    config = parse()
    assert trained_on(config, groups, 2) is groups
    config = parse("--config.data.mask_truncated_completions=true")
    found = trained_on(config, groups, 2).metrics
    assert found == {
        "ahead/waited": 1.0,
        "ahead/staleness_mean": 0.0,
        "ahead/staleness_max": 0.0,
        "ahead/lag_0_frac": 1.0,
    }
    on_the_spot = dataclasses.replace(groups, metrics={"filter/attempts": 1.0})
    assert trained_on(config, on_the_spot, 2).metrics == {"filter/attempts": 1.0}


def test_what_is_missing_or_damaged_in_flight_is_told(parts, tmp_path):
    source = made(parts[2], tmp_path / "in_flight", tmp_path)
    with pytest.raises(SourceError, match="max_staleness: .*000002.* is missing, in which iter"):
        source.check(2)
    source.save(0)
    [path] = (tmp_path / "in_flight").iterdir()
    path.rename(path.with_name(path.name.replace("000000", "000002")))
    made(parts[2], tmp_path / "in_flight", tmp_path).check(2)
    for content in (b"", b"PK\x03\x04 no such thing", path.name.encode() * 100):
        path.with_name(path.name.replace("000000", "000002")).write_bytes(content)
        with pytest.raises(SourceError, match="is damaged"):
            made(parts[2], tmp_path / "in_flight", tmp_path).check(2)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"n": 4}, "a group has 2 samples in place of 4"),
        ({"n": 1}, "a group has 2 samples in place of 1"),
        ({"max_tokens": 5}, "a sample has 6 tokens of at most 5"),
        ({"vocab_size": 5}, r"a sample has token ids outside \[0, 5\)"),
        ({"full_log_probs": True}, "a sample has log-probs of a sampler that does not truncate"),
        ({"converses": True}, "a sample has no environment"),
        ({"experts": ExpertLimits((3, 2), 6, np.uint8)}, "a sample has no experts"),
    ],
)
def test_samples_in_flight_of_a_run_with_other_limits_are_not_called_damaged(change, why, tmp_path):
    limits = Limits(n=2, max_tokens=8, vocab_size=10)
    sample = FlyingSample.empty().sampled(Turn(None, np.arange(6), np.zeros(6), None, None), 0)
    flight = Flight({5: (sample, sample)}, {5: 2}, {5: 0}, 6)
    FlightFiles(tmp_path, limits).save(3, flight)
    assert FlightFiles(tmp_path, limits).load(3).next_number == 6
    with pytest.raises(SourceError, match=f"cannot go on with: {why}") as error:
        FlightFiles(tmp_path, dataclasses.replace(limits, **change)).load(3)
    assert "algorithm.num_generations, data.max_response_length" in str(error.value)
    assert "damaged" not in str(error.value)


def test_samples_in_flight_do_not_go_on_behind_other_prompts(parts, tmp_path):
    _, params, engine = parts
    folder = tmp_path / "in_flight"
    source = made(engine, folder, tmp_path)
    source.next(0, params)
    source.save(1)
    made(engine, folder, tmp_path).check(1)
    other = made(engine, folder, tmp_path, all_prompts=PROMPTS[::-1])
    with pytest.raises(SourceError, match=r"000001.* of other prompts .*groups \[.*data.shuf"):
        other.check(1)
    # Earlier versions wrote files that name no prompts.
    [path] = folder.iterdir()
    arrays = dict(np.load(path))
    with path.open("wb") as file:
        np.savez(file, **{name: array for name, array in arrays.items() if name != "prompts"})
    other.check(1)
    for wrong in (arrays["prompts"][:-1], arrays["prompts"][:, :3], np.zeros(())):
        with path.open("wb") as file:
            np.savez(file, **arrays | {"prompts": wrong})
        with pytest.raises(SourceError, match="is damaged"):
            made(engine, folder, tmp_path).check(1)
