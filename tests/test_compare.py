"""What scripts/compare.py makes of runs that are there."""

import dataclasses
import json
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from test_report import make_run

from adpo_jax.devices import sharding
from adpo_jax.log.metrics import read_jsonl
from adpo_jax.report.runs import Run
from adpo_jax.run import setup
from adpo_jax.run.config_checks import finalized
from adpo_jax.run.folder import RunFolder
from adpo_jax.run.guard import TrainingStopped

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "scripts" / "compare.py"
CONFIGS = str(ROOT / "configs" / "{}.py")


@pytest.fixture(scope="module")
def compare():
    return runpy.run_path(str(SCRIPT))


def test_overrides_are_read_as_python_where_they_are(compare):
    found = compare["overrides"](["algorithm.tau=0.2", "eval.ks=(1, 2)", "data.val_files=x.jsonl"])
    assert found == {"algorithm.tau": 0.2, "eval.ks": (1, 2), "data.val_files": "x.jsonl"}
    with pytest.raises(ValueError, match="wanted KEY=VALUE"):
        compare["overrides"](["tau"])
    with pytest.raises(ValueError, match=r"did you mean algorithm\.tau"):
        compare["overrides"](["algorithm.tauu=0.2"])


def test_a_common_start_that_is_stopped_ends_the_comparison_in_words(
    compare, tmp_path, monkeypatch, capsys
):
    def stopped(*_):
        raise TrainingStopped("the loss of 5 steps is no number")

    monkeypatch.setitem(compare["compare"].__globals__, "common_start", stopped)
    argv = ["--config", CONFIGS.format("arithmetic"), "--out", str(tmp_path), "--seeds", "3"]
    assert compare["main"]([*argv, "--methods", "adpo"]) == 2
    assert "the loss of 5 steps is no number" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["adpo", "adpo-fixed", "grpo", "rloo"])
def test_every_method_is_a_config_that_works(compare, method):
    config = compare["read_config"]("configs/arithmetic.py", compare["METHODS"][method])
    assert finalized(config).algorithm.adv_estimator == method.split("-")[0]


def test_methods_are_compared_seed_by_seed(compare, tmp_path):
    runs = {
        name: [Run.read(make_run(tmp_path / f"{name}/seed{s}", seed=s, steps=n)) for s in (0, 1)]
        for name, n in (("a", 9), ("b", 12))
    }
    measured = compare["measures"](runs["b"][0])
    assert measured["final accuracy"] == 0.75
    assert measured["iterations to reward 0.8"] == 10  # the mean of 0.6 to 1.0
    lines = compare["table"](runs).splitlines()
    assert lines[2].startswith("| a | 2 | 0.755 ± 0.0635 |")
    assert "never |" in lines[2]
    assert lines[4].startswith("| b less a | 2 | 0 ± 0 | 0.25 ± ")
    assert lines[4].endswith(" 150 ± 0 |")


def test_runs_without_evaluations_are_compared_by_what_they_have(compare, tmp_path):
    found = Run.read(make_run(tmp_path / "a/seed0", seed=0))
    rows = [{k: v for k, v in row.items() if "eval/" not in k} for row in found.rows]
    header = compare["table"]({"a": [dataclasses.replace(found, rows=rows)]}).splitlines()[0]
    assert "reward" in header
    assert "accuracy" not in header


@pytest.mark.parametrize(
    "name", ["arithmetic", "gsm8k", "gsm8k_grpo", "math_level3", "smollm2", "smollm2_gsm8k"]
)
def test_a_start_can_be_made_under_every_config(compare, name):
    changes = {"sft.train_files": "embedded:arithmetic", "sft.steps": 3}
    config = compare["start_config"](CONFIGS.format(name), changes, 7)
    finalized(config)
    assert (config.sft.steps, config.trainer.seed) == (3, 7)
    optim = config.actor_rollout_ref.actor.optim
    assert setup.make_optimizer(config, 1)[1](0) == optim.lr == 0.0


def test_without_a_supervised_stage_the_model_itself_is_the_start(compare, tmp_path):
    assert compare["common_start"](CONFIGS.format("gsm8k"), tmp_path / "start", {}, 0) == {}
    assert not (tmp_path / "start").exists()


def test_what_all_methods_have_in_common_is_not_set_for_one(compare):
    check = compare["check_comparable"]
    check({"sft.steps": 3}, {"a": {"algorithm.tau": 0.2}})
    with pytest.raises(ValueError, match=r"--variant a sft.steps: .* start alike"):
        check({}, {"a": {"sft.steps": 3}})
    with pytest.raises(ValueError, match="are those of --seeds"):
        check({"trainer.seed": 3}, {"a": {}})
    with pytest.raises(ValueError, match="nothing to compare"):
        check({}, {})


@pytest.mark.parametrize(
    ("flags", "twice"),
    [
        (["--seeds", "0", "1", "0"], "--seeds: 0"),
        (["--variant", "grpo", "algorithm.tau=9"], "--variant: grpo"),
        (["--variant", "a", "algorithm.tau=9", "--variant", "a", "algorithm.tau=2"], "a is given"),
    ],
)
def test_what_would_hide_another_run_is_refused(compare, tmp_path, flags, twice):
    a = compare["arguments"](["--out", str(tmp_path / "out"), "--methods", "grpo", *flags])
    with pytest.raises(ValueError, match=twice):
        compare["compare"](a)
    assert not (tmp_path / "out").exists()


def test_a_short_run_has_no_mean_of_five_iterations(compare, tmp_path):
    path = make_run(tmp_path / "a/seed0", seed=0, steps=4)
    found = Run.read(path)
    rows = [row | {"reward/mean": 1.0} if "reward/mean" in row else row for row in found.rows]
    measured = compare["measures"](dataclasses.replace(found, rows=rows))
    assert np.isnan(measured["iterations to reward 0.8"])


def claimed(folder, config):
    """A folder with a finished run of this config."""
    claimed = RunFolder(folder)
    claimed.claim(finalized(config))
    claimed.release()
    (folder / "export").mkdir()


def test_a_run_or_start_of_other_settings_is_refused(compare, tmp_path):
    read, path = compare["read_config"], CONFIGS.format("arithmetic")
    claimed(tmp_path / "run", read(path, {}))
    compare["run"](read(path, {}), tmp_path / "run")  # finished: nothing is done
    for key, value in {"algorithm.tau": 0.4, "actor_rollout_ref.actor.optim.lr": 1e-5}.items():
        with pytest.raises(ValueError, match=rf"other settings(?s:.*){key}: .* -> {value}"):
            compare["run"](read(path, {key: value}), tmp_path / "run")
    claimed(tmp_path / "start" / "seed7", compare["start_config"](path, {}, 7))
    # What the supervised stage does not depend on may differ.
    start = compare["common_start"](path, tmp_path / "start", {"algorithm.tau": 0.4}, 7)
    assert start["actor_rollout_ref.model.path"] == str(tmp_path / "start" / "seed7" / "export")
    with pytest.raises(ValueError, match=r"other settings(?s:.*)sft.steps: 450 -> 3"):
        compare["common_start"](path, tmp_path / "start", {"sft.steps": 3}, 7)


@pytest.mark.slow
def test_methods_start_from_the_same_weights_and_see_the_same_prompts(
    compare, tmp_path, monkeypatch, capsys
):
    make_mesh = sharding.make_mesh
    one = {"devices": jax.devices()[:1]}
    monkeypatch.setattr(setup.sharding, "make_mesh", lambda **sizes: make_mesh(**(sizes | one)))
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "head_dim": 8}
    tiny = {
        "actor_rollout_ref.model.hf_config": small,
        "sft.steps": 2,
        "sft.batch_size": 8,
        "sft.train_max_samples": 64,
        "sft.lr_warmup_steps": 0,
        "data.train_max_samples": 64,
        "data.train_batch_size": 8,
        "data.max_response_length": 6,
        "data.max_val_samples": 8,
        "algorithm.num_generations": 2,
        "trainer.total_training_steps": 2,
        "trainer.log_samples_freq": 1,
    }
    argv = ["--config", CONFIGS.format("arithmetic"), "--out", str(tmp_path), "--seeds", "3"]
    argv += ["--methods", "adpo", "rloo", "--set", *(f"{k}={v}" for k, v in tiny.items())]
    assert compare["main"](argv) == 0, capsys.readouterr().err
    assert "| rloo less adpo | 1 |" in (tmp_path / "comparison.md").read_text()
    assert (tmp_path / "report.html").exists()
    rows = read_jsonl(tmp_path / "start/seed3/metrics.jsonl")
    assert max(row.get("sft/step", 0) for row in rows) == 2  # what is common reaches the start
    first = {}
    for method in ("adpo", "rloo"):
        found = Run.read(tmp_path / method / "seed3")
        assert found.series(compare["START_KL"])[1] == pytest.approx(0.0, abs=1e-4)
        assert np.isfinite(found.series(compare["START_KL"])[2])
        first[method] = (found.folder / "samples" / "train_000001.jsonl").read_text()
    assert first["adpo"] == first["rloo"]

    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if "seed3" in p.parts}
    assert compare["main"](argv) == 0
    assert compare["main"]([*argv, "algorithm.num_generations=4"]) == 2
    assert "num_generations: 2 -> 4" in capsys.readouterr().err
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if "seed3" in p.parts} == before


def test_a_run_that_is_stopped_is_left_out_and_costs_no_other(
    compare, tmp_path, monkeypatch, capsys
):
    def run(config, folder):
        if "hot" in folder.parts and config.trainer.seed == 1:
            raise TrainingStopped("the update of iteration 3 is not sound")
        make_run(folder, seed=config.trainer.seed)

    names = compare["compare"].__globals__
    monkeypatch.setitem(names, "common_start", lambda *_: {})
    monkeypatch.setitem(names, "run", run)
    monkeypatch.setattr("adpo_jax.devices.compilation_cache.use", lambda folder: None)
    argv = ["--config", CONFIGS.format("arithmetic"), "--out", str(tmp_path), "--seeds", "0", "1"]
    argv += ["--methods", "grpo", "--variant", "hot", "actor_rollout_ref.actor.optim.lr=1e30"]
    assert compare["main"](argv) == 0
    assert "seed1 is left out: the update of iteration 3" in capsys.readouterr().err
    lines = (tmp_path / "comparison.md").read_text().splitlines()
    assert [line[:9] for line in lines[2:]] == ["| grpo | ", "| hot | 1"]


# --- the whole family


@pytest.fixture(scope="module")
def family():
    sys.path.insert(0, str(SCRIPT.parent))
    try:
        yield runpy.run_path(str(SCRIPT.parent / "compare_family.py"))
    finally:
        sys.path.remove(str(SCRIPT.parent))


@pytest.mark.parametrize("task", ["arithmetic", "word_problems"])
def test_every_method_runs_under_every_condition_and_setting_of_the_search(family, task, tmp_path):
    task = family["TASKS"][task]
    assert not set(task.seeds) & set(task.search_seeds)
    assert task.search_seeds or all(len(grid) == 1 for grid in task.grids.values())
    searched_under = family["Family"](tmp_path, task).searched_under
    for method in family["METHOD_NAMES"]:
        for name, condition in family["CONDITIONS"].items():
            settings = task.grids[searched_under(name)][-1]
            changes = task.common | family["_cut"](task) | family["METHODS"][method] | settings
            changes |= condition(task)
            config = finalized(family["read_config"](task.config, changes))
            assert config.actor_rollout_ref.actor.optim.lr == settings[family["LR"]]


def test_a_known_share_of_verdicts_is_flipped_and_the_same_ones_again(family):
    path, name = (family["FLIPPED"][f"custom_reward_function.{key}"] for key in ("path", "name"))
    flipped = runpy.run_path(path)[name]
    texts, solutions = ["#### 4", "#### 5"] * 2000, ["4"] * 4000
    right = np.array([1.0, 0.0] * 2000)
    np.testing.assert_array_equal(flipped(texts, solutions, rate=0.0), right)
    np.testing.assert_array_equal(flipped(texts, solutions, rate=1.0), 1 - right)
    found = np.array(flipped(texts, solutions, rate=0.2))
    np.testing.assert_array_equal(flipped(texts, solutions, rate=0.2), found)
    for wrong in (found != right)[::2], (found != right)[1::2]:  # each of equal texts for itself
        assert wrong.mean() == pytest.approx(0.2, abs=0.03)


def test_the_table_of_a_condition_marks_what_seeds_do_not_explain(family, tmp_path):
    def row(final, collapsed=False):
        return {"final": final, "reward": 0.5, "kl": 1.0, "entropy": 0.1, "collapsed": collapsed}

    tried = [
        {"lr": 1e-3, "clip": 1.0, "reward": 0.4},
        {"lr": 5e-4, "clip": 0, "reward": 0.6},
    ]
    ours = {"adpo": {"0": row(0.9), "1": row(0.92)}}
    runs = ours | {"grpo": {"0": row(0.5), "1": row(0.521, True)}, "rloo": {"0": row(0.9)}}
    search = {"1 update": dict.fromkeys(runs, tried), "4 updates, own rate": {"adpo": tried[:1]}}
    found = {"search": search, "runs": {"1 update": runs, "4 updates, own rate": ours}}
    _, _, adpo, grpo, rloo = family["table"](found, "1 update").splitlines()
    assert adpo.startswith("| adpo | 0.0005, none | 0.91 ± 0.127 |  |")
    assert "| **-0.4 ± 0.00635** |" in grpo
    assert grpo.endswith("| 1 of 2 |")
    assert "| 0 |" in rloo  # one seed: nothing is marked
    assert "| adpo | 0.001, 1.0 |" in family["table"](found, "4 updates, own rate")
    alone = found | {"search": {"4 updates, own rate": search["4 updates, own rate"]}}
    assert "| adpo | 0.001, 1.0 |" in family["table"](alone, "4 updates, own rate")
    search = family["table_of_search"](search["1 update"]).splitlines()
    assert search[0] == "| method | 0.001, 1.0 | 0.0005, none |"
    assert search[2] == "| adpo | 0.400 | **0.600** |"
    (tmp_path / "family.json").write_text(json.dumps(found))
    family["write_tables"](tmp_path / "family.json")
    assert (tmp_path / "family_accuracy.png").stat().st_size > 10_000


def test_a_method_whose_seeds_are_not_all_done_is_in_no_table(family, monkeypatch, tmp_path):
    row = {"final": 0.9, "reward": 0.5, "kl": 1.0, "entropy": 0.1, "collapsed": False}
    task = family["TASKS"]["word_problems"]
    done = [("1 update", "adpo", seed, tmp_path) for seed in task.seeds]
    under_way = [("1 update", "grpo", 0, tmp_path), ("4 updates", "adpo", 0, tmp_path)]
    names = family["results"].__globals__
    monkeypatch.setitem(
        names, "Run", SimpleNamespace(read=lambda _: SimpleNamespace(environment={}))
    )
    monkeypatch.setitem(names, "result", lambda run: row)
    monkeypatch.setattr(family["Family"], "finished", lambda self: iter(done + under_way))
    found = family["results"](family["Family"](tmp_path, task, "model"))
    assert {name: list(runs) for name, runs in found["runs"].items()} == {"1 update": ["adpo"]}
    assert "model" not in found["common"].values()
    old = {"0": row | {"final": 0.1}}
    earlier = {
        "search": {"4 updates": {"lpo": [1]}},
        "runs": {"4 updates": {"lpo": old}, "1 update": {"lpo": old, "adpo": old}},
    }
    nothing = tmp_path / "kept.json"
    nothing.write_text(json.dumps(earlier))
    with monkeypatch.context() as empty:
        empty.setattr(family["Family"], "finished", lambda self: iter(under_way))
        assert family["main"](["--out", str(tmp_path), "--results", str(nothing)]) == 2
    assert json.loads(nothing.read_text()) == earlier
    merged = family["merged"](earlier, found)
    assert merged["search"] == found["search"] | earlier["search"]
    ours = found["runs"]["1 update"]
    assert merged["runs"] == {"1 update": ours | {"lpo": old}, "4 updates": {"lpo": old}}
    assert list(merged["runs"]) == ["1 update", "4 updates"]
    (tmp_path / "words.json").write_text(json.dumps(found))
    family["write_tables"](tmp_path / "words.json")
    assert (tmp_path / "words_accuracy.png").exists()
