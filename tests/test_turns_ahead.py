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
from types import SimpleNamespace

import conversing
import jax
import numpy as np
import pyarrow.parquet as pq
import pytest
from test_environments import FILE, call, template_of
from test_resume import assert_same

from adpo_jax.data import calculator
from adpo_jax.engine.sampling import SamplingParams
from adpo_jax.engine.session import Turn
from adpo_jax.environments.contract import Spec
from adpo_jax.environments.environments import Environments
from adpo_jax.environments.pool import EnvironmentFailed, EnvironmentPool
from adpo_jax.log.metrics import read_jsonl
from adpo_jax.records import Prompts
from adpo_jax.rewards.model import GIVEN
from adpo_jax.rollouts import conversations
from adpo_jax.rollouts.completing import Reading
from adpo_jax.rollouts.flight import FlyingSample, Limits, Told
from adpo_jax.rollouts.flight_files import FlightFiles
from adpo_jax.rollouts.in_turns import InTurns
from adpo_jax.rollouts.source import SourceError
from adpo_jax.rollouts.turns_ahead import TurnsAhead

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
        (changed(sample, told=None), "some samples have an environment, and some none"),
        (changed(sample, told=Told(asked="x")), "told: asked is of another type"),
        (changed(sample, told=Told(answers=((1,),))), "told: answers is of another type"),
        (changed(sample, told=Told(reward="much")), "told: reward is of another type"),
        (changed(sample, tokens=sample.tokens - 10_000), "token ids below 0"),
        (changed(sample, trained=sample.trained[1:]), r"fields of \[\d+, \d+\] tokens"),
    ]
    for wrong, why in broken:
        groups = flight.groups | {number: (wrong, *others)}
        files.save(2, changed(flight, groups=groups))
        with pytest.raises(SourceError, match=rf"is damaged \(ValueError\(.*{why}"):
            files.load(2)
    files.save(2, changed(flight, admitted_at={}))
    with pytest.raises(SourceError, match="is damaged .*groups that were never admitted"):
        files.load(2)
    alone = FlightFiles(whole / "in_flight", changed(LIMITS, converses=False))
    with pytest.raises(SourceError, match="sample has an environment.* Set .*the environments"):
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


# --- decoding, over a session that says what a script has


class Sample:
    def __init__(self, place):
        self.place = place


class Session:
    """Says the lines that a script has left for each sample, one a dispatch of eight steps.

    A line None stands for steps in which a turn goes on.
    """

    def __init__(self, tokenizer, script):
        self.version, self.stats, self.went_on = 0, {"steps": 0}, {}
        self._tokenizer, self._script, self._ready = tokenizer, script, []

    @property
    def num_decoding(self):
        return len(self._ready)

    def submit(self, prompt, begun, *, keys, of_turn):
        assert len(begun) == len(keys) == len(of_turn)
        samples = [Sample(tuple(key)) for key in keys.tolist()]
        self._ready += samples
        return SimpleNamespace(samples=samples)

    def step(self):
        if not self._ready:
            return []
        self.stats["steps"] += 8
        sample = self._ready.pop(0)
        line = self._script[sample.place].pop(0)
        if line is None:
            self._ready.append(sample)
            return []
        ids = np.array(self._tokenizer(line)["input_ids"], np.int32)
        return [Turn(sample, ids, np.full(len(ids), -1.0, np.float32), None, "stop")]

    def go_on(self, sample, ids):
        self.went_on[sample.place] = self.stats["steps"]
        self._ready.append(sample)

    def end(self, sample):
        pass

    def leave(self):
        empty = np.zeros(0, np.float32)
        return [Turn(sample, empty, empty, None, None) for sample in self._ready]


@pytest.fixture(scope="module")
def world():
    """Makes what stays of a run in conversation, as if it had just been started."""
    tokenizer = calculator.make_tokenizer()
    columns = {"question": ["Count."], "environment": ["counter"], "start": [3]}
    numbering = SimpleNamespace(
        prompts=lambda numbers: Prompts(
            [[7]] * len(numbers), {name: value * len(numbers) for name, value in columns.items()}
        ),
        keys=lambda number: np.array([[number, 0], [number, 1]]),
        key=jax.random.key,
    )
    with EnvironmentPool(Spec(FILE, "BOTH"), 1, timeout_s=2.0) as pool:
        described, _ = pool.describe()
        prompt_ids = lambda columns, said: [[7, 8] for _ in said]  # noqa: E731
        environments = Environments(
            pool, described, template_of(tokenizer, 8), prompt_ids, 4, overlap_steps=16
        )
        parts = InTurns(None, tokenizer, Reading(prompt_key="question"), environments)

        def started(max_tokens=200):
            sampling = SamplingParams(n=2, max_tokens=max_tokens)
            return TurnsAhead(parts, numbering, sampling)

        yield tokenizer, started


FRESH = {0: (FlyingSample.empty(),) * 2}


def left_with_a_call(world, script, **options):
    """What an iteration leaves whose first sample has called a tool with its first line."""
    tokenizer, started = world
    ahead = started(**options)
    decoding = ahead.start(Session(tokenizer, script))
    decoding.begin(FRESH)
    decoding.decode(8)
    (sample, _) = decoding.left()[0]
    assert sample.told.asked
    assert not sample.told.answers
    return ahead, {0: decoding.left()[0]}


def test_an_answer_is_taken_when_so_many_steps_have_been_done_beside_the_call(world):
    tokenizer, started = world
    script = {(0, 0): [call("add", number=1), "#### 4<eos>"]}
    script[0, 1] = [None, None, None, *[call("add", number=9)] * 4]
    session = Session(tokenizer, script)
    decoding = started().start(session)
    decoding.begin(FRESH)
    decoding.decode(1)
    time.sleep(0.2)  # the answer is there, and not due
    decoding.decode(40)
    # The first called at step 8. The second called when nothing else was left to decode.
    assert session.went_on == {(0, 0): 24, (0, 1): 48}
    decoding.decode(1000)
    assert decoding.whole() == [0]
    answers = decoding.answers([0], {})
    assert [e.count for e in answers.columns["environments"]] == [4, 30]
    assert answers.columns[GIVEN + "Counter"] == [4.0, 30.0]
    assert decoding.stats["tool_calls"] == 4
    assert answers.prompts.token_ids == [[7, 8]]


def test_the_end_of_an_environment_counts_when_it_is_due_and_not_when_it_is_heard(world):
    tokenizer, started = world
    script = {(0, 0): ["#### 3<eos>"], (0, 1): ["#### 0<eos>"]}
    script |= {(1, i): [None] * 9 for i in range(2)}
    ahead = started()
    decoding = ahead.start(Session(tokenizer, script))
    decoding.begin(FRESH | {1: FRESH[0]})
    decoding.decode(16)
    assert {ahead.conversations.hear() for _ in range(2)} == {(0, 0), (0, 1)}
    assert decoding.whole() == []
    decoding.decode(8)  # that of the first, of step 8
    assert decoding.whole() == []
    decoding.decode(8)
    assert decoding.whole() == [0]


def test_a_call_without_an_answer_is_answered_in_the_next_iteration_and_after_a_restart(world):
    tokenizer, started = world
    for restarted in (False, True):
        script = {(0, 0): [call("add", number=1), call("add", number=2), "#### 6<eos>"]}
        script[0, 1] = ["#### 0<eos>"]
        ahead, flight = left_with_a_call(world, script)
        decoding = (started() if restarted else ahead).start(Session(tokenizer, script))
        decoding.begin(flight)
        assert decoding.left()[0][0].told.answers == (("4",),)
        decoding.decode(1000)
        answers = decoding.answers([0], {})
        assert [e.count for e in answers.columns["environments"]] == [6, 3]
        assert decoding.stats["tool_calls"] == 2


def test_an_answer_that_does_not_fit_ends_the_sample_before_it_goes_on(world):
    tokenizer, _ = world
    script = {(0, 0): [call("add", number=1)], (0, 1): ["#### 0<eos>"]}
    size = len(tokenizer(script[0, 0][0])["input_ids"])
    ahead, flight = left_with_a_call(world, script, max_tokens=size)
    # A sample may be full when it asks, and is no damage in a file.
    Limits(2, size, len(tokenizer), converses=True).check(flight[0][0])
    decoding = ahead.start(Session(tokenizer, script))
    decoding.begin(flight)
    decoding.decode(1000)
    answers = decoding.answers([0], {})
    assert answers.completions[0][0].finish_reason == "length"
    assert answers.columns[GIVEN + "Counter"] == [4.0, 3.0]


def test_a_long_answer_is_kept_as_the_model_reads_it(world, monkeypatch):
    tokenizer, started = world
    script = {(0, 0): [call("fail"), call("add", number=2)], (0, 1): ["#### 0<eos>"]}
    ahead, flight = left_with_a_call(world, script)
    decoding = ahead.start(Session(tokenizer, script))
    decoding.begin(flight)
    sample, other = decoding.left()[0]
    shown = "{'error'... (cut at 8 tokens)"
    assert sample.told.answers == ((shown,),)
    assert ahead.conversations.under_way[0, 0].messages[-1]["content"] == shown

    said = []
    monkeypatch.setattr(conversations.logging, "log_first_n", lambda *a: said.append(a[1]))
    # One of an earlier version was kept in full.
    for kept, same in ((shown, True), ("{'error': 'it is broken'}", True), ("other", False)):
        told = dataclasses.replace(sample.told, answers=((kept,),))
        group = (dataclasses.replace(sample, told=told), other)
        started().start(Session(tokenizer, {})).begin({0: group})
        assert same == (not said)


def test_what_cannot_be_done_again_after_a_restart_is_told(world, monkeypatch):
    tokenizer, started = world
    script = {(0, 0): [call("add", number=1), call("add", number=2)], (0, 1): ["#### 0<eos>"]}
    ahead, flight = left_with_a_call(world, script)
    decoding = ahead.start(Session(tokenizer, script))
    decoding.begin(flight)
    decoding.decode(8)
    sample, other = decoding.left()[0]
    said = []
    monkeypatch.setattr(conversations.logging, "log_first_n", lambda *a: said.append(a[1]))

    def resumed(**changes):
        told = dataclasses.replace(sample.told, **changes)
        decoding = started().start(Session(tokenizer, {}))
        decoding.begin({0: (dataclasses.replace(sample, told=told), other)})
        return decoding.left()[0][0].told

    assert resumed().answers == (("4",), ("6",))
    assert not said
    assert resumed(answers=(("99", *sample.told.answers[1:]),)).answers[0] == ("99",)
    assert "answers otherwise" in said[0]
    # The environment was killed: nothing is done again, and the model is told.
    lost = resumed(is_lost=True).answers[-1]
    assert lost[0].startswith("{'error'")
    with pytest.raises(SourceError, match="answered other calls than they made"):
        resumed(answers=(("4", "5"),))
    monkeypatch.setattr(conversations, "reset_row", lambda *_: {"start": lambda: None})
    with pytest.raises(EnvironmentFailed, match="its reset failed"):
        resumed()
