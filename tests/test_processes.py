"""Training on two processes with four simulated devices each, against one process with eight."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from parsing import parse
from safetensors.numpy import load_file
from test_train import TIMED

from adpo_jax.devices import distributed
from adpo_jax.log.metrics import read_jsonl
from adpo_jax.train import train

ROOT = Path(__file__).parents[1]
TIMEOUT_S = 10
OVERRIDES = (
    "--config.actor_rollout_ref.model.hf_config="
    "{'hidden_size': 16, 'intermediate_size': 32, 'num_hidden_layers': 1, 'head_dim': 8}",
    "--config.actor_rollout_ref.actor.optim.lr=0.005",
    "--config.custom_reward_function.name=letters",
    "--config.sft.steps=0",
    "--config.data.train_batch_size=8",
    "--config.data.max_response_length=6",
    "--config.data.max_val_samples=9",
    "--config.algorithm.num_generations=2",
    "--config.mesh.tensor=2",
    "--config.trainer.save_freq=1",
    "--config.trainer.test_freq=2",
    "--config.trainer.log_samples_freq=2",
)
REWARD = """
import os, time
def letters(completions, solution, **columns):
    if os.path.exists(__file__ + ".slow"):
        time.sleep(1.0)
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [(sum(map(ord, text)) % 11) / 5 for text in texts]
"""
WORLD = """
import random
class World:
    def reset(self, question, **row):
        self.luck = random.random()
        return f" There are {len(question)}."
    def look(self) -> str:
        \"\"\"Looks.\"\"\"
        return "nothing"
    def get_reward(self) -> float:
        return self.luck
"""


@pytest.fixture
def overrides(tmp_path):
    (tmp_path / "reward.py").write_text(REWARD)
    (tmp_path / "world.py").write_text(WORLD)
    return (*OVERRIDES, f"--config.custom_reward_function.path={tmp_path / 'reward.py'}")


def start_two(
    folder: Path, *arguments: str, timeout_s: int = 100, name: str = "arithmetic"
) -> list[subprocess.Popen]:
    """The same command twice, as a launcher would start it on two hosts."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    flags = "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0"
    command = [sys.executable, "-m", "adpo_jax.main", f"--config=configs/{name}.py"]
    command += [f"--workdir={folder}", f"--host_timeout_s={timeout_s}", *arguments]
    processes = []
    for i in range(2):
        env = os.environ | {
            "XLA_FLAGS": flags,
            "JAX_COORDINATOR_ADDRESS": address,
            "JAX_NUM_PROCESSES": "2",
            "JAX_PROCESS_ID": str(i),
        }
        with (folder.parent / f"{folder.name}.{i}.log").open("w") as log:
            processes.append(subprocess.Popen(command, env=env, cwd=ROOT, stdout=log, stderr=log))
    return processes


def log_of(folder: Path, process: int) -> str:
    return (folder.parent / f"{folder.name}.{process}.log").read_text()


def finish(folder: Path, processes: list[subprocess.Popen], timeout_s: float = 240) -> list[int]:
    try:
        codes = [process.wait(timeout_s) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert codes == [0, 0], log_of(folder, 0) + log_of(folder, 1)
    return codes


def _timeless(row: dict) -> dict:
    """The metrics that depend neither on the clock nor on the machine."""
    by_machine = TIMED
    return {name: value for name, value in row.items() if not name.startswith(by_machine)}


def assert_same_run(one: Path, other: Path):
    """The same metrics and the same exported parameters."""
    rows, expected = read_jsonl(one / "metrics.jsonl"), read_jsonl(other / "metrics.jsonl")
    assert [row["step"] for row in rows] == [row["step"] for row in expected]
    for row, wanted in zip(map(_timeless, rows), map(_timeless, expected)):
        assert row.keys() == wanted.keys()
        for name, value in row.items():
            np.testing.assert_allclose(value, wanted[name], rtol=1e-5, atol=1e-5, err_msg=name)
    weights, expected = (load_file(run / "export" / "model.safetensors") for run in (one, other))
    for name, value in weights.items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-5, atol=1e-5, err_msg=name)


ADAPTERS_AND_FILTER = (
    "--config.actor_rollout_ref.model.lora_rank=2",
    "--config.anchor.mode=fixed",
    "--config.algorithm.filter_groups=True",
    "--config.algorithm.min_reward_std=0.5",
)


ENVIRONMENTS_AND_FILTER = (
    "--config.environment.path={tmp_path}/world.py",
    "--config.environment.name=World",
    "--config.data.max_prompt_length=60",
    "--config.algorithm.filter_groups=True",
    "--config.algorithm.min_reward_std=0.5",
)


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("arithmetic", ()),
        pytest.param("arithmetic", ADAPTERS_AND_FILTER, marks=pytest.mark.long),
        pytest.param("calculator", ENVIRONMENTS_AND_FILTER, marks=pytest.mark.long),
        pytest.param("arithmetic", ("--config.mesh.sequence=2",), marks=pytest.mark.long),
    ],
    ids=["weights", "adapters, groups replaced", "environments, groups replaced", "shared streams"],
)
def test_two_processes_train_as_one_does(tmp_path, overrides, name, more):
    two, one = tmp_path / "two", tmp_path / "one"
    more = tuple(override.format(tmp_path=tmp_path) for override in more)
    # Batches hold copies of a prompt, on both processes, which are sampled from apart.
    overrides += ("--config.data.train_max_samples=3", "--config.trainer.total_training_steps=2")
    overrides += more
    # Each process is as a slice: the parameters are there once in each, and gradients cross.
    processes = start_two(two, *overrides, "--config.mesh.dcn_data=2", name=name)
    train(parse(*overrides, name=name), one)
    finish(two, processes)
    assert_same_run(two, one)
    assert read_jsonl(two / "metrics.jsonl")[1]["update/grad_norm"] > 0.01
    assert {p.name for p in two.iterdir()} == {p.name for p in one.iterdir()}
    for name in ("train_000002", "eval_000002"):
        samples = [(run / "samples" / f"{name}.jsonl").read_text() for run in (two, one)]
        assert samples[0] == samples[1]
    assert "2 processes" in log_of(two, 0)
    assert "does not reach its neighbours" not in log_of(two, 0)
    assert "iteration 1/2" not in log_of(two, 1)


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "more"),
    [("arithmetic", ()), ("calculator", ENVIRONMENTS_AND_FILTER)],
    ids=["one turn", "environments, groups replaced"],
)
def test_two_processes_that_sample_ahead_do_the_same_every_time(tmp_path, overrides, name, more):
    overrides += tuple(override.format(tmp_path=tmp_path) for override in more)
    overrides += (
        "--config.trainer.total_training_steps=3",
        "--config.actor_rollout_ref.rollout.max_staleness=1",
        "--config.data.max_response_length=24",
    )
    for run in ("one", "two"):
        finish(tmp_path / run, start_two(tmp_path / run, *overrides, name=name))
    one, two = (read_jsonl(tmp_path / name / "metrics.jsonl") for name in ("one", "two"))
    assert_same_run(tmp_path / "one", tmp_path / "two")
    assert [row["ahead/lag_0_frac"] for row in one[1:]] == [
        row["ahead/lag_0_frac"] for row in two[1:]
    ]
    assert one[1]["ahead/in_flight"] == 8.0
    assert one[-1]["ahead/in_flight"] == 0.0
    files = sorted(path.name for path in (tmp_path / "one" / "in_flight").iterdir())
    assert [name for name in files if name.startswith("000001")] == [
        "000001.0.of2.npz",
        "000001.1.of2.npz",
    ]


@pytest.mark.long
@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_dies_stops_the_other_and_the_run_goes_on_from_its_checkpoint(
    tmp_path, overrides, victim
):
    two, one = tmp_path / "two", tmp_path / "one"
    overrides += ("--config.trainer.total_training_steps=5",)
    slow = tmp_path / "reward.py.slow"
    slow.touch()
    processes = start_two(two, *overrides, timeout_s=TIMEOUT_S)
    deadline = time.monotonic() + 240
    while not (two / "checkpoints" / "2").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    processes[victim].send_signal(signal.SIGKILL)
    processes[victim].wait()
    killed = time.monotonic()
    other = processes[1 - victim]
    try:
        code = other.wait(5 * TIMEOUT_S)
    finally:
        other.kill()
    assert time.monotonic() - killed < 3 * TIMEOUT_S
    log = log_of(two, 1 - victim)
    # Ours where an exchange failed, JAX's own where it saw the silence first.
    assert (code == 5 and "another host" in log) or (code == -6 and "another task died" in log), log
    assert "the same command goes on" in log

    slow.unlink()
    finish(two, start_two(two, *overrides))
    train(parse(*overrides), one)
    assert_same_run(two, one)


@pytest.mark.long
def test_a_reward_function_that_fails_on_one_process_stops_both(tmp_path, overrides):
    (tmp_path / "reward.py").write_text(
        "import os\n"
        "def letters(completions, solution, **columns):\n"
        "    if os.environ['JAX_PROCESS_ID'] == '1':\n"
        "        raise RuntimeError('no ruler')\n"
        "    return [0.0] * len(completions)\n"
    )
    two = tmp_path / "two"
    processes = start_two(two, *overrides, "--config.trainer.total_training_steps=1")
    codes = [process.wait(240) for process in processes]
    assert codes == [2, 2]
    assert all("no ruler" in log_of(two, i) for i in range(2))
    assert (two / "samples" / "reward_error_000001.jsonl").exists()


class NeedsTwo(Exception):
    """What pickling makes of it is an error of its own."""

    def __init__(self, what: str, reason: str):
        super().__init__(f"{what}: {reason}")


def test_an_error_that_does_not_survive_pickling_travels_as_its_text():
    class Local(Exception):
        pass

    fine = ValueError("as it is")
    assert distributed._sendable(fine) is fine
    assert distributed._sendable(None) is None
    for error, text in ((NeedsTwo("it", "broke"), "NeedsTwo: it: broke"), (Local(3), "Local: 3")):
        assert str(distributed._sendable(error)) == text


def test_the_environment_says_whether_there_are_others(monkeypatch):
    for name in list(os.environ):
        if name.startswith(("JAX_COORD", "JAX_NUM", "JAX_PROCESS", "SLURM", "TPU_", "MEGASCALE")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    assert distributed._environment() is None
    monkeypatch.setenv("SLURM_STEP_NODELIST", "node[1-4]")
    monkeypatch.setenv("SLURM_NTASKS", "4")
    assert distributed._environment() == {}
    monkeypatch.delenv("SLURM_NTASKS")
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "host-0,host-1")
    assert distributed._environment() == {}
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "localhost")
    assert distributed._environment() is None
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "host-0:1234")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "4")
    with pytest.raises(ValueError, match="JAX_PROCESS_ID .* as integers; given '4' and None"):
        distributed._environment()
    monkeypatch.setenv("JAX_PROCESS_ID", "3")
    assert distributed._environment() == {
        "coordinator_address": "host-0:1234",
        "num_processes": 4,
        "process_id": 3,
    }
    monkeypatch.delenv("JAX_COORDINATOR_ADDRESS")

    def refuse(**_):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(distributed.jax.distributed, "initialize", refuse)
    with pytest.raises(ValueError, match="--distributed: .* set JAX_COORDINATOR_ADDRESS"):
        distributed.initialize(True, timeout_s=10)


def test_rows_are_shared_out_in_order(monkeypatch):
    monkeypatch.setattr(distributed.jax, "process_count", lambda: 3)
    rows = []
    for process in range(3):
        monkeypatch.setattr(distributed.jax, "process_index", lambda p=process: p)
        rows += distributed.own_rows(8)
    assert rows == list(range(8))
