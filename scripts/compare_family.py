"""Compares every loss of the trainer on one task, each at its own best settings.

    python scripts/compare_family.py --out runs/family                       # all of it, hours
    python scripts/compare_family.py --out runs/family --results docs/results/family.json
    python scripts/compare_family.py --task word_problems --model FOLDER --out runs/words   # hours

The task is the embedded one, or word problems with a real language model (configs/smollm2.py), for
which nothing is searched.

First each method's learning rate and gradient clip are searched on seeds that are in no table, at
one update an iteration; then it runs with the best of them under every condition: one and four
updates, rewards with a fifth of the verdicts flipped, samples that are up to one, two and four
updates old since the prompts of an iteration are cut into as many more updates, and rollouts ahead
of the update. Under four updates the learning rate is searched again for a condition of its own.
Runs that are finished are not repeated, so the same command goes on where it stopped; two processes
may share the work by methods (`--methods`, after `--starts`). With `--results`, what is finished is
written to that file, in place of what it has of the same methods and conditions, and its tables and
pictures beside it; `--tables` makes these from the file alone.
"""

import argparse
import dataclasses
import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from compare import (
    METHODS,
    START_KL,
    common_start,
    forget_programs,
    mean_and_interval,
    measures,
    read_config,
    run,
)
from ml_collections import ConfigDict

from adpo_jax.config import default_config
from adpo_jax.devices import compilation_cache
from adpo_jax.devices.host_memory import tune_malloc
from adpo_jax.log.printable import guard, say_error
from adpo_jax.report.figures import Picture
from adpo_jax.report.page import t_quantile
from adpo_jax.report.runs import Run
from adpo_jax.run.command_line import unless_interrupted
from adpo_jax.run.exit_codes import USER_ERROR
from adpo_jax.run.guard import TrainingStopped

ROOT = Path(__file__).resolve().parents[1]
FLIPPED = {
    "custom_reward_function.path": str(ROOT / "scripts" / "flipped_verdicts.py"),
    "custom_reward_function.name": "flipped_accuracy",
    "reward_model.reward_kwargs": {"rate": 0.2},
}


METHOD_NAMES = tuple(name for name in METHODS if name != "adpo-fixed")
ONE_UPDATE, OWN_RATE = "1 update", "4 updates, own rate"
LR, CLIP = "actor_rollout_ref.actor.optim.lr", "actor_rollout_ref.actor.grad_clip"
MODEL = "actor_rollout_ref.model.path"


@dataclasses.dataclass(frozen=True)
class Task:
    """What the methods are compared on.

    Attributes:
      config: the config file, of `configs/`.
      prompts: those of an update.
      updates: updates of a run.
      common: further changes of the config for all methods.
      grids: the settings that are searched, as changes of the config, under the conditions that
        have a search of their own; the others take what is best at one update. A setting alone is
        just taken.
      seeds: those of the tables.
      search_seeds: those of the search, none of them in a table.
    """

    config: str
    prompts: int
    updates: int
    common: dict
    grids: dict[str, list[dict]]
    seeds: tuple[int, ...]
    search_seeds: tuple[int, ...]


def _grid(rates: Sequence[float], clips: Sequence[float]) -> list[dict]:
    """Every learning rate with every norm that gradients are clipped to; 0 for none."""
    return [{LR: lr, CLIP: clip} for clip in clips for lr in rates]


TASKS = {
    "arithmetic": Task(
        config=str(ROOT / "configs" / "arithmetic.py"),
        prompts=8,
        updates=40,
        common={
            "actor_rollout_ref.actor.layout": "rows",  # one program a method, whatever the lengths
            "trainer.log_samples_freq": 0,
            "trainer.save_freq": 0,
            "trainer.test_freq": 10,
        },
        grids={
            ONE_UPDATE: _grid((2.5e-4, 5e-4, 1e-3), clips=(1.0, 0)),
            OWN_RATE: _grid((6.25e-5, 1.25e-4, 2.5e-4, 5e-4), clips=(1.0,)),
        },
        seeds=(0, 1, 2, 3, 4),
        search_seeds=(10, 11),
    ),
    "word_problems": Task(
        config=str(ROOT / "configs" / "smollm2.py"),
        prompts=16,
        updates=10,
        common={
            "trainer.log_samples_freq": 0,
            "trainer.save_freq": 0,
            "trainer.test_freq": 5,
        },
        grids={ONE_UPDATE: [{LR: 2e-5, CLIP: 1.0}]},  # the config's: a run takes eight minutes
        seeds=(0, 1, 2),
        search_seeds=(),
    ),
}


def _cut(task: Task, batches: int = 1) -> dict:
    """An iteration's prompts cut into so many updates, one on each part of them.

    The last of these updates trains on samples from before all the others. Runs have as many
    updates, but for what does not divide, and prompts in each, however they are cut.
    """
    iterations = task.updates // batches
    cut = {
        "data.train_batch_size": task.prompts * batches,
        "trainer.total_training_steps": iterations,
    }
    if batches > 1:
        cut["actor_rollout_ref.actor.ppo_mini_batch_size"] = task.prompts
        cut["trainer.test_freq"] = iterations
    return cut


def _behind(most: int) -> dict:
    """Rollouts ahead of the update, each loss anchored at the policy that drew a token."""
    return {"actor_rollout_ref.rollout.max_staleness": most, "anchor.mode": "sampler"}


FOUR_EPOCHS = {"actor_rollout_ref.actor.ppo_epochs": 4}

# Settings are judged by their rewards, so runs of the search are not evaluated.
UNSEEN = {"data.val_files": ""}

# What differs under each condition from one update an iteration.
CONDITIONS = {
    ONE_UPDATE: lambda task: {},
    "4 updates": lambda task: FOUR_EPOCHS,
    OWN_RATE: lambda task: FOUR_EPOCHS,
    "20% flipped": lambda task: FLIPPED,
    "up to 1 update old": lambda task: _cut(task, 2),
    "up to 2 updates old": lambda task: _cut(task, 3),
    "up to 4 updates old": lambda task: _cut(task, 5),
    "ahead by 2": lambda task: _behind(2),
    "ahead by 4": lambda task: _behind(4),
}

# A run has collapsed where the rewards of its last eighth are less than this share of those of the
# best one.
COLLAPSE = 0.5
ENTROPY = "rollout/entropy"


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--task", choices=TASKS, default="arithmetic")
    parser.add_argument("--model", help="folder of the model, for a task that would download it")
    parser.add_argument("--out", type=Path, default=Path("runs/family"), help="folder of the runs")
    parser.add_argument("--methods", nargs="+", choices=METHOD_NAMES, default=METHOD_NAMES)
    parser.add_argument("--starts", action="store_true", help="make the common starts and stop")
    parser.add_argument("--conditions", nargs="+", choices=CONDITIONS, default=list(CONDITIONS))
    parser.add_argument("--results", type=Path, help="JSON file to bring up to date; runs nothing")
    parser.add_argument(
        "--tables", type=Path, help="JSON file to make tables and pictures of; runs nothing"
    )
    return parser.parse_args(argv)


class Family:
    """The runs of the comparison in a folder.

    Args:
      model: a folder with the task's model; None for the config's own.
    """

    def __init__(self, out: Path, task: Task, model: str | None = None):
        self.out, self.task = out, task
        self.common = task.common | _cut(task) | ({MODEL: model} if model else {})

    def config(self, changes: dict, seed: int) -> ConfigDict:
        start = common_start(self.task.config, self.out / "start", self.common, seed)
        return read_config(self.task.config, self.common | changes | start | {"trainer.seed": seed})

    def folder(self, condition: str, method: str, seed: int, settings: dict | None = None) -> Path:
        """Where a run lies; of the search, with its settings."""
        name = method
        if settings:
            name += f"-lr{settings[LR]:g}-clip{settings[CLIP]:g}"
        return self.out / re.sub(r"[ ,]+", "-", condition).replace("%", "pc") / name / f"seed{seed}"

    def run(self, changes: dict, seed: int, folder: Path) -> None:
        run(self.config(changes, seed), folder)

    def search(self, condition: str, method: str) -> None:
        """Runs every setting of the grid that the condition goes by."""
        condition = self.searched_under(condition)
        for settings in self.task.grids[condition]:
            for seed in self.task.search_seeds:
                changes = METHODS[method] | settings | CONDITIONS[condition](self.task) | UNSEEN
                self.run(changes, seed, self.folder(f"search {condition}", method, seed, settings))

    def searched_under(self, condition: str) -> str:
        """The condition under which the settings for this one are searched."""
        return condition if condition in self.task.grids else ONE_UPDATE

    def searched(self, condition: str, method: str) -> list[dict]:
        """The settings that were tried, with the mean reward over all iterations and seeds."""
        found = []
        for settings in self.task.grids[condition]:
            folders = [
                self.folder(f"search {condition}", method, seed, settings)
                for seed in self.task.search_seeds
            ]
            rewards = [measures(Run.read(f))["reward, all iterations"] for f in folders]
            reward = round(float(np.mean(rewards)), 4) if rewards else None
            found.append({"lr": settings[LR], "clip": settings[CLIP], "reward": reward})
        return found

    def best(self, condition: str, method: str) -> dict:
        """The best settings of a method under a condition, as changes of the config."""
        tried = self.searched(self.searched_under(condition), method)
        best = max(tried, key=lambda one: one["reward"])
        return {LR: best["lr"], CLIP: best["clip"]}

    def finished(self) -> Iterator[tuple[str, str, int, Path]]:
        """Condition, method, seed and folder of the runs that are done."""
        for condition in CONDITIONS:
            for method in METHOD_NAMES:
                for seed in self.task.seeds:
                    folder = self.folder(condition, method, seed)
                    if (folder / "export").exists():
                        yield condition, method, seed, folder


def result(run: Run) -> dict:
    """What the comparison keeps of a run."""
    found, entropy = measures(run), list(run.series(ENTROPY).values())
    rewards = list(run.series("reward/mean").values())
    length = max(1, len(rewards) // 8)
    recent = np.convolve(rewards, np.ones(length) / length, "valid")
    last = max(1, len(rewards) // 4)
    staleness = list(run.series("ahead/staleness_mean").values())
    kept = {
        "accuracy": list(run.series("eval/accuracy").values()),
        "rewards": rewards,
        "final": found["final accuracy"],
        "reward": found["reward, all iterations"],
        "kl": float(np.mean(list(run.series(START_KL).values())[-last:])),
        "entropy": float(np.mean(entropy[-last:])),
        "collapsed": bool(recent[-1] < COLLAPSE * recent.max()),
    }
    if staleness:
        kept["staleness"] = float(np.mean(staleness))
    return json.loads(json.dumps(kept), parse_float=lambda text: round(float(text), 4))


def results(family: Family) -> dict:
    """All that is finished: settings tried of each method, and its runs by condition and seed.

    A method is left out of a condition until all its seeds are done.
    """
    environment = {}
    runs: dict = {}
    for condition, method, seed, folder in family.finished():
        found = Run.read(folder)
        environment = found.environment
        runs.setdefault(condition, {}).setdefault(method, {})[str(seed)] = result(found)
    seeds = len(family.task.seeds)
    whole = {
        condition: {method: done for method, done in by_method.items() if len(done) == seeds}
        for condition, by_method in runs.items()
    }
    runs = {condition: by_method for condition, by_method in whole.items() if by_method}
    searches: dict = {}
    for condition, by_method in runs.items():
        searched = family.searched_under(condition)
        for method in by_method:
            searches.setdefault(searched, {})[method] = family.searched(searched, method)
    return {
        "common": family.task.common | _cut(family.task),
        "versions": {k: environment[k] for k in ("jax", "commit") if k in environment},
        "search": searches,
        "runs": runs,
    }


def merged(earlier: dict, found: dict) -> dict:
    """Results in which what `found` has of a method and condition takes the place of before."""

    def by_method(name: str, condition: str) -> dict:
        both = earlier.get(name, {}).get(condition, {}) | found[name].get(condition, {})
        return {method: both[method] for method in METHOD_NAMES if method in both}

    both = {
        name: {condition: by_method(name, condition) for condition in CONDITIONS}
        for name in ("search", "runs")
    }
    return found | {
        name: {condition: methods for condition, methods in by_condition.items() if methods}
        for name, by_condition in both.items()
    }


def table(found: dict, condition: str) -> str:
    """One condition: a line a method, and its difference in accuracy to ADPO seed by seed."""
    header = [
        "method",
        "lr, clip",
        "final accuracy",
        "less adpo",
        "reward, all iterations",
        "less adpo",
    ]
    header += ["KL from the start", "entropy", "collapsed"]
    lines = [header, ["---"] * len(header)]
    runs = found["runs"][condition]
    adpo = runs.get("adpo", {})
    searches = found["search"].get(ONE_UPDATE, {}) | found["search"].get(condition, {})
    for method, by_seed in runs.items():
        best = max(searches[method], key=lambda tried: tried["reward"])
        rows = list(by_seed.values())
        cells = [method, f"{best['lr']:g}, {best['clip'] or 'none'}"]
        for name in ("final", "reward"):
            cells.append(mean_and_interval([row[name] for row in rows]))
            pairs = [(row[name], adpo[seed][name]) for seed, row in by_seed.items() if seed in adpo]
            cells.append("" if method == "adpo" else marked([a - b for a, b in pairs]))
        cells += [mean_and_interval([row[name] for row in rows]) for name in ("kl", "entropy")]
        cells.append(f"{sum(row['collapsed'] for row in rows)} of {len(rows)}")
        lines.append(cells)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def table_of_search(search: dict) -> str:
    """The mean reward of every setting that was tried, a line a method, the best one bold."""
    settings = list(next(iter(search.values())))
    names = [f"{one['lr']:g}, {one['clip'] or 'none'}" for one in settings]
    lines = [["method", *names], ["---"] * (len(names) + 1)]
    for method, tried in search.items():
        rewards = [one["reward"] for one in tried]
        cells = [f"**{r:.3f}**" if r == max(rewards) else f"{r:.3f}" for r in rewards]
        lines.append([method, *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def marked(differences: list[float]) -> str:
    """A mean with its interval, bold where the interval leaves out 0."""
    text = mean_and_interval(differences)
    mean, half = interval(differences)
    return f"**{text}**" if abs(mean) > half else text


def interval(values: list[float]) -> tuple[float, float]:
    """The mean, and half of its 95% interval by Student's t (infinite for a single value)."""
    if len(values) < 2:
        return float(np.mean(values)), float("inf")
    half = t_quantile(len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values))
    return float(np.mean(values)), float(half)


def picture(found: dict, name: str) -> Picture:
    """Final accuracy of every method under every condition, with intervals over seeds."""
    conditions = list(found["runs"])
    of_any = {method for by_method in found["runs"].values() for method in by_method}
    methods = sorted(of_any, key=METHOD_NAMES.index)

    def draw(axes):
        for number, condition in enumerate(conditions):
            runs = found["runs"][condition]
            shown = [method for method in methods if method in runs]
            both = [interval([row["final"] for row in runs[method].values()]) for method in shown]
            mean, half = np.array(both).T
            offset = (number - (len(conditions) - 1) / 2) * 0.8 / len(conditions)
            places = np.array([methods.index(method) for method in shown]) + offset
            low = np.minimum(half, mean)
            high = np.minimum(half, 1 - mean)
            axes.errorbar(places, mean, [low, high], fmt="o", ms=3, lw=1, label=condition)
        axes.set_xticks(range(len(methods)), methods, rotation=45, ha="right")
        axes.set_ylim(0, 1.02)

    seeds = max(len(by_seed) for runs in found["runs"].values() for by_seed in runs.values())
    return Picture(name, f"Final accuracy, {seeds} seeds", draw, size=(8, 3.6))


def write_tables(path: Path) -> None:
    """Prints the tables of a results file, and draws its picture beside the docs' others."""
    found = json.loads(path.read_text())
    for condition, search in found["search"].items():
        if any(len(tried) > 1 for tried in search.values()):
            print(f"**lr, clip: {condition}**\n\n{table_of_search(search)}")
    for condition in found["runs"]:
        print(f"**{condition}**\n\n{table(found, condition)}")
    picture(found, f"{path.stem}_accuracy").save_png(path.parent)


def work(family: Family, methods: Sequence[str], conditions: Sequence[str]) -> None:
    """The runs of these methods under these conditions, and the searches that they need."""
    grids = family.task.grids
    for condition in [c for c in conditions if c != OWN_RATE or c in grids]:
        for method in methods:
            family.search(condition, method)
            best = family.best(condition, method)
            for seed in family.task.seeds:
                changes = METHODS[method] | best | CONDITIONS[condition](family.task)
                family.run(changes, seed, family.folder(condition, method, seed))
            forget_programs()


def main(argv: list[str] | None = None) -> int:
    """Does what the command line says; returns the exit code."""
    a = arguments(argv)
    try:
        if a.tables:
            write_tables(a.tables)
            return 0
        task = TASKS[a.task]
        family = Family(a.out, task, a.model)
        if a.results:
            found = results(family)
            if not found["runs"]:
                raise ValueError(f"{a.out} has no method whose runs are all finished")
            a.results.parent.mkdir(parents=True, exist_ok=True)
            earlier = json.loads(a.results.read_text()) if a.results.exists() else {}
            unfinished = a.results.with_name(f"{a.results.name}.tmp")
            unfinished.write_text(json.dumps(merged(earlier, found)) + "\n")
            unfinished.replace(a.results)
            write_tables(a.results)
            return 0
        if a.starts:
            for seed in (*task.seeds, *task.search_seeds):
                family.config({}, seed)
            return 0
        compilation_cache.use(default_config().trainer.compilation_cache_dir)
        work(family, a.methods, a.conditions)
    except (OSError, ValueError, TrainingStopped) as error:
        say_error(error)
        return USER_ERROR
    return 0


if __name__ == "__main__":
    guard()
    tune_malloc()
    sys.exit(unless_interrupted(main))
