"""The command line on real input: GSM8K, a Hugging Face folder, evaluation, resume and export."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from adpo_jax.log.metrics import read_jsonl
from adpo_jax.policy import Policy

ROOT = Path(__file__).resolve().parents[1]
GSM8K = ROOT.parent / "shared" / "data" / "gsm8k"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not GSM8K.is_dir(),
        reason="GSM8K is not part of the repository: it would be shared/data/gsm8k beside the "
        "checkout",
    ),
]


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env=os.environ
        | {
            "PYTHONPATH": str(ROOT),
            "XLA_FLAGS": "--xla_backend_optimization_level=0",
            "JAX_PLATFORMS": "cpu",
        },
        capture_output=True,
        text=True,
        timeout=500,
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    script = str(ROOT / "scripts" / "make_tiny_model.py")
    made = run(script, f"--text={GSM8K / 'train.jsonl'}", "--out=tiny", cwd=folder)
    assert made.returncode == 0, made.stderr
    return folder / "tiny"


def main(model: Path, workdir: Path, *overrides: str):
    return run(
        "-m",
        "adpo_jax.main",
        f"--config={ROOT / 'configs' / 'gsm8k.py'}",
        f"--workdir={workdir}",
        f"--config.actor_rollout_ref.model.path={model}",
        f"--config.data.train_files={GSM8K / 'train.jsonl'}",
        f"--config.data.val_files={GSM8K / 'test.jsonl'}",
        "--config.data.max_val_samples=8",
        "--config.data.max_prompt_length=256",
        "--config.data.max_response_length=24",
        "--config.data.train_batch_size=4",
        "--config.trainer.bf16=false",
        "--config.actor_rollout_ref.actor.optim.lr_warmup_steps=0",
        "--config.trainer.total_training_steps=2",
        "--config.trainer.save_freq=1",
        "--config.trainer.test_freq=1",
        *overrides,
        cwd=workdir.parent,
    )


def test_gsm8k_trains_evaluates_checkpoints_exports_and_is_not_run_twice(model, tmp_path):
    done = main(model, tmp_path / "run")
    assert done.returncode == 0, done.stderr
    rows = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert all("eval/accuracy" in row for row in rows)
    assert {p.name for p in (tmp_path / "run" / "checkpoints").iterdir()} == {"0", "1", "2"}
    evaluated = (tmp_path / "run" / "samples" / "eval_000002.jsonl").read_text().splitlines()
    assert json.loads(evaluated[0])["solution"] == "18"  # of the test set's first question
    policy, params = Policy.from_pretrained(tmp_path / "run" / "export")
    assert np.isfinite(policy.logits(params, np.arange(12)[None])).all()

    again = main(model, tmp_path / "run")
    assert again.returncode == 0, again.stderr
    assert read_jsonl(tmp_path / "run" / "metrics.jsonl") == rows


def test_gsm8k_with_a_reward_file_under_grpo(model, tmp_path):
    (tmp_path / "rewards.py").write_text(
        "def digits(completions, solution, question, **columns):\n"
        "    assert all(s.lstrip('-').isdigit() for s in solution) and question[0]\n"
        "    return [sum(c.isdigit() for c in x[0]['content']) / 10 for x in completions]\n"
    )
    done = main(
        model,
        tmp_path / "run",
        "--config.custom_reward_function.path=rewards.py",
        "--config.custom_reward_function.name=digits",
        "--config.custom_reward_function.num_workers=1",
        "--config.algorithm.adv_estimator=grpo",
        "--config.data.val_files=",
        "--config.data.max_val_samples=0",
    )
    assert done.returncode == 0, done.stderr
    rows = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2]
    assert all("grpo/loss" in row and "reward/digits" in row for row in rows)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("--config.algorithm.tauu=1", "did you mean algorithm.tau?"),
        ("--config.algorithm.tau=0", "tau must be"),
        ("--config.actor_rollout_ref.model.path=/nowhere", "there is no folder /nowhere"),
        ("--config.data.prompt_key=problem", "problem"),
    ],
)
def test_a_mistake_ends_with_code_2_one_line_and_no_run_folder(model, tmp_path, override, words):
    done = main(model, tmp_path / "run", override)
    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()
