"""Runs the command line, and dies by SIGKILL at a chosen place.

    python tests/killable.py PLACE COUNT [flags of adpo_jax.main]

Dies at the COUNT-th time that PLACE is reached; "nowhere" never does.
"""

import json
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


def at(owner, name: str, count: int, *, before: bool):
    """Dies before or after the count-th call of a function."""
    original = getattr(owner, name)
    calls = []

    def wrapped(*args, **kwargs):
        calls.append(name)
        if before and len(calls) == count:
            die()
        result = original(*args, **kwargs)
        if len(calls) == count:
            die()
        return result

    setattr(owner, name, wrapped)


def torn_row(count: int):
    """Half a line of metrics."""
    from adpo_jax.log import metrics

    original = metrics.JsonlWriter.write_scalars
    calls = []

    def write_scalars(self, step, scalars):
        calls.append(step)
        if len(calls) == count:
            self._file.write(json.dumps({"step": step, "time": 0.0})[:13])
            self._file.flush()
            die()
        original(self, step, scalars)

    metrics.JsonlWriter.write_scalars = write_scalars


def arm(place: str, count: int):
    from orbax.checkpoint._src.path import atomicity

    from adpo_jax import train
    from adpo_jax.devices.sharding import BatchSharding
    from adpo_jax.hf import folders
    from adpo_jax.log import metrics
    from adpo_jax.rewards import RewardModel
    from adpo_jax.rollouts import sampler
    from adpo_jax.run import checkpoints, folder
    from adpo_jax.update import sft
    from adpo_jax.update.learner import Learner

    places = {
        "cold start": lambda: at(sft, "make_sft_step", count, before=False),
        "step of the cold start": lambda: at(BatchSharding, "put", count, before=True),
        "rollout": lambda: at(sampler, "generate_and_grade", count, before=True),
        "grading": lambda: at(RewardModel, "score", count, before=True),
        "update": lambda: at(Learner, "learn", count, before=False),
        "evaluation": lambda: at(train, "evaluate", count, before=True),
        "torn row": lambda: torn_row(count),
        "writing a checkpoint": lambda: at(
            checkpoints.ocp.AsyncCheckpointer, "save", count, before=False
        ),
        # Three times a checkpoint: its two parts and the whole.
        "committing a checkpoint": lambda: at(
            atomicity.AtomicRenameTemporaryPath, "finalize", count, before=True
        ),
        "deleting a checkpoint": lambda: at(checkpoints.shutil, "rmtree", count, before=True),
        "purging the metrics": lambda: at(metrics.os, "replace", count, before=True),
        "exporting": lambda: at(folders.weights, "save", count, before=False),
        "noting the export": lambda: at(folder.RunFolder, "note_export", count, before=True),
    }
    if place != "nowhere":
        places[place]()


if __name__ == "__main__":
    _, place, count, *argv = sys.argv
    os.environ["GLIBC_TUNABLES"] = ""  # or the program would be started again, without this
    sys.argv = ["main", *argv]
    from adpo_jax import main

    arm(place, int(count))
    main.run()
