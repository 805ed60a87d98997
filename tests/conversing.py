"""Trains a small random model in conversation with an environment, ahead of the update.

    python tests/conversing.py FOLDER FILES PLACE COUNT

Dies by SIGKILL at a place, as `killable.py` does. The model is random, so what it writes is taken
for calls, and many tokens end a turn.
"""

import dataclasses
import sys
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

# Its answers depend on all calls before, its luck on its seed, and its time on nothing.
ENVIRONMENT = """
import random
import time

class Sum:
    def reset(self, **row):
        self.total, self.calls = random.randrange(10), 0
        return f" Begin at {len(row['question']) % 7}."

    def add(self, number: int) -> str:
        \"\"\"Adds.

        Args:
            number: What to add.
        \"\"\"
        time.sleep(time.time_ns() % 5 / 100)
        self.total += number + random.randrange(10)
        self.calls += 1
        return f"{self.total} after {self.calls}"

    def get_reward(self) -> float:
        time.sleep(time.time_ns() % 3 / 100)
        return float(self.total)
"""
REWARD = """
def spread(completions, environments, **columns):
    return [len(set(str(e.total))) + e.calls / 9 for e in environments]
"""
STEPS = 4
FLAGS = (
    "--config.actor_rollout_ref.model.hf_config="
    "{'hidden_size': 16, 'intermediate_size': 32, 'num_hidden_layers': 1, 'head_dim': 8}",
    "--config.actor_rollout_ref.rollout.max_staleness=2",
    "--config.actor_rollout_ref.rollout.num_slots=4",
    "--config.algorithm.filter_groups=true",
    "--config.algorithm.num_generations=2",
    "--config.anchor.mode=sampler",
    "--config.custom_reward_function.name=spread",
    "--config.data.max_response_length=64",
    "--config.data.max_val_samples=4",
    "--config.data.train_batch_size=4",
    "--config.data.train_max_samples=64",
    "--config.environment.name=Sum",
    "--config.environment.num_workers=2",
    "--config.environment.max_turns=5",
    "--config.environment.overlap_steps=12",
    "--config.sft.steps=0",
    f"--config.trainer.total_training_steps={STEPS}",
    "--config.trainer.save_freq=1",
    "--config.trainer.save_total_limit=4",
    "--config.trainer.test_freq=0",
    "--config.trainer.val_before_train=False",
    "--config.trainer.log_samples_freq=1",
    "--config.trainer.rollout_data_dir=rollouts",
)
# These tokens end a turn.
STOPS = tuple(range(150, 200))


def calls_of(form, text, names):
    """Three of four texts are calls."""
    from adpo_jax.environments.calls import Call

    return [Call("add", {"number": len(text)})] if len(text) % 4 else []


def run(folder: Path, files: Path) -> None:
    """Trains in a folder, or goes on there, with an environment in the folder `files`."""
    import jax
    from parsing import parse

    import adpo_jax
    import adpo_jax.rollouts.conversations as conversations
    from adpo_jax.run import setup

    flags = list(FLAGS)
    for key, content in (("environment", ENVIRONMENT), ("custom_reward_function", REWARD)):
        path = files / f"{key}.py"
        path.write_text(content)
        flags.append(f"--config.{key}.path={path}")

    def build(config):
        parts = setup.build(config, jax.devices()[:1])
        sampling = dataclasses.replace(parts.sampling, stop_token_ids=STOPS)
        return dataclasses.replace(parts, sampling=sampling)

    with mock.patch.object(conversations.calls_lib, "calls_in", calls_of):
        adpo_jax.train(parse(*flags, name="calculator"), folder, build=build)


if __name__ == "__main__":
    import killable

    folder, files, place, count = sys.argv[1:]
    killable.arm(place, int(count))
    run(Path(folder), Path(files))
