"""Experiment trackers behind the writer interface: Weights & Biases, MLflow and trackio.

Each is an extra that is imported when a run asks for it (`trainer.logger`). It takes its account
and address from its own environment variables (WANDB_API_KEY, MLFLOW_TRACKING_URI, ...), and gets
the config without anything that looks like a secret. A resumed run goes on in the same record,
whose identifier is kept in the run's folder. Iterations that are done again after a crash are
recorded again; `metrics.jsonl` alone takes their first rows back. A tracker that fails never ends a
run.
"""

import errno
import importlib
import json
import math
import os
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

from adpo_jax.log.metrics import Writer
from adpo_jax.log.printable import say
from adpo_jax.log.redaction import redacted

# Metrics that MLflow takes in one call.
_MOST_AT_ONCE = 1000


class WandbWriter(Writer):
    """Weights & Biases; `WANDB_MODE=offline` needs no account.

    Args, as of the other trackers:
      workdir: the run's folder.
      project, name: the names of the record.
      known_id: the identifier of the record to go on with; None for a new one, see `id`.
    """

    def __init__(self, workdir: Path, project: str, name: str, known_id: str | None):
        self._wandb = _tracker("wandb")
        self.id = known_id or uuid4().hex
        self._run = self._wandb.init(
            project=project, name=name, id=self.id, dir=workdir, resume="allow"
        )

    def write_scalars(self, step: int, scalars: Mapping[str, Any]):
        # W&B takes no step below 0, so the rows of a cold start become one row.
        self._run.log(_finite(scalars), step=max(step, 0))

    def write_table(self, step: int, name: str, rows: Sequence[Mapping[str, Any]]):
        table = self._wandb.Table(columns=list(rows[0]), data=[list(row.values()) for row in rows])
        self._run.log({name: table}, step=step)

    def write_hparams(self, hparams: Mapping[str, Any]):
        self._run.config.update(redacted(dict(hparams)), allow_val_change=True)

    def close(self):
        self._run.finish()


class MlflowWriter(Writer):
    """MLflow; records to MLFLOW_TRACKING_URI, or where MLflow itself chooses."""

    def __init__(self, workdir: Path, project: str, name: str, known_id: str | None):
        # MLflow's own 7 retries take minutes if there is no server, and training waits for them.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
        mlflow = _tracker("mlflow")
        self._entities = mlflow.entities
        self._client = mlflow.MlflowClient()
        self._folders, self._refused = set(), set()  # of names of metrics
        experiment = self._client.get_experiment_by_name(project)
        experiment_id = (
            experiment.experiment_id if experiment else self._client.create_experiment(project)
        )
        self.id = known_id or self._client.create_run(experiment_id, run_name=name).info.run_id

    def write_scalars(self, step: int, scalars: Mapping[str, Any]):
        now = int(time.time() * 1000)
        values = [
            self._entities.Metric(name, value, now, int(step))
            for name, value in self._named(_finite(scalars)).items()
        ]
        for first in range(0, len(values), _MOST_AT_ONCE):
            self._log(values[first : first + _MOST_AT_ONCE])

    def _named(self, scalars: Mapping[str, float]) -> dict[str, float]:
        """Scalars by names that MLflow takes, without those that it has refused.

        A store of files cannot have `reward/f` beside `reward/f/len`, so the first has a name below
        it then.
        """
        named = {_allowed(name): value for name, value in scalars.items()}
        self._folders |= {name[: m.start()] for name in named for m in re.finditer("/", name)}
        named = {f"{n}/value" if n in self._folders else n: v for n, v in named.items()}
        return {name: value for name, value in named.items() if name not in self._refused}

    def _log(self, values: list) -> None:
        """Logs metrics together, or one by one where MLflow refuses one of them."""
        try:
            self._client.log_batch(self.id, metrics=values)
        except Exception as error:
            if not _is_refusal(error):
                raise
        else:
            return
        for value in values:
            try:
                self._client.log_batch(self.id, metrics=[value])
            except Exception as error:
                if not _is_refusal(error):
                    raise
                self._refused.add(value.key)
                _warn(f"mlflow gets no metric {value.key!r}: {_in_words(error)}")

    def write_table(self, step: int, name: str, rows: Sequence[Mapping[str, Any]]):
        text = json.dumps([dict(row) for row in rows], ensure_ascii=True, default=str, indent=1)
        self._client.log_text(self.id, text, f"{name}/{step:06d}.json")

    def write_hparams(self, hparams: Mapping[str, Any]):
        text = json.dumps(redacted(dict(hparams)), default=str, indent=1)
        self._client.log_text(self.id, text, "config.json")

    def close(self):
        self._client.set_terminated(self.id)


def _allowed(name: str) -> str:
    """A metric's name with what MLflow allows in one: no other characters, no part that is none."""
    parts = re.sub(r"[^\w\-. :/]", "_", name.replace("@", "_at_")).split("/")
    return "/".join("_" if part in ("", ".", "..") else part for part in parts)


def _is_refusal(error: Exception) -> bool:
    """Whether MLflow was reached and does not take what it got."""
    code = getattr(error, "error_code", None)
    # A store of files that has `reward/f` can have no `reward/f/len`.
    is_clash = re.match(rf"\[Errno ({errno.ENOTDIR}|{errno.EISDIR})\]", str(error))
    return code == "INVALID_PARAMETER_VALUE" or (code == "INTERNAL_ERROR" and bool(is_clash))


class TrackioWriter(Writer):
    """trackio; records to TRACKIO_DIR."""

    def __init__(self, workdir: Path, project: str, name: str, known_id: str | None):
        self._trackio = _tracker("trackio")
        # trackio knows runs by their names, so a resumed run goes on under the same name.
        self.id = known_id or f"{name}-{uuid4().hex[:8]}"
        self._run = self._trackio.init(project=project, name=self.id, resume="allow", embed=False)

    def write_scalars(self, step: int, scalars: Mapping[str, Any]):
        self._run.log(_finite(scalars), step=int(step))

    def write_table(self, step: int, name: str, rows: Sequence[Mapping[str, Any]]):
        table = self._trackio.Table(
            columns=list(rows[0]), data=[[str(value) for value in row.values()] for row in rows]
        )
        self._run.log({name: table}, step=int(step))

    def write_hparams(self, hparams: Mapping[str, Any]):
        self._run.config.update(redacted(dict(hparams)))

    def close(self):
        self._run.finish()


TRACKERS = {"wandb": WandbWriter, "mlflow": MlflowWriter, "trackio": TrackioWriter}


class Harmless(Writer):
    """A tracker that cannot end the run: its first error is printed, all errors are counted.

    After an error the tracker is left alone for ten times as long as the attempt took, so that a
    server that cannot be reached takes a tenth of the time at most. Records of the meantime are
    lost to the tracker, and count as failures too.

    Args:
      name: the name of the tracker.
      tracker: the writer that may fail; None for one that is left alone for good.
    """

    def __init__(self, name: str, tracker: Writer | None):
        self._name, self._tracker = name, tracker or Writer()
        self._rests_until = -math.inf if tracker else math.inf
        self.num_failures = 0

    def write_scalars(self, step: int, scalars: Mapping[str, Any]):
        self._try(self._tracker.write_scalars, step, scalars)

    def write_table(self, step: int, name: str, rows: Sequence[Mapping[str, Any]]):
        self._try(self._tracker.write_table, step, name, rows)

    def write_hparams(self, hparams: Mapping[str, Any]):
        self._try(self._tracker.write_hparams, hparams)

    def close(self):
        self._try(self._tracker.close)

    def _try(self, write, *args):
        started = time.monotonic()
        if started < self._rests_until:
            self.num_failures += 1
            return
        try:
            write(*args)
        except Exception as error:
            if not self.num_failures:
                _warn(f"{self._name} failed, and the run goes on: {_in_words(error)}")
            self.num_failures += 1
            now = time.monotonic()
            self._rests_until = now + 10 * (now - started)


def start(name: str, workdir: Path, project: str, run_name: str) -> Harmless:
    """Starts a tracker, or goes on with the record that the run has there.

    Raises:
      ValueError: when a new record cannot be begun. A resumed run goes on without its tracker.
    """
    ids = _kept_ids(workdir)
    try:
        tracker = TRACKERS[name](workdir, project, run_name, ids.get(name))
    except Exception as error:
        if name not in ids:
            raise ValueError(
                f"trainer.logger names {name}, which cannot be started: {_in_words(error)}. See to "
                "its account and address, or leave it out"
            ) from error
        _warn(f"{name} cannot be reached, and the run goes on without: {_in_words(error)}")
        return Harmless(name, None)
    if name not in ids:
        unfinished = workdir / ".trackers.json.tmp"
        unfinished.write_text(json.dumps(ids | {name: tracker.id}) + "\n")
        os.replace(unfinished, workdir / "trackers.json")
    return Harmless(name, tracker)


def check_installed(names: Sequence[str]) -> None:
    """Checks that the trackers can be imported.

    Raises:
      ValueError: for an unknown name, or one whose package is missing.
    """
    unknown = [name for name in names if name not in TRACKERS]
    if unknown:
        raise ValueError(
            f"trainer.logger is made of {', '.join(TRACKERS)} (metrics.jsonl and TensorBoard are "
            f"always written); given {', '.join(map(repr, unknown))}"
        )
    for name in names:
        _tracker(name)


def _tracker(name: str):
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(
            f"trainer.logger names {name}, which cannot be imported ({error}): "
            f"pip install 'adpo-jax[{name}]'"
        ) from error


def _kept_ids(workdir: Path) -> dict[str, str]:
    """The identifiers of the run's records, by tracker."""
    path = workdir / "trackers.json"
    try:
        ids = json.loads(path.read_text()) if path.exists() else {}
        if not isinstance(ids, dict) or not all(isinstance(x, str) for x in ids.values()):
            raise ValueError("it holds something other than names and identifiers")
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} is not what a run wrote: {error}; remove it to begin new records"
        ) from error
    return ids


def _warn(text: str) -> None:
    say(f"warning: {text}")


def _in_words(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _finite(scalars: Mapping[str, Any]) -> dict[str, float]:
    """The finite values as floats; trackers refuse NaN or plot it as 0."""
    values = {name: float(value) for name, value in scalars.items()}
    return {name: value for name, value in values.items() if math.isfinite(value)}
