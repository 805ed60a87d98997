"""Trains for a long time and watches for growth: memory, threads, open files, recompilations.

    python scripts/soak.py --minutes=60 --out=soak [--config.key=value ...]

The embedded task with small batches, checkpoints, evaluations and samples often, so that an hour
has thousands of iterations. A line a sample goes to `<out>/soak.jsonl`; the summary compares the
median of the last tenth of the samples with that of the tenth after the warm-up (the first fifth).
"""

import contextlib
import json
import logging as logging_lib
import os
import statistics
import sys
import threading
import time
from pathlib import Path

import jax
from absl import app, flags, logging
from ml_collections import config_flags

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

ROOT = Path(__file__).resolve().parents[1]
_CONFIG = config_flags.DEFINE_config_file("config", str(ROOT / "configs" / "arithmetic.py"))
_MINUTES = flags.DEFINE_float("minutes", 60.0, "how long; time in which the process is stopped too")
_OUT = flags.DEFINE_string("out", "soak", "folder of the run and of soak.jsonl")
_EVERY = flags.DEFINE_float("every", 5.0, "seconds between two samples")

GROWTH_LIMIT = 0.03


def main(argv):
    from adpo_jax import train
    from adpo_jax.run import preparation, setup

    logging.set_verbosity(logging.WARNING)
    config = _CONFIG.value
    with config.unlocked():
        config.data.train_batch_size = 4
        config.data.max_val_samples = 32
        config.trainer.total_training_steps = 1_000_000
        config.trainer.save_freq = 25
        config.trainer.test_freq = 50
        config.trainer.log_samples_freq = 10
        config.trainer.best_metric = "eval/accuracy"
        config.trainer.rollout_data_dir = "rollouts"
        config.actor_rollout_ref.actor.optim.lr = 1e-5
        config.trainer.grace_period_s = 300.0
    compilations = Compilations()
    out = Path(_OUT.value)
    prepared = preparation.prepare(config, out / "run")
    with setup.make_interruption(config) as interruption:
        watch = threading.Thread(target=_watch, args=(out, compilations), daemon=True)
        watch.start()
        with contextlib.suppress(train.Interrupted):
            train.run(prepared, interruption)
    print(json.dumps(summary(out / "soak.jsonl"), indent=2))


class Compilations(logging_lib.Handler):
    """Counts what JAX compiles, and how many programs it compiled before in the same process.

    Packed batches come in some dozens of sizes, a program for each: a rare one is compiled late.
    """

    def __init__(self):
        super().__init__()
        self.programs, self.again = set(), 0
        jax.config.update("jax_log_compiles", True)
        logger = logging_lib.getLogger("jax")
        logger.propagate = False
        logger.handlers = [self]

    def emit(self, record):
        text = record.getMessage()
        if text.startswith("Compiling "):
            self.again += text in self.programs
            self.programs.add(text)


def _watch(out: Path, compilations: Compilations) -> None:
    """Samples until the time is over, then asks the run to stop."""
    metrics = out / "run" / "metrics.jsonl"
    counted, place, running_s, last = 0, 0, 0.0, time.monotonic()
    with (out / "soak.jsonl").open("w") as file:
        while running_s < _MINUTES.value * 60:
            time.sleep(_EVERY.value)
            now = time.monotonic()
            running_s += min(now - last, 2 * _EVERY.value)  # not what it was stopped for
            last = now
            if metrics.exists():
                with metrics.open("rb") as rows:
                    rows.seek(place)
                    new = rows.read()
                counted, place = counted + new.count(b"\n"), place + len(new)
            status = Path("/proc/self/status").read_text()
            sample = {
                "running_s": round(running_s, 1),
                "rows": counted,
                "rss_mb": round(int(status.split("VmRSS:")[1].split()[0]) / 1024, 1),
                "threads": int(status.split("Threads:")[1].split()[0]),
                "files": len(os.listdir("/proc/self/fd")),
                "programs": len(compilations.programs),
                "compiled_again": compilations.again,
            }
            file.write(json.dumps(sample) + "\n")
            file.flush()
    os.kill(os.getpid(), 15)


def summary(path: Path) -> dict:
    """Everything in the first and the last tenth after the warm-up, and the growth of memory."""
    samples = [json.loads(line) for line in path.read_text().splitlines()]
    tenth = max(len(samples) // 10, 1)
    warm = samples[len(samples) // 5 :]
    first, last = warm[:tenth], warm[-tenth:]

    growth = {"rss_mb": [statistics.median(s["rss_mb"] for s in part) for part in (first, last)]}
    for name in ("threads", "files", "programs", "compiled_again"):
        # The least: a save in the background has threads and files of its own.
        growth[name] = [min(sample[name] for sample in part) for part in (first, last)]
    rss_growth = growth["rss_mb"][1] / growth["rss_mb"][0] - 1
    flat = all(
        growth[name][1] <= growth[name][0] for name in ("threads", "files", "compiled_again")
    )
    return {
        "minutes": round(samples[-1]["running_s"] / 60, 1),
        "rows": samples[-1]["rows"],
        **growth,
        "rss_growth": round(rss_growth, 4),
        "flat": flat and rss_growth < GROWTH_LIMIT,
    }


if __name__ == "__main__":
    from adpo_jax.devices.host_memory import tune_malloc

    tune_malloc()
    app.run(main)
