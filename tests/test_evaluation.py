import itertools
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from absl import flags
from ml_collections import config_flags
from parsing import parse

from adpo_jax import evaluate as evaluate_module
from adpo_jax.config import default_config
from adpo_jax.data import arithmetic
from adpo_jax.engine.sampling import SamplingParams
from adpo_jax.evaluate import evaluate_model, table
from adpo_jax.policy import Policy
from adpo_jax.records import Completion, Completions, Prompts
from adpo_jax.rollouts.evaluation import (
    EvalSettings,
    bootstrap_interval,
    evaluate,
    majority_at_k,
    pass_at_k,
    sample_scores,
)
from adpo_jax.run import datasets, setup


@pytest.mark.parametrize("n", [1, 3, 6])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample(n):
    for c, k in itertools.product(range(n + 1), range(1, n + 1)):
        samples = [i < c for i in range(n)]
        subsets = list(itertools.combinations(samples, k))
        expected = sum(any(subset) for subset in subsets) / len(subsets)
        assert pass_at_k(np.array([c]), n, k)[0] == pytest.approx(expected)


def test_pass_at_k_stays_exact_for_many_samples():
    # C(1000, 500) has 300 digits; as a product: 1 - (500/1000)(499/999)...
    value = pass_at_k(np.array([500]), 1000, 3)[0]
    assert value == pytest.approx(1 - 500 * 499 * 498 / (1000 * 999 * 998))


MAJORITIES = {
    "two of three right": ([1, 1, 0], ["4", "4.0", "5"], 1.0),
    "the wrong ones agree": ([1, 0, 0], ["4", "5", "5"], 0.0),
    "the wrong ones differ": ([1, 1, 0, 0], ["4", "4", "5", "6"], 1.0),
    "a tie counts as its expectation": ([1, 0], ["4", "5"], 0.5),
    "no answer is no vote": ([1, 0, 0], ["4", None, None], 1.0),
    "the wrong ones agree in other words": (
        [1, 1, 0, 0, 0],
        ["3", "3", "1/2", "0.5", r"\frac{1}{2}"],
        0.0,
    ),
    "no answer at all": ([0, 0], [None, None], 0.0),
}


@pytest.mark.parametrize("case", MAJORITIES)
def test_the_majority_of_all_samples(case):
    right, votes, expected = MAJORITIES[case]
    assert majority_at_k(right, votes, len(votes)) == expected


def test_the_majority_of_fewer_samples_is_the_mean_over_blocks():
    right, votes = [1, 1, 0, 0, 0, 0, 1], ["4", "4", "5", "5", "4x", "7", "4"]
    # Blocks of three: (right, right, 5) and (5, 4x, 7); the seventh is left over.
    assert majority_at_k(right, votes, 3) == 0.5
    assert majority_at_k(right, votes, 1) == 2 / 7 + 1 / 7


def test_the_bootstrap_interval_of_a_mean_agrees_with_the_normal_one():
    values = np.random.default_rng(1).random(400)
    low, high = bootstrap_interval(values[None])
    half = 1.96 * values.std() / 20
    np.testing.assert_allclose([low[0], high[0]], values.mean() + [-half, half], atol=0.003)
    constant = bootstrap_interval(np.ones((1, 5)))
    assert (constant[0][0], constant[1][0]) == (1.0, 1.0)


class Parrot:
    """An engine that greedily says the first of each prompt's lines, and samples all of them."""

    def __init__(self, tokenizer, lines):
        self.tokenizer, self.lines = tokenizer, lines

    def generate(self, params, token_ids, sampling, key, **_):
        def completion(line):
            said = self.tokenizer(line)["input_ids"]
            return Completion.sampled(said, [-1.0] * len(said), "stop")

        lines = self.lines[: len(token_ids)]
        return Completions([[completion(line) for line in of[: sampling.n]] for of in lines])


PROMPTS = Prompts([[1], [2], [3]], {"solution": ["4", "5", "6"], "kind": ["easy", "hard", "hard"]})
LINES = [["#### 4", "#### 4"], ["#### 0", "#### 5"], ["#### 1", "#### 1"]]
SAMPLING = SamplingParams(max_tokens=12)


def test_an_evaluation_scores_greedy_answers_and_samples_by_category():
    tokenizer = arithmetic.make_tokenizer()
    settings = EvalSettings(SAMPLING, num_samples=2, ks=(1, 2), category_key="kind")
    result = evaluate(Parrot(tokenizer, LINES), None, PROMPTS, tokenizer, settings)
    m = result.metrics
    assert m["eval/accuracy"] == pytest.approx(1 / 3)
    assert m["eval/mean@2"] == m["eval/pass@1"] == pytest.approx(3 / 6)
    assert m["eval/pass@2"] == pytest.approx(2 / 3)
    assert m["eval/maj@2"] == pytest.approx((1 + 0.5 + 0) / 3)
    assert m["eval/easy/accuracy"] == 1.0
    assert m["eval/hard/pass@2"] == 0.5
    assert m["eval/hard/num_prompts"] == 2
    assert 0 <= m["eval/accuracy_low"] <= m["eval/accuracy"] <= m["eval/accuracy_high"] <= 1
    named = Prompts(PROMPTS.token_ids, PROMPTS.columns | {"set": ["easy", "C#", "C+"]})
    both = EvalSettings(SAMPLING, num_samples=0, set_key="set", category_key="kind")
    counts = evaluate(Parrot(tokenizer, LINES), None, named, tokenizer, both).metrics
    sizes = {k.split("/")[1]: v for k, v in counts.items() if k.endswith("num_prompts")}
    assert sizes == {"C_": 1, "C__2": 1, "easy": 1, "easy_2": 1, "hard": 2}
    assert len(result.records) == 3 + 6
    assert [r["sampling"] for r in result.records].count("greedy") == 3
    second = result.records[1]
    assert (second["completion"], second["solution"], second["correct"]) == ("#### 0", "5", False)


def test_the_runs_reward_functions_grade_where_asked():
    tokenizer = arithmetic.make_tokenizer()
    overrides = ("--config.custom_reward_function.name=exact_match", "--config.eval.n=0")
    config = parse(*overrides, "--config.eval.graded_by=reward")
    reward_model = setup.make_reward_model(config)
    grader = setup.make_eval_reward_model(config, reward_model)
    assert grader is reward_model
    lines = [["#### 4.0"], ["#### 5"], ["#### 6"]]  # 4.0 is right, and not an exact match
    settings = EvalSettings(SAMPLING)
    result = evaluate(Parrot(tokenizer, lines), None, PROMPTS, tokenizer, settings, grader)
    assert result.metrics["eval/accuracy"] == pytest.approx(2 / 3)
    assert (
        evaluate(Parrot(tokenizer, lines), None, PROMPTS, tokenizer, settings).metrics[
            "eval/accuracy"
        ]
        == 1.0
    )


def test_sampled_scores_lie_between_their_bounds():
    rng = np.random.default_rng(0)
    right = rng.random((20, 6)) < 0.4
    votes = [[str(v) for v in row] for row in rng.integers(0, 3, (20, 6))]
    scores = sample_scores(right, votes, (1, 2, 6))
    assert (scores["pass@1"] <= scores["pass@2"]).all()
    assert (scores["pass@2"] <= scores["pass@6"]).all()
    np.testing.assert_allclose(scores["pass@1"], scores["mean@6"])
    np.testing.assert_allclose(scores["maj@1"], scores["mean@6"])


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (["--config.eval.ks=(4,)"], "eval.n above 0"),
        (["--config.eval.n=2", "--config.eval.ks=(4,)"], "pass@k needs at least k samples"),
        (
            ["--config.eval.n=2", "--config.eval.temperature=0.0"],
            "eval.temperature is at least 0.001",
        ),
        (["--config.eval.graded_by=me"], "one of accuracy, reward; given 'me'"),
    ],
)
def test_an_evaluation_that_cannot_work_is_refused(overrides, text):
    with pytest.raises(ValueError, match=text):
        setup.make_eval_settings(parse(*overrides), (1,))


def test_a_category_that_the_data_lacks_is_refused_with_the_columns_there_are():
    config = parse("--config.eval.category_key=level")
    with pytest.raises(ValueError, match=r"category_key is 'level'; .* 'question'"):
        datasets.load_val_prompts(config, arithmetic.make_tokenizer())


@pytest.fixture
def small_model(tmp_path):
    """A folder with a small model."""
    policy, params = Policy.from_config(
        arithmetic.MODEL_CONFIG | {"hidden_size": 32, "num_hidden_layers": 1}, jax.random.key(9)
    )
    policy.save_pretrained(tmp_path / "model", params, arithmetic.make_tokenizer())
    return tmp_path / "model"


def test_a_model_is_evaluated_alone_and_nothing_is_overwritten(small_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = parse(
        "--config.data.max_val_samples=5",
        "--config.data.max_response_length=6",
        "--config.eval.n=2",
        "--config.mesh.fsdp=1",
        "--config.mesh.data=8",
    )
    metrics = evaluate_model(config, str(small_model))
    again = evaluate_model(config, str(small_model))
    assert metrics == again
    assert "eval/accuracy" in table(metrics)
    rows = (tmp_path / "evaluations" / "0" / "completions.jsonl").read_text().splitlines()
    assert len(rows) == 5 * 3
    written = json.loads((tmp_path / "evaluations" / "1" / "metrics.json").read_text())
    assert written["eval/pass@2"] == metrics["eval/pass@2"]
    with pytest.raises(ValueError, match="is there already; choose another --out"):
        evaluate_model(config, str(small_model), tmp_path / "evaluations" / "1")
    # A folder that cannot be made is told of before anything is sampled, and one is not left empty.
    monkeypatch.setattr("adpo_jax.rollouts.evaluation.evaluate", broken)
    with pytest.raises(ValueError, match=r"^/proc/mine cannot be made: "):
        evaluate_model(config, str(small_model), Path("/proc/mine"))
    with pytest.raises(RuntimeError, match="the device is gone"):
        evaluate_model(config, str(small_model))
    assert sorted(p.name for p in Path("evaluations").iterdir()) == ["0", "1"]


@pytest.mark.parametrize("is_run", [False, True])
def test_a_model_that_is_no_run_is_changed_by_the_override_of_the_config(
    is_run, tmp_path, monkeypatch
):
    given = {"rms_norm_eps": 1e-3}
    (tmp_path / "config.json").write_text('{"actor_rollout_ref": {}}' if is_run else "{}")
    seen = {}
    monkeypatch.setattr("adpo_jax.pretrained.load", lambda name, **kw: seen.update(kw) or broken())
    with pytest.raises(RuntimeError):
        evaluate_model(
            parse(f"--config.actor_rollout_ref.model.override_config={given}"), str(tmp_path)
        )
    assert seen["override_config"] == ({} if is_run else given)


def broken(*_, **__):
    raise RuntimeError("the device is gone")


def test_an_evaluation_does_not_ask_for_the_metric_of_the_best_checkpoint():
    config = default_config()
    config.trainer.best_metric = "eval/pass@4"
    with pytest.raises(ValueError, match="data.val_files is empty: there is nothing to evaluate"):
        evaluate_model(config, "model")
    assert config.trainer.best_metric == "eval/pass@4"


def test_an_evaluation_that_begins_beside_another_takes_the_next_number(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text('{"actor_rollout_ref": {}}')
    (tmp_path / "checkpoints" / "2").mkdir(parents=True)
    make = evaluate_module._make_folder
    assert make(None, tmp_path / "checkpoints" / "2") == tmp_path / "evaluations" / "0"
    monkeypatch.setattr(Path, "glob", lambda *_: [])  # the other has not made its own yet
    assert make(None, tmp_path) == tmp_path / "evaluations" / "1"
    for place, name in (("checkpoints/2", "."), ("checkpoints", "2"), (".", "checkpoints")):
        monkeypatch.chdir(tmp_path / place)
        assert make(None, Path(name)).parent == tmp_path / "evaluations"


@pytest.mark.parametrize("content", ["", "def get_config(: ...", "raise KeyError('lost')"])
@pytest.mark.parametrize("override", [(), ("--config.eval.n=2",)])
def test_a_config_file_that_is_broken_is_a_mistake_in_words(content, override, tmp_path, capsys):
    (tmp_path / "broken.py").write_text(content)
    argv = ["evaluate", "--model=m", f"--config={tmp_path / 'broken.py'}", *override]
    values = flags.FlagValues()
    define = config_flags.DEFINE_config_file
    config = define("config", None, flag_values=values, sys_argv=argv, lock_config=True)
    flags.DEFINE_string("model", None, "", flag_values=values)
    try:
        code = evaluate_module.main(evaluate_module.parse_flags(argv, values), config, "m", None)
    except SystemExit as leaving:
        code = leaving.code
    assert code == 2
    assert capsys.readouterr().err.startswith("error: ")
