"""A signal to one of two processes stops both in good order."""

import signal
import time

import pytest
from parsing import parse
from test_processes import assert_same_run, log_of, overrides, start_two  # noqa: F401  (a fixture)

from adpo_jax.log.metrics import read_jsonl
from adpo_jax.run.checkpoint_files import complete_steps
from adpo_jax.run.exit_codes import INTERRUPTED
from adpo_jax.train import train

GRACE_S = 60


def wait_for_row(folder, step: int, deadline_s: float = 240) -> None:
    path, deadline = folder / "metrics.jsonl", time.monotonic() + deadline_s
    while time.monotonic() < deadline:
        if path.exists() and any(row["step"] >= step for row in read_jsonl(path)):
            return
        time.sleep(0.05)
    raise AssertionError(log_of(folder, 0) + log_of(folder, 1))


def stopped(folder, processes, told: int) -> float:
    """Sends SIGTERM to one process; the seconds until both have left with the code of their own."""
    begun = time.monotonic()
    processes[told].send_signal(signal.SIGTERM)
    try:
        codes = [process.wait(2 * GRACE_S) for process in processes]
    finally:
        for process in processes:
            process.kill()
    logs = log_of(folder, 0) + log_of(folder, 1)
    assert codes == [INTERRUPTED, INTERRUPTED], logs
    assert "Traceback" not in logs
    return time.monotonic() - begun


@pytest.mark.parametrize("told", [1, pytest.param(0, marks=pytest.mark.long)])
def test_sigterm_to_one_process_stops_both_with_one_checkpoint(tmp_path, overrides, told):  # noqa: F811
    run = tmp_path / "run"
    flags = (
        *overrides,
        f"--config.trainer.grace_period_s={GRACE_S}",
        "--config.trainer.save_freq=0",
        "--config.data.val_files=",
        "--config.data.max_val_samples=0",
        "--config.actor_rollout_ref.actor.optim.lr_scheduler_type=constant",
        "--config.actor_rollout_ref.actor.optim.min_lr_ratio=0.0",
    )
    processes = start_two(run, *flags, "--config.trainer.total_training_steps=100000")
    wait_for_row(run, 2)
    assert stopped(run, processes, told) < GRACE_S
    assert f"after iteration {complete_steps(run / 'checkpoints')[-1]}, which is saved" in log_of(
        run, 0
    )
    rows = [row["step"] for row in read_jsonl(run / "metrics.jsonl")]
    assert complete_steps(run / "checkpoints") == [0, rows[-1]]
    assert rows == list(range(1, rows[-1] + 1))
    if told == 0:
        # One process with all the devices goes on from it, like one that did it all.
        flags += (f"--config.trainer.total_training_steps={rows[-1] + 1}",)
        train(parse(*flags), run)
        train(parse(*flags), tmp_path / "whole")
        assert_same_run(run, tmp_path / "whole")


@pytest.mark.long
def test_sigterm_in_the_cold_start_of_two_processes(tmp_path, overrides):  # noqa: F811
    run = tmp_path / "run"
    flags = (*overrides, "--config.trainer.total_training_steps=1", "--config.sft.batch_size=8")
    processes = start_two(run, *flags, "--config.sft.steps=100000", "--config.sft.save_freq=0")
    wait_for_row(run, -99_900)
    stopped(run, processes, 1)
    (step,) = complete_steps(run / "checkpoints")
    assert -100_000 < step < -99_000
    assert "cold start step" in log_of(run, 0)
