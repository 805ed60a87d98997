"""A run that is killed, again and again and anywhere, ends like one that nothing happened to."""

import json
import os
import random
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tensorboardX.proto import event_pb2
from test_train import TIMED, TINY

from adpo_jax.log.metrics import read_jsonl
from adpo_jax.run.exit_codes import INTERRUPTED

ROOT = Path(__file__).resolve().parents[1]
KILLABLE = ROOT / "tests" / "killable.py"
STEPS = 8
ANY_ANCHOR = (
    *TINY,
    f"--config.trainer.total_training_steps={STEPS}",
    "--config.trainer.save_total_limit=2",
    "--config.trainer.best_metric=eval/accuracy",
    "--config.trainer.rollout_data_dir=rollouts",
    "--config.actor_rollout_ref.actor.ppo_epochs=2",
    "--config.actor_rollout_ref.actor.ppo_mini_batch_size=4",
    "--config.actor_rollout_ref.actor.optim.lr=0.01",
)
SETTINGS = (*ANY_ANCHOR, "--config.anchor.mode=ema", "--config.anchor.ema_alpha=0.9")


def start(workdir, *flags, place="nowhere", count=0, settings=SETTINGS):
    """The command line as a process."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
    }
    environment.setdefault("JAX_COMPILATION_CACHE_DIR", str(workdir.parent / "compiled"))
    return subprocess.Popen(
        [
            sys.executable,
            str(KILLABLE),
            place,
            str(count),
            f"--config={ROOT / 'configs' / 'arithmetic.py'}",
            f"--workdir={workdir}",
            *settings,
            *flags,
        ],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process, expected=0) -> str:
    out, _ = process.communicate(timeout=300)
    assert process.returncode == expected, out
    return out


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A run without any accident."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    finish(start(folder))
    return folder


def rows_of(folder):
    """The metrics without what depends on the clock."""
    return [
        {k: v for k, v in row.items() if not k.startswith(TIMED)}
        for row in read_jsonl(folder / "metrics.jsonl")
    ]


def events_of(folder) -> dict[tuple[str, int], float]:
    """The scalars that TensorBoard shows: those that no later session took back."""
    scalars = {}
    for path in sorted((folder / "tensorboard").iterdir()):
        content, place = path.read_bytes(), 0
        while place + 12 <= len(content):
            (size,) = struct.unpack("<Q", content[place : place + 8])
            record = content[place + 12 : place + 12 + size]
            if len(record) < size:
                break  # cut off by the kill
            place += 12 + size + 4
            event = event_pb2.Event.FromString(record)
            if event.session_log.status == event_pb2.SessionLog.START:
                scalars = {k: v for k, v in scalars.items() if k[1] < event.step}
            for value in event.summary.value:
                if value.HasField("simple_value"):
                    scalars[value.tag, event.step] = value.simple_value
    return scalars


def description(folder) -> dict:
    """The digests of all arrays in the last checkpoint."""
    path = folder / "checkpoints" / str(STEPS) / "description" / "metadata"
    return json.loads(json.loads(path.read_text())["content"])


def assert_same(run, straight):
    """Parameters, optimizer, anchor, metrics, events, samples, recordings and checkpoints."""
    assert description(run)["digests"] == description(straight)["digests"]
    rows = rows_of(run)
    assert rows == rows_of(straight)
    iterations = [row["step"] for row in rows if "sft/step" not in row]
    assert iterations == list(range(STEPS + 1))
    events = events_of(run)
    for row in rows:
        for name, value in row.items():
            if name != "step":
                assert events[name, row["step"]] == pytest.approx(value, rel=1e-6), name
    for part in ("export", "samples", "rollouts"):
        there = {p.name: p for p in (straight / part).iterdir()}
        here = {p.name: p for p in (run / part).iterdir()}
        assert here.keys() == there.keys(), part
        for name, path in there.items():
            assert here[name].read_bytes() == path.read_bytes(), name
    names = [{p.name for p in (f / "checkpoints").iterdir()} for f in (run, straight)]
    assert names[0] == names[1]
    assert {p.name for p in run.iterdir()} == {p.name for p in straight.iterdir()}


def wait_for_step(folder, step: int, process) -> None:
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and process.poll() is None:
        path = folder / "metrics.jsonl"
        if path.exists() and f'{{"step": {step},' in path.read_text():
            return
        time.sleep(0.005)
    raise AssertionError(f"never came to step {step}: {process.communicate()[0]}")


def test_killed_at_a_commit_and_stopped_by_sigterm_it_ends_the_same(tmp_path, straight):
    run = tmp_path / "run"
    finish(start(run, place="committing a checkpoint", count=5), expected=-signal.SIGKILL)
    again = start(run)
    wait_for_step(run, 6, again)
    again.send_signal(signal.SIGTERM)
    out = finish(again, expected=INTERRUPTED)
    assert "SIGTERM: stopping, within 30 s" in out
    assert "which is saved" in out
    assert "Traceback" not in out
    finish(start(run, "--resume=must"))
    assert_same(run, straight)


PLACES = [
    ("cold start", 1),
    ("writing a checkpoint", 1),
    ("grading", 1),
    ("rollout", 2),
    ("update", 1),
    ("evaluation", 1),
    ("torn row", 2),
    ("writing a checkpoint", 2),
    ("committing a checkpoint", 2),
    ("purging the metrics", 1),
    ("deleting a checkpoint", 1),
    ("update", 3),
    ("torn row", 3),
    ("grading", 2),
    ("writing a checkpoint", 1),
    ("exporting", 1),
    ("noting the export", 1),
]


@pytest.mark.long
def test_killed_at_every_place_and_at_random_moments_it_ends_the_same(tmp_path, straight):
    moments = random.Random(0)
    plan = [("random", 0)] * 8 + PLACES
    moments.shuffle(plan)
    # What can only happen at the end of the run comes last.
    plan.sort(key=lambda item: item[0] in ("exporting", "noting the export"))
    begun = time.monotonic()
    finish(start(tmp_path / "warm"))
    duration = time.monotonic() - begun
    run, kills, number = tmp_path / "run", 0, 0
    while plan or kills < 20:
        number += 1
        place, count = plan.pop(0) if plan else ("random", 0)
        process = start(run, place="nowhere" if place == "random" else place, count=count)
        if place == "random":
            try:
                process.wait(timeout=moments.uniform(0.1, 0.8) * duration)
            except subprocess.TimeoutExpired:
                process.kill()
        out, _ = process.communicate(timeout=300)
        assert process.returncode in (0, -signal.SIGKILL), out
        kills += process.returncode != 0
        print(f"{place} {count}: exit code {process.returncode}", flush=True)
        if process.returncode == 0:
            assert_same(run, straight)
            run = tmp_path / f"run_{number}"  # it came to its end: another one
    finish(start(run))
    assert_same(run, straight)
    print(f"{kills} kills")


# What else is carried from step to step, and where it is killed.
CARRIED = {
    "fixed": (("--config.anchor.mode=fixed",), (("update", 3), ("rollout", 2), ("torn row", 3))),
    "kl_triggered": (
        ("--config.anchor.mode=kl_triggered", "--config.anchor.kl_threshold=1e-6"),
        (("update", 3), ("committing a checkpoint", 5), ("grading", 2)),
    ),
    "filter_groups": (
        ("--config.algorithm.filter_groups=true", "--config.custom_reward_function.name=odd"),
        (("update", 3), ("rollout", 3), ("committing a checkpoint", 5)),
    ),
    "cold start": (
        ("--config.sft.steps=120", "--config.sft.save_freq=30"),
        (("step of the cold start", 40), ("step of the cold start", 40), ("torn row", 1)),
    ),
}


@pytest.mark.long
@pytest.mark.parametrize("name", CARRIED)
def test_killed_under_another_anchor_and_in_the_cold_start_it_ends_the_same(tmp_path, name):
    flags, kills = CARRIED[name]
    reward = tmp_path / "odd.py"
    reward.write_text(
        "def odd(completions, **columns):\n"
        "    return [float(sum(map(ord, c[0]['content'])) % 3 == 0) for c in completions]\n"
    )
    if "odd" in flags[-1]:
        flags += (f"--config.custom_reward_function.path={reward}",)
    settings = (*ANY_ANCHOR, *flags)
    straight, run = tmp_path / "straight", tmp_path / "run"
    finish(start(straight, settings=settings))
    for place, count in kills:
        process = start(run, place=place, count=count, settings=settings)
        finish(process, expected=-signal.SIGKILL)
    finish(start(run, settings=settings))
    assert_same(run, straight)
    if name == "filter_groups":
        assert any(row.get("filter/carried") for row in rows_of(run))
