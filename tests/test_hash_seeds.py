"""No order comes from a set: a run leaves the same files whatever Python's hash seed is."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# What differs from run to run by nature, and is left out of the comparison:
# - numbers measured by a clock or of this process: `time` and these metrics of metrics.jsonl;
MEASURED = re.compile(r"time$|time/|memory/|.*(tokens_per_s|mfu|hfu)$")
# - event files of TensorBoard, which have the same metrics, with times, under a name with a time;
# - checkpoints, whose files are named after random numbers and hold times: the state's digest is in
#   export/adpo_jax.json, and the arrays are those of export/model.safetensors.
BY_NATURE = ("tensorboard/", "checkpoints/")


def run_it() -> None:
    """One run with stand-ins for what is sampled; the update, and all that is written, is real."""
    import jax

    import adpo_jax
    from adpo_jax.config import default_config
    from adpo_jax.records import Completion, Completions
    from adpo_jax.run import setup

    class FakeEngine:
        def generate(self, params, prompts, sampling, key, *, version=0, **_):
            def answer(p, g):
                return Completion.sampled([40 + p, 40 + g], [-1.0, -1.0], "stop", version=version)

            groups = [[answer(p, g) for g in range(sampling.n)] for p in range(len(prompts))]
            return Completions(groups)

    def build(config):
        parts = setup.build(config, jax.devices()[:1])
        return dataclasses.replace(parts, engine=FakeEngine())

    config = default_config()
    config.actor_rollout_ref.model.hf_config = {
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "intermediate_size": 8,
    }
    data = {"train_files": "rows.jsonl", "val_files": "one=rows.jsonl,two=rows.jsonl"}
    config.data.update(data, train_batch_size=2, max_prompt_length=16, max_response_length=4)
    config.reward_functions = ({"name": "good_accuracy"}, {"name": "length_penalty", "weight": 0.1})
    config.algorithm.num_generations = 2
    config.eval.category_key = "kind"
    config.trainer.update(
        total_training_steps=1,
        rollout_data_dir="rollouts",
        log_samples_freq=1,
        compilation_cache_dir="../cache",
    )
    adpo_jax.train(config, "run", build=build)


def left_by_a_run(folder: Path, seed: str) -> dict[str, bytes | list]:
    folder.mkdir()
    names = ("alpha", "beta", "gamma", "delta", "epsilon")
    rows = [
        {"question": f"{n} plus 1?", "answer": f"{n + 1}", "kind": f"k{n % 2}"}
        | dict.fromkeys(names, n)
        for n in range(4)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    env = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, __file__], cwd=folder, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    run = folder / "run"
    files = {str(p.relative_to(run)): p.read_bytes() for p in run.rglob("*") if p.is_file()}
    files = {name: content for name, content in files.items() if not name.startswith(BY_NATURE)}
    # It notes where the run was started.
    files["config.json"] = files["config.json"].replace(os.fsencode(folder), b"")
    lines = files["metrics.jsonl"].splitlines()
    files["metrics.jsonl"] = [
        [(k, "" if MEASURED.match(k) else v) for k, v in json.loads(line).items()] for line in lines
    ]
    return files


@pytest.mark.filterwarnings("ignore")
def test_a_run_leaves_the_same_bytes_under_two_hash_seeds(tmp_path):
    first, second = (left_by_a_run(tmp_path / seed, seed) for seed in ("1", "2"))
    assert sorted(first) == sorted(second)
    assert {"rollouts/000001.parquet", "samples/train_000001.jsonl"} <= first.keys()
    for name, content in first.items():
        assert content == second[name], name


if __name__ == "__main__":
    run_it()
