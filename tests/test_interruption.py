"""Signals: stop in good order, or at once when asked twice or when the time is up."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from adpo_jax.rewards import RewardFunction, RewardModel
from adpo_jax.run import interruption as interruption_lib
from adpo_jax.run.exit_codes import INTERRUPTED, SECOND_INTERRUPT
from adpo_jax.run.interruption import Interrupted, Interruption

BUSY = """
import sys, time
from adpo_jax.run.interruption import Interruption
with Interruption(grace_s=float(sys.argv[1])):
    print("ready", flush=True)
    time.sleep(60)  # as good as a compilation: nothing looks at the flag
"""


def busy(grace_s: float, program: str = BUSY) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(grace_s)],
        cwd=Path(__file__).resolve().parents[1],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    return process


def test_a_second_interrupt_exits_at_once():
    process = busy(grace_s=60.0)
    process.send_signal(signal.SIGINT)
    assert "SIGINT: stopping, within 60 s" in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == SECOND_INTERRUPT
    assert "second interrupt" in err


def test_a_stage_that_outlasts_the_grace_period_is_left():
    process = busy(grace_s=0.2)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=20)
    assert process.returncode == INTERRUPTED
    assert "not done after 0.2 s: exiting; this process has saved nothing yet, and the same" in err


def test_a_terminal_that_closes_stops_the_run_unless_that_is_ignored():
    # The tests may run under nohup themselves.
    heeding = "import signal\nsignal.signal(signal.SIGHUP, signal.SIG_DFL)" + BUSY
    process = busy(grace_s=0.2, program=heeding)
    process.stderr.close()
    process.send_signal(signal.SIGHUP)
    assert process.wait(timeout=20) == INTERRUPTED
    process.stdout.close()
    ignoring = "import signal\nsignal.signal(signal.SIGHUP, signal.SIG_IGN)" + BUSY
    process = busy(grace_s=0.2, program=ignoring.replace("time.sleep(60)", "time.sleep(0.5)"))
    process.send_signal(signal.SIGHUP)
    _, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (0, "")


def test_a_disk_that_hangs_does_not_hold_up_the_exit():
    hung = "Interruption.what_is_left = property(lambda self: time.sleep(60))\nwith Interruption"
    process = busy(grace_s=0.2, program=BUSY.replace("with Interruption", hung))
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=20)
    assert process.returncode == INTERRUPTED


def test_what_is_left_after_an_exit_is_said_as_it_is(tmp_path):
    interruption = Interruption()
    interruption.checkpoints = tmp_path / "checkpoints"
    assert interruption.what_is_left == "nothing has been saved, and the same command starts again"
    (interruption.checkpoints / "50").mkdir(parents=True)
    assert "the last checkpoint is whole, and the same command" in interruption.what_is_left


def test_a_stage_that_may_be_abandoned_is_left_and_any_other_finished():
    done = []

    def stage():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
        done.append("never")

    with Interruption(grace_s=60.0) as interruption:
        with pytest.raises(Interrupted, match="SIGTERM"), interruption.abandonable():
            stage()
        assert interruption.requested
    with Interruption(grace_s=60.0) as interruption:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
        done.append("finished")
        with pytest.raises(Interrupted):
            interruption.check()
        with pytest.raises(Interrupted), interruption.abandonable():
            done.append("never")
    assert done == ["finished"]


CATCHING = {
    "nothing": "",
    "errors": "except Exception: pass",
    "everything": "except BaseException: pass",
    "everything, for an error": "except BaseException: raise RuntimeError('lost') from None",
}


@pytest.mark.parametrize("caught", CATCHING)
def test_a_reward_function_cannot_swallow_a_signal(tmp_path, caught):
    """Its rewards would be other ones than without the signal, or the signal would be a fault."""
    path = tmp_path / "reward.py"
    path.write_text(
        "import os, signal, time\n"
        "def f(completions, **columns):\n"
        "    try:\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "        time.sleep(0.2)\n"
        f"    {CATCHING[caught] or 'finally: pass'}\n"
        "    return [0.0] * len(completions)\n"
    )
    with (
        RewardModel([RewardFunction(path=str(path), name="f")]) as model,
        Interruption(grace_s=60.0) as interruption,
        pytest.raises(Interrupted, match="SIGTERM"),
        interruption.abandonable(),
    ):
        model.score(["a", "b"], {"solution": ["a", "b"]})


def test_a_signal_while_a_reward_file_is_imported_is_no_fault_of_the_file(tmp_path):
    path = tmp_path / "reward.py"
    path.write_text("import os, signal, time\nos.kill(os.getpid(), signal.SIGTERM)\ntime.sleep(5)")
    with (
        Interruption(grace_s=60.0) as interruption,
        pytest.raises(Interrupted, match="SIGTERM"),
        interruption.abandonable(),
    ):
        RewardModel([RewardFunction(path=str(path), name="f")])


def test_an_error_without_a_signal_stays_what_it_is():
    with pytest.raises(KeyError), Interruption().abandonable():
        raise KeyError("lost")


def test_the_handlers_from_before_come_back():
    before = [signal.getsignal(number) for number in interruption_lib.SIGNALS]
    with Interruption():
        assert signal.getsignal(signal.SIGTERM) != before[0]
    assert [signal.getsignal(number) for number in interruption_lib.SIGNALS] == before


def test_a_preemption_notice_stops_all_processes_at_the_same_call(monkeypatch):
    calls = []

    def reached(number):
        calls.append(number)
        return number == 3

    monkeypatch.setattr(interruption_lib.jax, "process_count", lambda: 2)
    monkeypatch.setattr(interruption_lib.multihost_utils, "reached_preemption_sync_point", reached)
    monkeypatch.setattr(interruption_lib.multihost_utils, "process_allgather", lambda x: x)
    interruption = Interruption()
    interruption.check()
    interruption.check()
    with pytest.raises(Interrupted, match="a preemption notice"):
        interruption.check()
    assert calls == [1, 2, 3]
