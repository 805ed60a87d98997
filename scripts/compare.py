"""Trains several methods on one task and budget, seed by seed, and compares what they learn.

    python scripts/compare.py --out runs/compare --methods adpo adpo-fixed grpo rloo --seeds 0 1 2
    python scripts/compare.py --out runs/tau --seeds 0 1 --set trainer.total_training_steps=30 \\
        --variant tau-0.2 algorithm.tau=0.2 --variant tau-1.6 algorithm.tau=1.6

Of one seed, every method starts from the same weights (the supervised stage of the config runs once
a seed and is kept in `OUT/start/`), sees the same prompts in the same order, draws as many
completions of at most as many tokens with the same sampler keys, and takes as many optimizer
steps. Each iteration also measures how far the policy that sampled has moved from the start, in
nats a completion (`compare/start_kl`). Runs that are finished are not repeated, so the same command
goes on where it stopped. At the end `OUT/comparison.md` has a table, `OUT/report.html` the curves.
"""

import argparse
import ast
import dataclasses
import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from adpo_jax import train
from adpo_jax.host_memory import tune_malloc
from adpo_jax.learner import Learner
from adpo_jax.report import page
from adpo_jax.report.runs import Run

METHODS = {
    "adpo": {},
    "adpo-fixed": {"algorithm.use_adaptive_tau": False},
    "grpo": {"algorithm.adv_estimator": "grpo"},
    "rloo": {"algorithm.adv_estimator": "rloo"},
}

START_KL = "compare/start_kl"


def arguments() -> argparse.Namespace:
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
    return parser.parse_args()


def overrides(items: list[str]) -> dict:
    """`key=value` texts as a dict, values read as Python where they are Python."""
    changes = {}
    for item in items:
        key, equals, text = item.partition("=")
        if not equals:
            raise SystemExit(f"{item!r}: wanted KEY=VALUE")
        try:
            changes[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            changes[key] = text
    return changes


def read_config(path: str, changes: dict) -> ConfigDict:
    """A config file's config with some keys changed."""
    config = runpy.run_path(path)["get_config"]()
    config.update_from_flattened_dict(changes)
    return config


@dataclasses.dataclass(frozen=True)
class MeasuringLearner(Learner):
    """A learner that also measures how far the sampling policy is from the start.

    Attributes:
      start_params: the parameters to measure from.
    """

    start_params: object = None

    def learn(self, state, batch, rewards_PG):
        """As `Learner.learn`, with E[log policy - log start] of a whole completion, nats."""
        log_probs, _ = self.log_probs(self.start_params, batch)
        log_ratio = (batch.sampler_log_probs_PGT - log_probs) * batch.completion_mask_PGT
        state, metrics = super().learn(state, batch, rewards_PG)
        return state, metrics | {START_KL: float(log_ratio.sum(-1).mean())}


def common_start(config_path: str, folder: Path, changes: dict, seed: int) -> Path:
    """The weights that all methods start from with this seed, made once: a Hugging Face folder."""
    export = folder / f"seed{seed}" / "export"
    if not export.exists():
        # One iteration at learning rate 0 leaves the weights as the supervised stage made them.
        nothing = {
            "actor_rollout_ref.actor.optim.lr": 0.0,
            "trainer.total_training_steps": 1,
            "trainer.test_freq": 0,
            "trainer.seed": seed,
        }
        train.train(read_config(config_path, changes | nothing), export.parent)
    return export


def run(config_path: str, folder: Path, start: Path, changes: dict, seed: int) -> None:
    """One training run from a common start, unless it is finished."""
    if (folder / "export").exists():
        return
    given = {
        "actor_rollout_ref.model.path": str(start),
        "sft.steps": 0,
        "trainer.seed": seed,
    }
    prepared = train.prepare(read_config(config_path, changes | given), folder)
    parts, params = prepared.parts, prepared.params
    fields = {f.name: getattr(parts.learner, f.name) for f in dataclasses.fields(Learner)}
    start_params = jax.tree.map(jnp.copy, parts.initial_params() if params is None else params)
    learner = MeasuringLearner(**fields, start_params=start_params)
    train.run(dataclasses.replace(prepared, parts=dataclasses.replace(parts, learner=learner)))


def measures(run: Run) -> dict[str, float]:
    """What a finished run is judged by; NaN for steps to a mark that it never reached."""
    accuracy, reward = run.series("eval/accuracy"), run.series("reward/mean")
    rewards, start_kl = np.array(list(reward.values())), list(run.series(START_KL).values())
    recent = np.convolve(rewards, np.ones(5) / 5, "valid")  # of 5 iterations: one alone is noisy
    return {
        "final accuracy": accuracy[max(accuracy)],
        "reward, last 10 iterations": rewards[-10:].mean(),
        "reward, all iterations": rewards.mean(),
        "iterations to 80% accuracy": next((k for k, v in accuracy.items() if v >= 0.8), np.nan),
        "iterations to reward 0.8": next((i + 5 for i, v in enumerate(recent) if v >= 0.8), np.nan),
        "KL from the start, last 10": np.mean(start_kl[-10:]) if start_kl else np.nan,
        "completion tokens": sum(run.series("update/tokens").values()),
    }


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
    """Every measure of every method, and its difference to the first method seed by seed."""
    measured = {name: [measures(run) for run in found] for name, found in runs.items()}
    first = next(iter(measured))
    names = list(measured[first][0])
    lines = [["method", "seeds", *names], ["---"] * (len(names) + 2)]
    for name, rows in measured.items():
        cells = [mean_and_interval([row[measure] for row in rows]) for measure in names]
        lines.append([name, str(len(rows)), *cells])
    for name, rows in measured.items():
        if name != first and len(rows) == len(measured[first]):
            pairs = list(zip(rows, measured[first]))
            cells = [mean_and_interval([a[n] - b[n] for a, b in pairs]) for n in names]
            lines.append([f"{name} less {first}", str(len(rows)), *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def main():
    a = arguments()
    common = overrides(a.set)
    variants = {name: METHODS[name] for name in a.methods}
    variants |= {name: overrides(changes) for name, *changes in a.variant}
    if not variants:
        raise SystemExit("nothing to compare: give --methods or --variant")
    for seed in a.seeds:
        start = common_start(a.config, a.start or a.out / "start", {}, seed)
        for name, changes in variants.items():
            run(a.config, a.out / name / f"seed{seed}", start, common | changes, seed)
    folders = {name: [a.out / name / f"seed{seed}" for seed in a.seeds] for name in variants}
    text = table({name: [Run.read(path) for path in paths] for name, paths in folders.items()})
    (a.out / "comparison.md").write_text(text)
    page.write([path for paths in folders.values() for path in paths], a.out / "report.html")
    print(text, f"the curves are in {a.out / 'report.html'}", sep="\n")


if __name__ == "__main__":
    tune_malloc()
    main()
