"""Run folders as a report needs them: metrics by step, samples, config; seeds joined in groups.

A folder may be damaged, or written to harm: what cannot be read is named and left out.
"""

import dataclasses
import functools
import itertools
import json
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from adpo_jax.log.redaction import redacted

# What tells a run from its siblings, and not what kind of run it is.
_OF_ONE_RUN = ("trainer.seed", "trainer.experiment_name", "trainer.project_name")
_DIGESTS = "contents."  # of files that the config names, which may lie in a folder for each seed
# The folder that a run was started in, which a page that is passed on does not tell.
_WORKING_DIRECTORY = "working_directory"
_MOST_BYTES = 16 << 20  # of a line or a JSON file
_LARGEST = 1e300  # of a metric; beyond it an axis has no room for a margin


@dataclasses.dataclass(frozen=True)
class Run:
    """One run's folder, read.

    Attributes:
      config: flat, with dotted names.
      rows: the rows of the iterations: "step", "time" and finite numbers.
      problems: what could not be read, a sentence each.
    """

    folder: Path
    config: dict[str, object]
    environment: dict[str, object]
    rows: list[dict]
    problems: list[str] = dataclasses.field(default_factory=list)

    @classmethod
    def read(cls, folder: Path) -> "Run":
        """Reads a run's folder.

        Raises:
          ValueError: when it is none, or has no metrics yet.
        """
        problems: list[str] = []
        try:
            config = dict(_flat(redacted(_read_object(folder / "config.json"))))
            config.pop(_WORKING_DIRECTORY, None)
            rows = [_row(row) for row in read_rows(folder / "metrics.jsonl", problems)]
        except (OSError, ValueError, RecursionError) as error:
            raise ValueError(f"{folder} is no run's folder: {error}") from error
        rows = [row for row in rows if row and "sft/step" not in row]
        if not rows:
            damage = f": {problems[0]}" if problems else ""
            raise ValueError(f"{folder}: metrics.jsonl has no iterations yet{damage}")
        environment = {}
        if (folder / "environment.json").exists():
            try:
                environment = _read_object(folder / "environment.json")
            except (OSError, ValueError) as error:
                problems.append(str(error))
        rows.sort(key=lambda row: row["step"])
        return cls(folder, config, environment, rows, problems)

    @property
    def seed(self) -> int:
        seed = self.config.get("trainer.seed", 0)
        return seed if isinstance(seed, int) else 0

    def series(self, name: str) -> dict[int, float]:
        """The values of a metric by step, gaps left out."""
        return {row["step"]: row[name] for row in self.rows if name in row}

    @property
    def seconds(self) -> float:
        """From the first row to the last, without the time that the run was stopped in between.

        A row comes a minute at most after the one before and its own stages.
        """
        total = 0.0
        for before, row in itertools.pairwise(self.rows):
            stages = sum(v for k, v in row.items() if k.startswith("time/"))
            total += max(min(row["time"] - before["time"], stages + 60.0), 0.0)
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
            if step.isdecimal():
                records = [_record(record) for record in read_rows(path, self.problems)]
                found[int(step)] = [record for record in records if record]
        return found


def read_rows(path: Path, problems: list[str]) -> Iterator[dict]:
    """The objects in a file of JSON lines; what cannot be read is left out and named.

    Args:
      problems: takes a sentence on the lines that are left out.
    """
    if not path.is_file():  # a FIFO would wait for ever
        raise ValueError(f"there is no file {path}")
    bad: list[str] = []
    with path.open("rb") as file:
        for number in itertools.count(1):
            line = file.readline(_MOST_BYTES)
            if not line:
                break
            if len(line) == _MOST_BYTES:
                while not line.endswith(b"\n") and (line := file.readline(_MOST_BYTES)):
                    pass
                bad.append(f"line {number} is too long")
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                whole = line.endswith(b"\n")
                bad.append(f"line {number} {'is no JSON' if whole else 'is cut short'}")
                continue
            if isinstance(row, dict):
                yield row
            else:
                bad.append(f"line {number} is no JSON object")
    if bad:
        more = f", and {len(bad) - 3} more" if len(bad) > 3 else ""
        problems.append(f"{path}: {', '.join(bad[:3])}{more}; the rest was read")


def _read_object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    with path.open("rb") as file:
        text = file.read(_MOST_BYTES + 1)
    if len(text) > _MOST_BYTES:
        raise ValueError(f"{path} is longer than {_MOST_BYTES} bytes")
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} is no JSON object")
    return content


def _row(row: dict) -> dict:
    """The step, the time and the finite numbers of a row; empty for a row without a step."""
    step = row.get("step")
    if not isinstance(step, int) or isinstance(step, bool) or abs(step) > 1 << 53:
        return {}
    numbers = {name: float(value) for name, value in row.items() if _is_number(value)}
    return {"time": 0.0} | numbers | {"step": step}


def _record(record: dict) -> dict:
    """A kept sample with what the page shows; empty for one without a completion."""
    if not isinstance(record.get("completion"), str):
        return {}
    shown = {"solution": "", "correct": False, "prompt": ""}
    numbers = ("reward", "num_tokens")
    found = {k: v for k, v in record.items() if k not in numbers or _is_number(v)}
    return shown | found | {"correct": bool(found.get("correct"))}


def _is_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return not (isinstance(value, float) and math.isnan(value)) and abs(value) < _LARGEST


@dataclasses.dataclass(frozen=True)
class Group:
    """Runs that differ in their seed alone.

    Attributes:
      label: short and unique among the groups of a report.
    """

    label: str
    runs: list[Run]

    @functools.cached_property
    def names(self) -> set[str]:
        """All metrics that a run of the group wrote."""
        return set().union(*(run.names for run in self.runs))

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
