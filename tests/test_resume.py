"""A run that is asked to stop and started again ends like one that ran through."""

import shutil

import pytest
from parsing import parse
from test_faults import digests
from test_train import TINY, on_one_device, scalars, train

from adpo_jax.log.metrics import read_jsonl
from adpo_jax.run.checkpoint_files import complete_steps
from adpo_jax.run.guard import Guard
from adpo_jax.run.interruption import Interrupted, Interruption
from adpo_jax.run.preparation import prepare
from adpo_jax.train import run
from adpo_jax.update import SKIPPED

SHORT = (
    *TINY,
    "--config.sft.steps=0",
    "--config.data.val_files=",
    "--config.data.max_val_samples=0",
    "--config.trainer.total_training_steps=3",
    "--config.trainer.save_freq=0",
)
VARIED = ("--config.custom_reward_function.path={}", "--config.custom_reward_function.name=letters")
REWARD = """
def letters(completions, solution, **columns):
    return [float(sum(map(ord, c[0]["content"])) % 3 == 0) for c in completions]
"""


class After(Interruption):
    """Asks the run to stop after so many steps or iterations."""

    def __init__(self, count: int):
        super().__init__()
        self._left = count

    def check(self) -> None:
        if self._left == 0:
            raise Interrupted("a test")
        self._left -= 1


def interrupt(config, folder, count: int):
    """Starts the run, or goes on with it, for so many steps."""
    with pytest.raises(Interrupted):
        run(prepare(config, folder, build=on_one_device), After(count))


def stopped(*_):
    raise Interrupted("a test")


def assert_same(one, other, last: int):
    assert digests(one, last) == digests(other, last)
    assert scalars(one) == scalars(other)


LR = "--config.actor_rollout_ref.actor.optim.lr=0.01"
STATES = {
    "on the host": (
        "--config.anchor.mode=ema",
        "--config.anchor.ema_alpha=0.5",
        "--config.anchor.offload=true",
        "--config.actor_rollout_ref.actor.optimizer_offload=true",
    ),
    "fixed": ("--config.anchor.mode=fixed",),
    "ema": ("--config.anchor.mode=ema", "--config.anchor.ema_alpha=0.5"),
    "kl_triggered": ("--config.anchor.mode=kl_triggered", "--config.anchor.kl_threshold=1e-7"),
    "filter_groups": ("--config.algorithm.filter_groups=true",),
    "ahead": (
        "--config.actor_rollout_ref.rollout.max_staleness=2",
        "--config.anchor.mode=sampler",
    ),
}


@pytest.mark.parametrize("kept", STATES)
def test_what_is_carried_from_one_iteration_to_the_next_survives(tmp_path, kept):
    (tmp_path / "reward.py").write_text(REWARD)
    varied = [flag.format(tmp_path / "reward.py") for flag in VARIED]
    config = parse(*SHORT, *varied, *STATES[kept], LR)
    train(config, tmp_path / "whole")
    first = config
    if kept == "on the host":  # where it lies changes nothing
        first = parse(*SHORT, *varied, *STATES["ema"], LR)
    interrupt(first, tmp_path / "run", 2)
    train(config, tmp_path / "run")
    assert_same(tmp_path / "run", tmp_path / "whole", 3)
    rows = scalars(tmp_path / "whole")
    if kept == "filter_groups":
        assert any(row["filter/carried"] for row in rows)
    if kept == "kl_triggered":
        assert any(row["anchor/renewed"] for row in rows)
    if kept == "ahead":
        assert max(row["ahead/staleness_max"] for row in rows) > 0
        assert rows[1]["ahead/carried_tokens"] > 0


def test_a_cold_start_and_the_evaluation_after_it_go_on_where_they_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr("adpo_jax.run.cold_start._LOG_FREQ", 2)
    config = parse(
        *TINY,
        "--config.sft.steps=7",
        "--config.sft.save_freq=2",
        "--config.trainer.total_training_steps=1",
    )
    train(config, tmp_path / "whole")
    interrupt(config, tmp_path / "run", 0)
    shutil.copytree(tmp_path / "run", tmp_path / "other")
    without = parse(*TINY, "--config.sft.steps=0")
    with pytest.raises(ValueError, match="checkpoint -7 is of a cold start"):
        train(without, tmp_path / "other", allow_config_change=True)
    interrupt(config, tmp_path / "run", 3)
    with monkeypatch.context() as patch:
        patch.setattr("adpo_jax.train.evaluate", stopped)
        with pytest.raises(Interrupted):
            train(config, tmp_path / "run")
    train(config, tmp_path / "run")
    assert_same(tmp_path / "run", tmp_path / "whole", 1)
    rows, whole = (read_jsonl(tmp_path / name / "metrics.jsonl") for name in ("run", "whole"))
    supervised = [
        {k: v for k, v in row.items() if k != "time"} for row in rows if "sft/step" in row
    ]
    assert [(row["step"], row["sft/step"]) for row in supervised] == [
        (-5, 2),
        (-3, 4),
        (-1, 6),
        (0, 7),
    ]
    assert supervised == [{k: v for k, v in r.items() if k != "time"} for r in whole[:4]]


def test_an_interrupted_evaluation_costs_neither_callbacks_nor_the_best_checkpoint(
    tmp_path, monkeypatch
):
    config = parse(
        *SHORT[:-1],
        "--config.data.val_files=embedded:arithmetic",
        "--config.data.max_val_samples=2",
        "--config.trainer.test_freq=1",
        "--config.trainer.save_freq=0",
        "--config.trainer.save_total_limit=1",
        "--config.trainer.best_metric=eval/accuracy",
        "--config.trainer.log_samples_freq=1",
    )
    counted = []
    monkeypatch.setattr(
        Guard, "resume", lambda self, rows: counted.append(sum(SKIPPED in row for row in rows))
    )
    accuracy, called, stops = {0: 0.0, 1: 0.1, 2: 0.7, 3: 0.2}, [], [2]

    def evaluation(run, state):
        step = int(state.step)
        if step in stops:
            stops.remove(step)
            raise Interrupted("a test")
        return {"eval/accuracy": accuracy[step]}

    def callback(iteration):
        called.append(iteration.step)
        return {"mine/step": float(iteration.step)}

    monkeypatch.setattr("adpo_jax.train._evaluation", evaluation)
    with pytest.raises(Interrupted):
        train(config, tmp_path, callbacks=[callback])
    assert (tmp_path / "samples" / "train_000002.jsonl").exists()
    train(config, tmp_path, callbacks=[callback])
    assert called == [1, 2, 3]
    assert counted == [0, 2]  # the second update has no row yet, and counts all the same
    rows = [(row["step"], row.get("mine/step"), row["eval/accuracy"]) for row in scalars(tmp_path)]
    assert rows == [(0, None, 0.0), (1, 1.0, 0.1), (2, 2.0, 0.7), (3, 3.0, 0.2)]
    assert complete_steps(tmp_path / "checkpoints") == [2, 3]


def test_the_best_checkpoint_may_be_the_one_before_training(tmp_path, monkeypatch):
    config = parse(
        *SHORT[:-1],
        "--config.data.val_files=embedded:arithmetic",
        "--config.data.max_val_samples=2",
        "--config.trainer.total_training_steps=1",
        "--config.trainer.save_freq=-1",
        "--config.trainer.best_metric=eval/accuracy",
    )
    monkeypatch.setattr(
        "adpo_jax.train._evaluation",
        lambda run, state: {"eval/accuracy": 0.9 - 0.5 * int(state.step)},
    )
    train(config, tmp_path)
    assert complete_steps(tmp_path / "checkpoints") == [0]


ENDS_OF_AN_EXPORT = {
    "it is stopped": (Interrupted("a test"), False),
    "the disk is full": (OSError(28, "No space left on device"), False),
    "the disk is full for checkpoints too": (OSError(28, "No space left on device"), True),
}


@pytest.mark.parametrize("end", ENDS_OF_AN_EXPORT)
def test_a_run_without_checkpoints_whose_policy_is_not_written_goes_on_from_its_last_state(
    end, tmp_path, monkeypatch, capsys
):
    reason, is_full = ENDS_OF_AN_EXPORT[end]
    config = parse(
        *SHORT[:-1], "--config.trainer.save_freq=-1", "--config.trainer.total_training_steps=1"
    )

    def fail(*_, **__):
        raise reason

    with monkeypatch.context() as patch:
        patch.setattr("adpo_jax.train._export", fail)
        if is_full:
            patch.setattr("adpo_jax.run.checkpoints.ocp.AsyncCheckpointer.save", fail)
        with pytest.raises(type(reason)) as raised:
            train(config, tmp_path)
    assert raised.value is reason
    assert complete_steps(tmp_path / "checkpoints") == ([] if is_full else [1])
    assert ("WARNING: checkpoint" in capsys.readouterr().err) == is_full
    if isinstance(reason, OSError) and not is_full:
        train(config, tmp_path)
        assert (tmp_path / "export" / "config.json").exists()
