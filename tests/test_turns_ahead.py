"""Conversations with environments that go on from one iteration to the next."""

import dataclasses
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
from adpo_jax.rollouts.flight import FlightFiles, Limits, Told
from adpo_jax.rollouts.source import SourceError

LIMITS = Limits(n=2, max_tokens=64, vocab_size=10_000, converses=True)


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


def is_in_the_midst(folder, step) -> bool:
    """Whether an iteration left conversations in all states."""
    flight = FlightFiles(folder / "in_flight", LIMITS).load(step)
    samples = [sample for group in flight.groups.values() for sample in group]
    going_on = [s for s in samples if not s.finish_reason and not s.told.asked]
    return (
        any(sample.told.answers for sample in samples)
        and any(sample.told.asked for sample in samples)
        and any(len(s.turn_tokens(len(s.told.answers))) for s in going_on)
    )


def test_a_resumed_run_with_conversations_in_flight_has_the_same_bits(whole, tmp_path, caplog):
    # There is something to resume: answered calls, calls without an answer, turns under way.
    step = next(step for step in (1, 2, 3) if is_in_the_midst(whole, step))
    again = tmp_path / "again"
    shutil.copytree(whole, again)
    for later in ("export", *(f"checkpoints/{n}" for n in range(step + 1, 5))):
        shutil.rmtree(again / later)
    conversing.run(again, whole.parent)
    assert_same(again, whole, conversing.STEPS)
    assert "answers otherwise" not in caplog.text


def test_conversations_in_flight_that_no_run_can_have_left_are_refused(whole, tmp_path):
    files = FlightFiles(tmp_path, LIMITS)
    flight = FlightFiles(whole / "in_flight", LIMITS).load(2)
    number, (sample, *others) = next(
        (n, group) for n, group in flight.groups.items() if len(group[0].tokens)
    )
    changed = dataclasses.replace
    broken = [
        changed(sample, told=None),
        changed(sample, told=Told(asked="x")),
        changed(sample, told=Told(answers=((1,),))),
        changed(sample, told=Told(reward="much")),
        changed(sample, tokens=sample.tokens + 10_000),
        changed(sample, trained=sample.trained[1:]),
    ]
    for wrong in broken:
        groups = flight.groups | {number: (wrong, *others)}
        files.save(2, changed(flight, groups=groups))
        with pytest.raises(SourceError, match="is damaged"):
            files.load(2)
    files.save(2, changed(flight, admitted_at={}))
    with pytest.raises(SourceError, match="is damaged"):
        files.load(2)
    alone = FlightFiles(whole / "in_flight", changed(LIMITS, converses=False))
    with pytest.raises(SourceError, match="with other environments"):
        alone.load(2)


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
        out = told_by(process)
        assert process.returncode in (0, -signal.SIGKILL), out
        kills += process.returncode != 0
        print(f"{place} {count}: exit code {process.returncode}", flush=True)
        if process.returncode == 0:
            took = max(time.monotonic() - began, 5.0)
            assert_same(run, whole, conversing.STEPS)
            number += 1  # it came to its end: another one
            run = tmp_path / f"run_{number}"
    last = start(run, whole.parent)
    out = told_by(last)
    assert last.returncode == 0, out
    assert_same(run, whole, conversing.STEPS)


def told_by(process) -> str:
    """What a process printed until its end."""
    try:
        return process.communicate(timeout=300)[0]
    finally:
        process.kill()


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
