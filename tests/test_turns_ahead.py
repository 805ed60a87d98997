"""Conversations with environments that go on from one iteration to the next."""

import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
from test_config import parse
from test_environments import TINY, on_one_device, shortened
from test_resume import assert_same

import adpo_jax
import adpo_jax.rollouts.conversations as conversations_lib
from adpo_jax.environments.calls import Call
from adpo_jax.log.metrics import read_jsonl

# Its answers depend on all calls before, its luck on its seed, and its time on nothing.
ENVIRONMENT = """
import random
import time

class Sum:
    def reset(self, **row):
        self.total, self.calls = random.randrange(10), 0
        return f" Begin at {len(row['question']) % 7}."

    def add(self, number: int) -> str:
        \"\"\"Adds.

        Args:
            number: What to add.
        \"\"\"
        time.sleep(time.time_ns() % 5 / 100)
        self.total += number + random.randrange(10)
        self.calls += 1
        return f"{self.total} after {self.calls}"

    def get_reward(self) -> float:
        time.sleep(time.time_ns() % 3 / 100)
        return float(self.total)
"""
REWARD = """
def spread(completions, environments, **columns):
    return [len(set(str(e.total))) + e.calls / 9 for e in environments]
"""
AHEAD = (
    "--config.environment.name=Sum",
    "--config.environment.num_workers=2",
    "--config.environment.max_turns=5",
    "--config.environment.overlap_steps=3",
    "--config.actor_rollout_ref.rollout.max_staleness=2",
    "--config.actor_rollout_ref.rollout.num_slots=4",
    "--config.algorithm.filter_groups=true",
    "--config.anchor.mode=sampler",
    "--config.data.train_max_samples=64",
    "--config.data.max_response_length=64",
    "--config.trainer.total_training_steps=4",
    "--config.custom_reward_function.name=spread",
)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Trains in a folder, in turns: all turns but those of even length end with a call."""

    def calls_of(form, text, names):
        return [Call("add", {"number": len(text)})] if len(text) % 4 else []

    monkeypatch.setattr(conversations_lib.calls_lib, "calls_in", calls_of)
    for name, content in (("sum.py", ENVIRONMENT), ("reward.py", REWARD)):
        (tmp_path / name).write_text(content)
    files = (
        f"--config.environment.path={tmp_path / 'sum.py'}",
        f"--config.custom_reward_function.path={tmp_path / 'reward.py'}",
    )
    config = parse(*TINY, *files, *AHEAD, name="calculator")
    stops = tuple(range(150, 200))

    def trained(name, changed=config):
        build = lambda config: shortened(on_one_device(config), stops)  # noqa: E731
        adpo_jax.train(changed, tmp_path / name, build=build)
        return tmp_path / name

    return trained


def test_conversations_go_on_under_new_weights_and_a_resumed_run_has_the_same_bits(
    run, tmp_path, caplog
):
    whole = run("whole")
    rows = [row for row in read_jsonl(whole / "metrics.jsonl") if "ahead/staleness_max" in row]
    assert max(row["ahead/staleness_max"] for row in rows) > 0
    assert max(row["rollout/turns"] for row in rows) > 2
    assert any(row["filter/dropped_frac"] for row in rows)

    # Tokens of tools stand between turns, some of which went on under new weights.
    spanning = 0
    for path in sorted((whole / "rollouts").iterdir()):
        for record in pq.read_table(path).to_pylist():
            trained, turns = np.array(record["trained"]), np.array(record["turns"])
            assert (np.diff(turns) >= 0).all()
            assert trained[[0, -1]].all()
            assert turns[trained].max() == turns.max()
            assert not np.array(record["log_probs"])[~trained].any()
            spanning += len(set(record["versions"])) > 1 and not trained.all()
    assert spanning

    again = tmp_path / "again"
    shutil.copytree(whole, again)
    for later in ("export", "checkpoints/3", "checkpoints/4"):
        shutil.rmtree(again / later)
    run("again")
    assert_same(again, whole, 4)
    assert "answers otherwise" not in caplog.text
