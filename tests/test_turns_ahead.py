"""Conversations with environments that go on from one iteration to the next."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import conversing
import numpy as np
import pyarrow.parquet as pq
import pytest
from test_resume import assert_same

from adpo_jax.log.metrics import read_jsonl


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run to its end."""
    folder = tmp_path_factory.mktemp("conversing") / "whole"
    conversing.run(folder, folder.parent)
    return folder


def test_conversations_go_on_under_new_weights(whole):
    rows = [row for row in read_jsonl(whole / "metrics.jsonl") if "ahead/staleness_max" in row]
    assert max(row["ahead/staleness_max"] for row in rows) > 0
    assert max(row["rollout/turns"] for row in rows) > 2
    assert any(row["filter/dropped_frac"] for row in rows)
    assert max(row["tools/calls"] for row in rows) > 1

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


def test_a_resumed_run_with_conversations_in_flight_has_the_same_bits(whole, tmp_path, caplog):
    again = tmp_path / "again"
    shutil.copytree(whole, again)
    for later in ("export", "checkpoints/3", "checkpoints/4"):
        shutil.rmtree(again / later)
    conversing.run(again, whole.parent)
    assert_same(again, whole, conversing.STEPS)
    assert "answers otherwise" not in caplog.text


PLACES = [
    ("rollout", 1),
    ("update", 2),
    ("torn row", 2),
    ("writing a checkpoint", 2),
    ("update", 1),
]


@pytest.mark.long
def test_killed_twenty_times_with_conversations_in_flight_it_ends_the_same(whole, tmp_path):
    moments, kills, number = random.Random(0), 0, 0
    run, took = tmp_path / "run", 20.0
    plan = [("random", 0)] * 11 + PLACES
    moments.shuffle(plan)
    while plan or kills < 20:
        place, count = plan.pop() if plan else ("random", 0)
        armed = "nowhere" if place == "random" else place
        process, began = start(run, whole.parent, armed, count), time.monotonic()
        if place == "random":
            try:
                process.wait(timeout=moments.uniform(0.3, 0.9) * took)
            except subprocess.TimeoutExpired:
                process.kill()
        out, _ = process.communicate(timeout=300)
        assert process.returncode in (0, -signal.SIGKILL), out
        kills += process.returncode != 0
        print(f"{place} {count}: exit code {process.returncode}", flush=True)
        if process.returncode == 0:
            took = max(time.monotonic() - began, 5.0)
            assert_same(run, whole, conversing.STEPS)
            number += 1  # it came to its end: another one
            run = tmp_path / f"run_{number}"
    out, _ = start(run, whole.parent).communicate(timeout=300)
    assert_same(run, whole, conversing.STEPS)


def start(folder, files, place="nowhere", count=0):
    """The run as a process."""
    script = Path(conversing.__file__)
    return subprocess.Popen(
        [sys.executable, str(script), str(folder), str(files), place, str(count)],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
