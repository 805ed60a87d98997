"""Run folders as a report needs them: metrics by step, samples, config; seeds joined in groups."""

import dataclasses
import functools
import itertools
import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from adpo_jax.log.metrics import read_jsonl
from adpo_jax.log.redaction import redacted

# What tells a run from its siblings, and not what kind of run it is.
_OF_ONE_RUN = ("trainer.seed", "trainer.experiment_name", "trainer.project_name")
_DIGESTS = "contents."  # of files that the config names, which may lie in a folder for each seed


@dataclasses.dataclass(frozen=True)
class Run:
    """One run's folder, read."""

    folder: Path
    config: dict[str, object]  # flat, dotted names
    environment: dict[str, object]
    rows: list[dict]

    @classmethod
    def read(cls, folder: Path) -> "Run":
        """Reads a run's folder.

        Raises:
          ValueError: when it is none, or has no metrics yet.
        """
        try:
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            rows = read_jsonl(folder / "metrics.jsonl")
        except (OSError, ValueError) as error:
            raise ValueError(f"{folder} is no run's folder: {error}") from error
        rows = [row for row in rows if "sft/step" not in row]
        if not rows:
            raise ValueError(f"{folder}: metrics.jsonl has no iterations yet")
        environment = folder / "environment.json"
        found = json.loads(environment.read_text()) if environment.exists() else {}
        return cls(folder, dict(_flat(redacted(config))), found, rows)

    @property
    def seed(self) -> int:
        return int(self.config.get("trainer.seed", 0))

    def series(self, name: str) -> dict[int, float]:
        """The values of a metric by step, gaps left out."""
        return {row["step"]: row[name] for row in self.rows if row.get(name) is not None}

    @property
    def seconds(self) -> float:
        """From the first row to the last, without the time that the run was stopped in between.

        A row comes a minute at most after the one before and its own stages.
        """
        total = 0.0
        for before, row in itertools.pairwise(self.rows):
            stages = sum(v or 0.0 for k, v in row.items() if k.startswith("time/"))
            total += min(row["time"] - before["time"], stages + 60.0)
        return total

    @functools.cached_property
    def names(self) -> set[str]:
        """All metrics that the run wrote."""
        return {name for row in self.rows for name in row} - {"step", "time"}

    def samples(self, kind: str) -> dict[int, list[dict]]:
        """The kept samples by step; `kind` is "train" or "eval"."""
        found = {}
        for path in sorted((self.folder / "samples").glob(f"{kind}_*.jsonl")):
            step = path.stem.removeprefix(f"{kind}_")
            if step.isdigit():
                found[int(step)] = read_jsonl(path)
        return found


@dataclasses.dataclass(frozen=True)
class Group:
    """Runs that differ in their seed alone.

    Attributes:
      label: short and unique among the groups of a report.
    """

    label: str
    runs: list[Run]

    def band(self, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Steps, and over the runs that have them the mean, smallest and largest value."""
        series = [run.series(name) for run in self.runs]
        steps = sorted(set().union(*series))
        values = [[s[step] for s in series if step in s] for step in steps]
        return (
            np.array(steps),
            np.array([np.mean(v) for v in values]),
            np.array([min(v) for v in values]),
            np.array([max(v) for v in values]),
        )


def grouped(runs: Sequence[Run]) -> list[Group]:
    """Joins runs of one config, in the order in which they were given."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(json.dumps(_kind(run), sort_keys=True, default=str), []).append(run)
    labels = _labels(list(groups.values()))
    return [Group(label, members) for label, members in zip(labels, groups.values())]


def differences(groups: Sequence[Group]) -> dict[str, list[str]]:
    """The config keys that differ between groups, with the value in each."""
    kinds = [_kind(group.runs[0]) for group in groups]
    keys = sorted(set().union(*kinds))
    table = {key: [_text(kind.get(key, "")) for kind in kinds] for key in keys}
    return {key: values for key, values in table.items() if len(set(values)) > 1}


def _kind(run: Run) -> dict[str, object]:
    """The config without what is one run's own; a seed within a path counts as its own too."""
    kind = {
        key: value
        for key, value in run.config.items()
        if key not in _OF_ONE_RUN and not key.startswith(_DIGESTS)
    }
    seed = re.compile(rf"seed[_-]?{run.seed}(?!\d)")
    return {k: seed.sub("seed*", v) if isinstance(v, str) else v for k, v in kind.items()}


def _labels(groups: list[list[Run]]) -> list[str]:
    """The shortest ends of the folders' names that tell the groups apart."""
    folders = [
        re.sub(r"/?seed[_-]?\d+$", "", str(runs[0].folder.resolve())).split("/") for runs in groups
    ]
    longest = max(map(len, folders))
    for length in range(1, longest + 1):
        labels = ["/".join(parts[-length:]) for parts in folders]
        if len(set(labels)) == len(labels):
            return labels
    return [f"{parts[-1]} ({number})" for number, parts in enumerate(folders, 1)]


def _flat(config: dict, prefix: str = ""):
    for key, value in config.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)
