"""The recipes for machines that are not here, run with stand-ins for their tools."""

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import yaml

from adpo_jax.run import exit_codes, roles

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
ARGUMENTS = ["--config=configs/gsm8k.py", "--config.reward_model.reward_kwargs={'a b': \"c$d\"}"]


def stand_in(path: Path, text: str):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def python_that_tells(path: Path, codes: list[int]):
    """A python that writes its arguments down and exits with one code after the other."""
    told, left = path.parent / "told.jsonl", path.parent / "codes"
    path.parent.mkdir(parents=True)
    left.write_text("\n".join(map(str, codes)) + "\n")
    tell = "import json, sys; print(json.dumps(sys.argv[1:]))"
    stand_in(
        path,
        f"{sys.executable} -c '{tell}' \"$@\" >> {told}\n"
        f"code=$(head -n 1 {left}); sed -i 1d {left}; exit $code",
    )
    return told


def told_arguments(told: Path) -> list[list[str]]:
    return [json.loads(line) for line in told.read_text().splitlines()]


@pytest.mark.parametrize(
    ("codes", "attempts"), [([0], 1), ([2], 1), ([exit_codes.HOST_LOST, 75, 0], 3)]
)
def test_every_host_of_a_pod_gets_the_arguments_as_they_were_given(tmp_path, codes, attempts):
    told = python_that_tells(tmp_path / "venv/bin/python", codes)
    # Runs the command of `gcloud ... ssh --command=...` here, and waits for what it leaves behind.
    stand_in(
        tmp_path / "bin/gcloud",
        f'for last; do :; done; cd {tmp_path}; bash -c "${{last#--command=}}\nwait"',
    )
    stand_in(tmp_path / "bin/sleep", "exit 0")
    (tmp_path / "adpo_jax").mkdir()
    done = run_recipe(tmp_path, "launch_tpu_pod.sh", ["train", *ARGUMENTS], PROJECT="p")
    assert done.returncode == 0, done.stderr
    wanted = ["-m", "adpo_jax.main", "--distributed", *ARGUMENTS]
    assert told_arguments(told) == [wanted] * attempts


def test_the_whole_working_tree_is_sent_from_whatever_folder(tmp_path):
    stand_in(tmp_path / "bin/gcloud", f'case "$*" in *scp*) cp "$5" {tmp_path}/sent.tar.gz;; esac')
    done = run_recipe(tmp_path, "launch_tpu_pod.sh", ["install"], PROJECT="p")
    assert done.returncode == 0, done.stderr
    with tarfile.open(tmp_path / "sent.tar.gz") as sent:
        assert {"pyproject.toml", "adpo_jax/train.py"} <= set(sent.getnames())


@pytest.mark.parametrize(
    ("codes", "code", "requeued"), [([5, 0], 0, False), ([3], 3, False), ([75], 0, True)]
)
def test_a_slurm_job_out_of_time_is_queued_again(tmp_path, codes, code, requeued):
    told = python_that_tells(tmp_path / "bin/python", codes)
    stand_in(tmp_path / "bin/srun", 'shift; exec "$@"')
    stand_in(tmp_path / "bin/scontrol", f'echo "$@" > {tmp_path}/requeued')
    stand_in(tmp_path / "bin/sleep", "exit 0")
    done = run_recipe(tmp_path, "launch_slurm.sh", ARGUMENTS, SLURM_JOB_ID="7")
    assert done.returncode == code, done.stderr
    wanted = ["-m", "adpo_jax.main", "--distributed", *ARGUMENTS]
    assert told_arguments(told) == [wanted] * len(codes)
    assert (tmp_path / "requeued").exists() == requeued


def test_samplers_are_started_for_a_trainer_and_end_with_its_run(tmp_path):
    told = python_that_tells(tmp_path / "bin/python", [1, 0])
    stand_in(tmp_path / "bin/srun", 'shift; exec "$@"')
    stand_in(tmp_path / "bin/sleep", "exit 0")
    done = run_recipe(tmp_path, "launch_samplers_slurm.sh", ["--trainer=h:8470", *ARGUMENTS])
    assert done.returncode == 0, done.stderr
    role = ["-m", "adpo_jax.main", "--role=sampler", "--nodistributed", "--trainer=h:8470"]
    assert told_arguments(told) == [[*role, *ARGUMENTS]] * 2
    deployment = yaml.safe_load((SCRIPTS / "launch_samplers_gke.yaml").read_text())
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    assert "--role=sampler" in container["command"]
    assert container["env"][0]["name"] == roles.KEY_VARIABLE


def test_a_gke_job_is_not_repeated_after_a_mistake():
    jobset = yaml.safe_load((SCRIPTS / "launch_gke.yaml").read_text())["spec"]
    (job,) = jobset["replicatedJobs"]
    (rule,) = job["template"]["spec"]["podFailurePolicy"]["rules"]
    mistakes = {exit_codes.USER_ERROR, exit_codes.STOPPED, exit_codes.DISK_ERROR}
    assert set(rule["onExitCodes"]["values"]) == mistakes
    assert jobset["failurePolicy"]["rules"][0]["action"] == "FailJobSet"


def run_recipe(folder: Path, name: str, arguments: list[str], **env: str):
    return subprocess.run(
        ["bash", str(SCRIPTS / name), *arguments],
        env=os.environ | {"PATH": f"{folder}/bin:{os.environ['PATH']}"} | env,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
