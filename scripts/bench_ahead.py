"""How soon a run with long-tailed completions learns, by staleness and loss.

    python scripts/bench_ahead.py --out runs/ahead

The embedded task, of which a few percent of the problems ask for ten checks: the working is then
written ten times over, as a second cold start shows. So a few percent of the samples are ten times
as long. Of one seed all runs start from the same weights (`scripts/compare.py`). Losses:

    adpo       the sampler's log-probs are the anchor (anchor.mode=sampler)
    grpo       the ratio is to the policy before the update, and not corrected
    grpo_tis   the same with truncated importance weights of the sampler

One JSON line a loss and staleness: seconds (rollout, reward, anchor and update; no evaluation and
no compiling) and iterations until 80% of the held-out problems are right, the accuracy at the end,
its difference to staleness 0 and the speed-up over it, seed by seed, with half of the 95% interval;
runs that never came to 80% are counted.
"""

import argparse
import json
import random
import sys
import time
from pathlib import Path

import jax
import numpy as np
from option_types import integer, real

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import compare

from adpo_jax.data import arithmetic
from adpo_jax.devices.host_memory import tune_malloc
from adpo_jax.report import page
from adpo_jax.report.runs import Run

TAIL, TAIL_SHOWN = 0.04, 0.3  # the share of problems that ask for checks, and of demonstrations
TIMES, MARKER = 10, " 10 #"
MARK = 0.8
LOSSES = {
    "adpo": ["algorithm.adv_estimator=adpo", "anchor.mode=sampler"],
    "grpo": ["algorithm.adv_estimator=grpo", "algorithm.sampler_correction=none"],
    "grpo_tis": ["algorithm.adv_estimator=grpo", "algorithm.sampler_correction=truncate"],
}
ROLLOUT = "actor_rollout_ref.rollout"
TIMES_OF = ("time/rollout", "time/reward", "time/anchor", "time/update")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", nargs="+", type=integer(0), default=[0, 1, 2])
    parser.add_argument(
        "--staleness", nargs="+", type=integer(0), default=[0, 1, 2, 4], help="0 comes first"
    )
    parser.add_argument("--losses", nargs="+", choices=LOSSES, default=list(LOSSES))
    parser.add_argument("--iterations", type=integer(1), default=40)
    parser.add_argument(
        "--test-freq", type=integer(1), default=1, help="iterations between evaluations"
    )
    parser.add_argument(
        "--prompts", type=integer(1), default=16, help="of an iteration, 8 samples each"
    )
    parser.add_argument("--lr", type=real(above=0), default=4e-4)
    a = parser.parse_args()
    a.staleness = sorted({0, *a.staleness})
    return a


def write_problems(folder: Path) -> dict[str, Path]:
    """The problems of the embedded task by their split; a share of them asks for checks."""
    found, rng = {}, random.Random(0)
    for split, share in (("train", TAIL), ("val", TAIL), ("demonstrations", TAIL_SHOWN)):
        columns = arithmetic.rows(split)
        rows = [dict(zip(columns, values)) for values in zip(*columns.values())]
        for row in rows:
            if rng.random() >= share:
                continue
            row["question"] += MARKER
            if "completion" in row:
                working, _, result = row["answer"].rpartition(" #### ")
                checks = " ".join(f"{i}. {working}" for i in range(1, TIMES + 1))
                row["completion"] = f"{checks} #### {result}"
        found[split] = folder / f"{split}.jsonl"
        found[split].parent.mkdir(parents=True, exist_ok=True)
        found[split].write_text("".join(json.dumps(row) + "\n" for row in rows))
    return found


def common(a: argparse.Namespace, base: str, files: dict[str, Path], iterations: int) -> list[str]:
    """What all runs have in common, as KEY=VALUE.

    Args:
      base: the folder of the policy whose cold start goes on.
    """
    return [
        f"actor_rollout_ref.model.path={base}",
        f"sft.train_files={files['demonstrations']}",
        f"data.train_files={files['train']}",
        f"data.val_files={files['val']}",
        "data.max_prompt_length=32",
        "sft.steps=120",
        "sft.batch_size=16",
        "data.max_response_length=260",
        f"data.train_batch_size={a.prompts}",
        f"actor_rollout_ref.actor.optim.lr={a.lr}",
        f"trainer.total_training_steps={iterations}",
        "trainer.save_freq=0",
        "trainer.log_samples_freq=0",
    ]


def made_of(loss: str, staleness: int) -> tuple[str, int]:
    """The loss and staleness whose runs stand for these; without any GRPO corrects nothing."""
    return (loss if staleness or loss != "grpo_tis" else "grpo"), staleness


def variants(losses: list[str], staleness: list[int]) -> list[str]:
    """The options of `compare.py` for these runs, LOSS_STALENESS by name."""
    options = []
    for loss, s in dict.fromkeys(made_of(loss, s) for loss in losses for s in staleness):
        options += ["--variant", f"{loss}_{s}", *LOSSES[loss]]
        options.append(f"{ROLLOUT}.max_staleness={s}")
    return options


def note_compiling(path: Path) -> None:
    """Has the seconds of each compilation written down, with the time of its end."""
    jax.config.update("jax_compilation_cache_dir", str(path.parent / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    file = path.open("a", buffering=1)

    def note(name: str, seconds: float, **_) -> None:
        if name.endswith(("backend_compile_duration", "jaxpr_to_mlir_module_duration")):
            file.write(json.dumps([time.time(), seconds]) + "\n")

    jax.monitoring.register_event_duration_secs_listener(note)


def compiling_in(out: Path, ends: list[float]) -> np.ndarray:
    """Seconds of compiling in each of the intervals between these times."""
    lines = (out / "compiling.jsonl").read_text().splitlines()
    at, seconds = np.array([json.loads(line) for line in lines]).reshape(-1, 2).T
    found = np.zeros(len(ends) + 1)
    np.add.at(found, np.searchsorted(ends, at), seconds)
    return found[1:-1]


def of_runs(out: Path, loss: str, staleness: int, seeds: list[int]) -> list[dict]:
    """What the runs of a loss and staleness came to, seed by seed."""
    loss, staleness = made_of(loss, staleness)
    found = []
    for seed in seeds:
        run = Run.read(out / f"{loss}_{staleness}" / f"seed{seed}")
        accuracy = run.series("eval/accuracy")
        rows = [row for row in run.rows if "time/update" in row]
        ends = [run.rows[run.rows.index(rows[0]) - 1]["time"], *(row["time"] for row in rows)]
        spent = np.array([sum(row.get(name, 0) for name in TIMES_OF) for row in rows])
        seconds = np.cumsum(np.maximum(spent - compiling_in(out, ends), 0))
        at = {row["step"]: s for row, s in zip(rows, seconds)}
        reached = next((step for step, value in accuracy.items() if value >= MARK), None)
        found.append(
            {
                "seconds": np.nan if reached is None else at[reached],
                "iterations": np.nan if reached is None else reached,
                "accuracy": accuracy[max(accuracy)],
                "seconds_an_iteration": seconds[-1] / len(rows),
                "length_mean": np.mean(list(run.series("rollout/length_mean").values())),
                "length_max": np.max(list(run.series("rollout/length_max").values())),
            }
        )
    return found


def half_interval(values: np.ndarray) -> float | None:
    """Half of the 95% interval of the mean, by Student's t; None of fewer than two values."""
    values = values[np.isfinite(values)]
    if len(values) < 2:
        return None
    return page.t_quantile(len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))


def told(a: argparse.Namespace) -> None:
    """Prints a line a loss and staleness."""
    for loss in a.losses:
        bases = of_runs(a.out, loss, a.staleness[0], a.seeds)
        for staleness in a.staleness:
            runs = of_runs(a.out, loss, staleness, a.seeds)
            line = {"loss": loss, "staleness": staleness, "seeds": len(runs)}
            for name in runs[0]:
                values = np.array([run[name] for run in runs])
                line[name] = float(np.nanmean(values)) if np.isfinite(values).any() else None
            line["never"] = int(np.isnan([run["seconds"] for run in runs]).sum())
            pairs = list(zip(runs, bases))
            speed_up = np.array([base["seconds"] / run["seconds"] for run, base in pairs])
            lost = np.array([run["accuracy"] - base["accuracy"] for run, base in pairs])
            for name, values in (("speed_up", speed_up), ("accuracy_difference", lost)):
                line[name] = float(np.nanmean(values)) if np.isfinite(values).any() else None
                line[f"{name}_half"] = half_interval(values)
            rounded = {k: round(v, 4) if isinstance(v, float) else v for k, v in line.items()}
            print(json.dumps(rounded), flush=True)


def run_all(argv: list[str]) -> None:
    """Runs what a command line of `compare.py` says."""
    if code := compare.main(argv):
        sys.exit(code)


def main() -> None:
    a = arguments()
    files = write_problems(a.out / "problems")
    note_compiling(a.out / "compiling.jsonl")
    longer = {"actor_rollout_ref.model.hf_config": {"max_position_embeddings": 512}}
    begun = compare.common_start("configs/arithmetic.py", a.out / "base", longer, 0)
    base = begun["actor_rollout_ref.model.path"]
    settings = [*common(a, base, files, a.iterations), f"trainer.test_freq={a.test_freq}"]
    seeds = map(str, a.seeds)
    made = variants(a.losses, a.staleness)
    run_all(["--out", str(a.out), "--seeds", *seeds, *made, "--set", *settings])
    told(a)


if __name__ == "__main__":
    tune_malloc()
    main()
