"""Trains several methods on one task and budget, seed by seed, and compares what they learn.

    python scripts/compare.py --out runs/compare --methods adpo adpo-fixed grpo rloo --seeds 0 1 2
    python scripts/compare.py --out runs/tau --seeds 0 1 --set trainer.total_training_steps=30 \\
        --variant tau-0.2 algorithm.tau=0.2 --variant tau-1.6 algorithm.tau=1.6

Of one seed, every method starts from the same weights (the supervised stage of the config, where
it has one, runs once a seed and is kept in `OUT/start/`), sees the same prompts in the same order,
draws as many completions of at most as many tokens with the same sampler keys, and takes as many
optimizer steps. Each iteration also measures how far the policy that sampled has moved from the
start, in nats a completion (`compare/start_kl`). Runs that are finished are not repeated, so the
same command goes on where it stopped; a folder whose run had other settings is refused. A run that
trainer.on_bad_update stops is told of and left out, and the others go on (without a common start
nothing does). At the end `OUT/comparison.md` has a table, `OUT/report.html` the curves.
"""

import argparse
import ast
import dataclasses
import gc
import runpy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone needs no installation

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from adpo_jax import train
from adpo_jax.config import default_config
from adpo_jax.devices import compilation_cache
from adpo_jax.devices.host_memory import tune_malloc
from adpo_jax.log.printable import guard, say, say_error
from adpo_jax.losses import ALGORITHMS
from adpo_jax.report import page
from adpo_jax.report.runs import Run
from adpo_jax.run import preparation
from adpo_jax.run.command_line import unless_interrupted
from adpo_jax.run.config_checks import check_overrides, finalized
from adpo_jax.run.exit_codes import USER_ERROR
from adpo_jax.run.folder import RunFolder
from adpo_jax.run.guard import TrainingStopped
from adpo_jax.update.learner import Learner

METHODS = {
    name: {"algorithm.adv_estimator": name}
    for name, algorithm in ALGORITHMS.items()
    if not algorithm.needs_teacher
} | {"adpo-fixed": {"algorithm.adv_estimator": "adpo", "algorithm.use_adaptive_tau": False}}

START_KL = "compare/start_kl"

# What the weights after the supervised stage depend on; a name stands for all that begin with it.
OF_THE_START = (
    "actor_rollout_ref.model.",
    "actor_rollout_ref.actor.grad_clip",
    "actor_rollout_ref.actor.layout",
    "data.allow_control_tokens",
    "data.prompt_",
    "data.system_prompt",
    "data.apply_chat_template",
    "data.chat_template_kwargs",
    "data.max_prompt_length",
    "data.max_response_length",
    "data.overlong_prompts",
    "data.train_split",
    "environment.",
    "sft.",
    "trainer.bf16",
    "trainer.per_device_train_batch_size",
    "trainer.seed",
)


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", default="configs/arithmetic.py")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=[])
    parser.add_argument(
        "--variant",
        nargs="+",
        action="append",
        default=[],
        metavar=("NAME", "KEY=VALUE"),
        help="a further method: its name and what it changes in the config; may be repeated",
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="KEY=VALUE", help="changes of the config for all"
    )
    parser.add_argument("--start", type=Path, help="folder of the common starts, else OUT/start")
    return parser.parse_args(argv)


def overrides(items: list[str]) -> dict:
    """`key=value` texts as a dict, values read as Python where they are Python."""
    changes = {}
    for item in items:
        key, equals, text = item.partition("=")
        if not equals:
            raise ValueError(f"{item!r}: wanted KEY=VALUE")
        try:
            changes[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            changes[key] = text
    check_overrides([f"--config.{key}=" for key in changes])
    return changes


def check_comparable(common: dict, variants: dict[str, dict]) -> None:
    """Checks that what all methods have in common is not set for one of them.

    Raises:
      ValueError: naming the keys, and where they belong.
    """
    if not variants:
        raise ValueError("nothing to compare: give --methods or --variant")
    if "trainer.seed" in common:
        raise ValueError("--set trainer.seed: the seeds are those of --seeds")
    fixed = ("sft.", "actor_rollout_ref.model.path", "trainer.seed")
    for name, changes in variants.items():
        if wrong := [key for key in changes if key.startswith(fixed)]:
            raise ValueError(
                f"--variant {name} {', '.join(wrong)}: of one seed all methods start alike; "
                "--set and --seeds say from where"
            )


def check_distinct(flag: str, given: list) -> None:
    """Checks that nothing is given twice, of which one would hide the other.

    Raises:
      ValueError: naming it.
    """
    if twice := sorted({each for each in given if given.count(each) > 1}):
        raise ValueError(f"{flag}: {', '.join(map(str, twice))} is given more than once")


def read_config(path: str, changes: dict) -> ConfigDict:
    """A config file's config with some keys changed."""
    config = runpy.run_path(path)["get_config"]()
    try:
        config.update_from_flattened_dict(changes)
    except TypeError as error:
        raise ValueError(f"a key is set to what it cannot be: {error}") from error
    return config


def is_finished(folder: Path, config: ConfigDict, keys: tuple[str, ...] = ("",)) -> bool:
    """Whether the run of this config in this folder is done.

    Args:
      keys: beginnings of the keys in which a run of another config differs.

    Raises:
      ValueError: when the folder holds a run of another config.
    """
    changes = RunFolder(folder).changes(finalized(config))
    if wrong := [text for key, text in changes.items() if key.startswith(keys)]:
        raise ValueError(
            f"{folder} holds a run with other settings; choose another --out, --start or name, or "
            "remove it. Changed (there -> here):\n  " + "\n  ".join(wrong)
        )
    return (folder / "export").exists()


@dataclasses.dataclass(frozen=True)
class MeasuringLearner(Learner):
    """A learner that also measures how far the sampling policy is from the start.

    Attributes:
      start_params: the parameters to measure from.
    """

    start_params: object = None

    def learn(self, state, sequences, rewards, reward_weights=None):
        """As `Learner.learn`, with E[log policy - log start] of a whole completion, nats."""
        start, _ = self.log_probs(self.start_params, sequences)
        log_ratios = [
            (sampled - log_probs).sum()
            for group in zip(sequences.values("sampler"), start)
            for sampled, log_probs in zip(*group)
        ]
        state, metrics = super().learn(state, sequences, rewards, reward_weights)
        return state, metrics | {START_KL: float(np.mean(log_ratios))}


def start_config(config_path: str, changes: dict, seed: int) -> ConfigDict:
    """The config that makes a start: the supervised stage, and one iteration at learning rate 0.

    Args:
      changes: those that all methods have in common.
    """
    nothing = {
        "actor_rollout_ref.actor.optim.lr": 0.0,
        "actor_rollout_ref.actor.optim.lr_warmup_steps": 0,
        "trainer.best_metric": "",
        "trainer.logger": (),
        "trainer.profile_steps": (),
        "trainer.seed": seed,
        "trainer.test_freq": 0,
        "trainer.total_epochs": 1,
        "trainer.total_training_steps": 1,
    }
    return read_config(config_path, changes | nothing)


def common_start(config_path: str, folder: Path, changes: dict, seed: int) -> dict:
    """What makes all methods start from the same weights with this seed, as changes of the config.

    Args:
      folder: where what the supervised stage made is kept.
      changes: those that all methods have in common.
    """
    config = start_config(config_path, changes, seed)
    if not config.sft.steps:
        return {}  # the config's own model, of the same seed
    folder = folder / f"seed{seed}"
    if not is_finished(folder, config, OF_THE_START):
        train.train(config, folder, allow_config_change=True)
    return {
        "actor_rollout_ref.model.path": str(folder / "export"),
        "actor_rollout_ref.model.hf_config": {},  # the export has it
        "actor_rollout_ref.model.random_init": False,
        "sft.steps": 0,
    }


def run(config: ConfigDict, folder: Path) -> None:
    """One training run from a common start, unless it is finished."""
    if is_finished(folder, config):
        return
    prepared = preparation.prepare(config, folder)
    parts, params = prepared.parts, prepared.params
    fields = {f.name: getattr(parts.learner, f.name) for f in dataclasses.fields(Learner)}
    start_params = jax.tree.map(jnp.copy, parts.initial_params() if params is None else params)
    learner = MeasuringLearner(**fields, start_params=start_params)
    train.run(dataclasses.replace(prepared, parts=dataclasses.replace(parts, learner=learner)))


def forget_programs() -> None:
    """Lets go of programs: those of a dozen methods use up the 65,530 mappings of a process."""
    jax.clear_caches()
    gc.collect()


def measures(run: Run) -> dict[str, float]:
    """What a finished run is judged by; NaN for steps to a mark that it never reached.

    Of a run without evaluations, what they would show is left out.
    """
    accuracy, reward = run.series("eval/accuracy"), run.series("reward/mean")
    rewards, start_kl = np.array(list(reward.values())), list(run.series(START_KL).values())
    # Of 5 iterations, since one alone is noisy; `convolve` takes the shorter one for the window.
    recent = np.convolve(rewards, np.ones(5) / 5, "valid") if len(rewards) >= 5 else []
    found = {
        "final accuracy": accuracy.get(max(accuracy, default=0)),
        "reward, last 10 iterations": rewards[-10:].mean(),
        "reward, all iterations": rewards.mean(),
        "iterations to 80% accuracy": next((k for k, v in accuracy.items() if v >= 0.8), np.nan),
        "iterations to reward 0.8": next((i + 5 for i, v in enumerate(recent) if v >= 0.8), np.nan),
        "KL from the start, last 10": np.mean(start_kl[-10:]) if start_kl else np.nan,
        "completion tokens": sum(run.series("update/tokens").values()),
    }
    return {name: value for name, value in found.items() if accuracy or "accuracy" not in name}


def mean_and_interval(values: list[float]) -> str:
    """The mean and the half width of its 95% interval over seeds, by Student's t."""
    present = np.array([value for value in values if np.isfinite(value)])
    missing = len(values) - len(present)
    if not len(present):
        return "never"
    present = np.round(present, 12)  # differences of equal numbers
    text = _short(present.mean())
    if len(present) > 1:
        half = page.t_quantile(len(present) - 1) * present.std(ddof=1) / np.sqrt(len(present))
        text += f" ± {_short(half)}"
    return text + (f" ({missing} never)" if missing else "")


def table(runs: dict[str, list[Run]]) -> str:
    """Every measure of every method, and its difference to the first method seed by seed.

    A method that has not the seeds of the first has no differences.
    """
    measured = {name: [measures(run) for run in found] for name, found in runs.items()}
    first = next(iter(measured))
    seeds = {name: [run.seed for run in found] for name, found in runs.items()}
    everywhere = set.intersection(*(set(row) for rows in measured.values() for row in rows))
    names = [name for name in measured[first][0] if name in everywhere]
    lines = [["method", "seeds", *names], ["---"] * (len(names) + 2)]
    for name, rows in measured.items():
        cells = [mean_and_interval([row[measure] for row in rows]) for measure in names]
        lines.append([name, str(len(rows)), *cells])
    for name, rows in measured.items():
        if name != first and seeds[name] == seeds[first]:
            pairs = list(zip(rows, measured[first]))
            cells = [mean_and_interval([a[n] - b[n] for a, b in pairs]) for n in names]
            lines.append([f"{name} less {first}", str(len(rows)), *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def compare(a: argparse.Namespace) -> None:
    """Trains what is not there yet, and writes the table and the report.

    Raises:
      ValueError: for settings that cannot work, or other ones than those of a run that is there.
    """
    common = overrides(a.set)
    check_distinct("--methods, --variant", [*a.methods, *(name for name, *_ in a.variant)])
    check_distinct("--seeds", a.seeds)
    variants = {name: METHODS[name] for name in a.methods}
    variants |= {name: overrides(changes) for name, *changes in a.variant}
    check_comparable(common, variants)
    start_folder = a.start or a.out / "start"
    compilation_cache.use(default_config().trainer.compilation_cache_dir)
    starts = {seed: common_start(a.config, start_folder, common, seed) for seed in a.seeds}
    folders: dict[str, list[Path]] = {}
    for name, changes in variants.items():
        for seed, start in starts.items():  # which share the method's programs
            config = read_config(a.config, common | changes | start | {"trainer.seed": seed})
            folder = a.out / name / f"seed{seed}"
            try:
                run(config, folder)
            except TrainingStopped as error:
                say(f"WARNING: {folder} is left out: {error}")
            else:
                folders.setdefault(name, []).append(folder)
        forget_programs()
    if not folders:
        raise ValueError("every run was stopped, so there is nothing to compare")
    text = table({name: [Run.read(path) for path in paths] for name, paths in folders.items()})
    (a.out / "comparison.md").write_text(text)
    page.write([path for paths in folders.values() for path in paths], a.out / "report.html")
    print(text, f"the curves are in {a.out / 'report.html'}", sep="\n")


def main(argv: list[str] | None = None) -> int:
    """Compares what the command line says; returns the exit code."""
    try:
        compare(arguments(argv))
    except (OSError, ValueError, TrainingStopped) as error:  # the last in a common start
        say_error(error)
        return USER_ERROR
    return 0


if __name__ == "__main__":
    guard()
    tune_malloc()
    sys.exit(unless_interrupted(main))
