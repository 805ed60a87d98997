"""Experiment trackers behind the writer interface: Weights & Biases, MLflow and trackio.

Each is an extra that is imported when a run asks for it (`trainer.logger`), takes its account and
address from its own environment variables (WANDB_API_KEY, MLFLOW_TRACKING_URI, ...), and is given a
config without what looks like a secret. A run that is resumed goes on in the same record: its
identifier is kept in the run's folder. Iterations done again after a crash are recorded again;
`metrics.jsonl` alone takes the first ones back.
"""

import importlib
import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

from adpo_jax.metrics import Writer
from adpo_jax.redaction import redacted


class WandbWriter(Writer):
    """Weights & Biases; `WANDB_MODE=offline` needs no account."""

    def __init__(self, workdir: Path, project: str, name: str):
        self._wandb = _tracker("wandb")
        self._run = self._wandb.init(
            project=project, name=name, id=_kept_id(workdir, "wandb"), dir=workdir, resume="allow"
        )

    def write_scalars(self, step: int, scalars: Mapping[str, Any]):
        # It takes no step below 0: the rows of a cold start are one there.
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

    def __init__(self, workdir: Path, project: str, name: str):
        mlflow = _tracker("mlflow")
        self._entities = mlflow.entities
        self._client = mlflow.MlflowClient()
        experiment = self._client.get_experiment_by_name(project)
        experiment_id = (
            experiment.experiment_id if experiment else self._client.create_experiment(project)
        )
        self._id = _kept_id(
            workdir,
            "mlflow",
            lambda: self._client.create_run(experiment_id, run_name=name).info.run_id,
        )

    def write_scalars(self, step: int, scalars: Mapping[str, Any]):
        now = int(time.time() * 1000)
        values = [
            # "@" is not allowed in a name there.
            self._entities.Metric(name.replace("@", "_at_"), value, now, int(step))
            for name, value in _finite(scalars).items()
        ]
        self._client.log_batch(self._id, metrics=values)

    def write_table(self, step: int, name: str, rows: Sequence[Mapping[str, Any]]):
        text = json.dumps([dict(row) for row in rows], ensure_ascii=True, default=str, indent=1)
        self._client.log_text(self._id, text, f"{name}/{step:06d}.json")

    def write_hparams(self, hparams: Mapping[str, Any]):
        text = json.dumps(redacted(dict(hparams)), default=str, indent=1)
        self._client.log_text(self._id, text, "config.json")

    def close(self):
        self._client.set_terminated(self._id)


class TrackioWriter(Writer):
    """trackio; records to TRACKIO_DIR."""

    def __init__(self, workdir: Path, project: str, name: str):
        self._trackio = _tracker("trackio")
        # Its runs are known by name; one that is resumed goes on under the same.
        name = _kept_id(workdir, "trackio", lambda: f"{name}-{uuid4().hex[:8]}")
        self._run = self._trackio.init(project=project, name=name, resume="allow", embed=False)

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


def _kept_id(workdir: Path, tracker: str, make=lambda: uuid4().hex) -> str:
    """The identifier of this run's record, made once and kept in `trackers.json`."""
    path = workdir / "trackers.json"
    ids = json.loads(path.read_text()) if path.exists() else {}
    if tracker not in ids:
        ids[tracker] = make()
        path.write_text(json.dumps(ids) + "\n")
    return ids[tracker]


def _finite(scalars: Mapping[str, Any]) -> dict[str, float]:
    """The values as floats, without what is no number: trackers refuse NaN or plot it as 0."""
    values = {name: float(value) for name, value in scalars.items()}
    return {name: value for name, value in values.items() if math.isfinite(value)}
