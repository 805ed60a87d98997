"""The whole road on a policy so small that only the wiring is tested."""

import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from parsing import parse
from test_metrics import StandIn, check_documented

import adpo_jax
from adpo_jax.log.metrics import read_jsonl
from adpo_jax.policy import Policy
from adpo_jax.rewards import RewardError
from adpo_jax.run import setup
from adpo_jax.run.folder import NAMES

TINY = (
    "--config.actor_rollout_ref.model.hf_config="
    "{'hidden_size': 16, 'intermediate_size': 32, 'num_hidden_layers': 1, 'head_dim': 8}",
    "--config.sft.steps=2",
    "--config.sft.lr_warmup_steps=0",
    "--config.sft.batch_size=8",
    "--config.sft.train_max_samples=256",
    "--config.data.train_batch_size=8",
    "--config.data.train_max_samples=256",
    "--config.data.max_response_length=6",
    "--config.data.max_val_samples=8",
    "--config.algorithm.num_generations=2",
    "--config.trainer.total_training_steps=4",
    "--config.trainer.save_freq=2",
    "--config.trainer.test_freq=2",
    "--config.trainer.log_samples_freq=2",
    "--config.actor_rollout_ref.actor.optim.lr_warmup_steps=0",
)

REWARD = """
from pathlib import Path

def even_length(completions, solution, *, bonus=0.0, **columns):
    if Path(__file__).with_name("broken").exists() and seen(completions):
        raise RuntimeError("the disk is gone")
    texts = [completion[0]["content"] for completion in completions]
    return [bonus + (len(text) % 2 == 0) for text in texts]

CALLS = []

def seen(completions):
    CALLS.append(len(completions))
    return len(CALLS) == 3
"""


def on_one_device(config):
    """The parts of a run on one of the eight devices."""
    return setup.build(config, jax.devices()[:1])


def train(config, workdir, **options):
    """As `adpo_jax.train`, on one device."""
    return adpo_jax.train(config, workdir, **{"build": on_one_device} | options)


@pytest.fixture
def reward_file(tmp_path):
    path = tmp_path / "reward.py"
    path.write_text(REWARD)
    return path


def with_reward(path):
    return (
        f"--config.custom_reward_function.path={path}",
        "--config.custom_reward_function.name=even_length",
    )


# The metrics that depend on the clock begin so.
TIMED = (
    "time",
    "memory/",
    "rollout/tokens_per_s",
    "update/tokens_per_s",
    "tools/seconds",
    "ahead/waited",
)


def scalars(folder):
    """The metrics of a run without what depends on the clock."""
    return [
        {k: v for k, v in row.items() if not k.startswith(TIMED)}
        for row in read_jsonl(folder / "metrics.jsonl")
        if "sft/step" not in row
    ]


def events(trace):
    """The names of all that a trace holds."""
    planes = jax.profiler.ProfileData.from_file(str(trace)).planes
    return {event.name for plane in planes for line in plane.lines for event in line.events}


def test_a_run_leaves_metrics_samples_checkpoints_events_and_a_loadable_export(tmp_path):
    # The last iteration of the trace is not reached.
    profiled = ("--config.eval.n=2", "--config.trainer.profile_steps=(3, 9)")
    config = parse(*TINY, *profiled)
    seen = []

    def callback(iteration):
        seen.append(iteration)
        return {"mine/right": float((iteration.groups.rewards > 0).sum())}

    last = train(config, tmp_path / "run", callbacks=[callback])
    folder = tmp_path / "run"
    assert [iteration.step for iteration in seen] == [1, 2, 3, 4]
    assert [len(iteration.groups) for iteration in seen] == [8] * 4
    versions = [int(i.groups.completions.flat[0].versions[0]) for i in seen]
    assert versions == [0, 1, 2, 3]
    rows = scalars(folder)
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    assert last["eval/accuracy"] == rows[-1]["eval/accuracy"]
    assert ["eval/accuracy" in row for row in rows] == [True, False, True, False, True]
    written = {name for row in read_jsonl(folder / "metrics.jsonl") for name in row}
    own = {"step", "time", "mine/right"}
    assert own <= written
    check_documented(written - own, {"always", "adpo", "evaluation", "samples"})
    (trace,) = (folder / "profile").rglob("*.xplane.pb")
    assert {"rollout", "reward", "anchor", "update", "eval"} <= events(trace)
    assert rows[1]["adpo/loss"] == pytest.approx(np.log(2), rel=1e-5)
    assert rows[1]["rollout/mismatch_kl"] < 1e-6
    assert 1.0 <= rows[1]["rollout/mismatch_ratio_max"] < 1.001
    assert {p.name for p in folder.iterdir()} == {
        "config.json", "metrics.jsonl", "tensorboard", "checkpoints", "samples", "export",
        "environment.json", "profile", "first_checkpoint.json",
    }  # fmt: skip
    assert {p.name for p in folder.iterdir()} <= set(NAMES)
    assert {p.name for p in (folder / "checkpoints").iterdir()} == {"0", "2", "4"}
    assert json.loads((folder / "config.json").read_text())["algorithm"]["tau"] == 0.8
    samples = (folder / "samples" / "train_000002.jsonl").read_text().splitlines()
    assert len(samples) == 16
    assert set(json.loads(samples[0])) == {
        "prompt",
        "completion",
        "reward",
        "components",
        "num_tokens",
    }
    policy, params = Policy.from_pretrained(folder / "export")
    assert policy.config.hidden_size == 16
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(params))


RETURNED = {
    "step": (
        {"mine": 1.0, "step": 3},
        "lengths returns a metric called step, .* call it mine/step",
    ),
    "time": ({"time": 0.5}, "a metric called time"),
    "sft/step": ({"sft/step": 0.5}, "a metric called sft/step, .* call it mine/step"),
    "no dict": ([1.0], "lengths returns a dict of numbers by name, or None; it returned"),
    "a text": ({"mine": "long"}, "a dict of numbers by name"),
}


@pytest.mark.parametrize("case", RETURNED)
def test_what_a_callback_may_not_return_is_refused_and_leaves_the_metrics_alone(case):
    returned, words = RETURNED[case]

    def lengths(iteration):
        return returned

    metrics = {"reward/mean": 0.5}
    with pytest.raises(ValueError, match=words):
        adpo_jax.train._call([lengths], 1, None, None, metrics)
    assert metrics == {"reward/mean": 0.5}


def test_a_run_that_broke_off_goes_on_as_if_nothing_had_happened(tmp_path, reward_file):
    config = parse(*TINY, *with_reward(reward_file))
    profiled = parse(*TINY, *with_reward(reward_file), "--config.trainer.profile_steps=(3, 4)")
    train(config, tmp_path / "whole")
    (tmp_path / "broken").touch()
    with pytest.raises(RewardError, match="the disk is gone"):
        train(profiled, tmp_path / "run")
    assert (tmp_path / "run" / "samples" / "reward_error_000003.jsonl").exists()
    assert "rollout" in events(next((tmp_path / "run" / "profile").rglob("*.xplane.pb")))
    (tmp_path / "broken").unlink()
    train(config, tmp_path / "run")
    assert scalars(tmp_path / "run") == scalars(tmp_path / "whole")
    weights = [tmp_path / name / "export" / "model.safetensors" for name in ("run", "whole")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def children() -> set[str]:
    """The processes that threads of this one have started."""
    of_threads = Path("/proc/self/task").glob("*/children")
    return {child for path in of_threads for child in path.read_text().split()}


def test_a_folder_with_another_config_or_other_files_is_refused(tmp_path, reward_file, monkeypatch):
    short = (*TINY, "--config.trainer.total_training_steps=1", "--config.sft.steps=0")
    tracker = StandIn()
    monkeypatch.setitem(sys.modules, "mlflow", tracker)
    workers = (*with_reward(reward_file), "--config.custom_reward_function.num_workers=2")
    tracked = parse(*short, *workers, "--config.trainer.logger=('mlflow',)")
    running = children()
    create_run, tracker.create_run = tracker.create_run, unreachable
    with pytest.raises(ValueError, match="mlflow, which cannot be started: ConnectionError"):
        train(tracked, tmp_path / "run")
    assert children() <= running
    # Nobody holds the folder then, and what fails later ends nothing.
    tracker.create_run, tracker.log_batch = create_run, unreachable
    train(tracked, tmp_path / "run")
    assert scalars(tmp_path / "run")[-1]["tracker/failures"] == 1
    before = sorted(p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*"))
    with pytest.raises(ValueError, match=r"algorithm.tau: 0.8 -> 0.5"):
        train(parse(*short, *workers, "--config.algorithm.tau=0.5"), tmp_path / "run")
    assert sorted(p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*")) == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("all my work")
    with pytest.raises(ValueError, match="is not empty and holds no run"):
        train(parse(*short), tmp_path / "other")


def unreachable(*_, **__):
    raise ConnectionError("no route to the host")


VARIANTS = {
    "grpo": ("--config.algorithm.adv_estimator=grpo",),
    "rloo": ("--config.algorithm.adv_estimator=rloo",),
    "filter_groups": ("--config.algorithm.filter_groups=true",),
    "mini-batches, epochs and an ema anchor": (
        "--config.actor_rollout_ref.actor.ppo_mini_batch_size=4",
        "--config.actor_rollout_ref.actor.ppo_epochs=2",
        "--config.trainer.per_device_train_batch_size=4",
        "--config.anchor.mode=ema",
    ),
    "bfloat16, checkpointed": (
        "--config.trainer.bf16=true",
        "--config.trainer.gradient_checkpointing=true",
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_train(tmp_path, variant):
    config = parse(
        *TINY,
        *VARIANTS[variant],
        "--config.trainer.total_training_steps=2",
        "--config.sft.steps=0",
    )
    train(config, tmp_path)
    losses = [v for row in scalars(tmp_path) for k, v in row.items() if k.endswith("/loss")]
    assert len(losses) == 2
    assert all(np.isfinite(losses))


def test_eight_devices_train_like_one(tmp_path, reward_file):
    overrides = (*TINY, *with_reward(reward_file), "--config.trainer.total_training_steps=2")
    adpo_jax.train(parse(*overrides, "--config.mesh.tensor=2"), tmp_path / "eight")
    train(parse(*overrides, "--config.mesh.tensor=1"), tmp_path / "one")
    for eight, one in zip(scalars(tmp_path / "eight"), scalars(tmp_path / "one"), strict=True):
        for row in (eight, one):
            row.pop("update/padding_frac", None)  # four streams are padded to the longest
        assert eight == pytest.approx(one, rel=1e-4, abs=1e-5)


def test_reward_kwargs_and_other_columns_reach_the_function(tmp_path, reward_file):
    config = parse(
        *TINY,
        *with_reward(reward_file),
        "--config.reward_model.reward_kwargs={'bonus': 10.0}",
        "--config.trainer.total_training_steps=1",
        "--config.sft.steps=0",
    )
    train(config, tmp_path / "run")
    assert scalars(tmp_path / "run")[-1]["reward/mean"] >= 10.0


@pytest.mark.torch
def test_transformers_loads_the_export_of_a_run_and_gives_the_same_logits(tmp_path):
    torch = pytest.importorskip("torch", reason="the extra [torch] is not installed")
    from transformers import AutoModelForCausalLM

    short = ("--config.trainer.total_training_steps=1", "--config.sft.steps=1")
    train(parse(*TINY, *short), tmp_path / "run")
    export = tmp_path / "run" / "export"
    theirs = AutoModelForCausalLM.from_pretrained(export, dtype=torch.float32).eval()
    policy, params = Policy.from_pretrained(export)
    tokens = np.random.default_rng(0).integers(0, policy.config.vocab_size, (2, 12))
    with torch.no_grad():
        expected = theirs(torch.from_numpy(tokens)).logits.numpy()
    np.testing.assert_allclose(policy.logits(params, tokens), expected, atol=1e-4)
