"""Metrics: clu's writer interface onto `metrics.jsonl` and TensorBoard.

A row belongs to a step: the number of iterations done when it was measured. After a resume from
step k the rows beyond k, whose iterations are about to be done again, are taken back.
"""

import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorboardX

from adpo_jax.clu_without_tensorflow import metric_writers


class _Writer(metric_writers.MetricWriter):
    """A clu writer that leaves out every kind of record it has no place for."""

    def write_scalars(self, step: int, scalars: Mapping[str, Any]):
        pass

    def write_texts(self, step: int, texts: Mapping[str, str]):
        pass

    def write_histograms(self, step: int, arrays, num_buckets=None):
        pass

    def write_images(self, step: int, images):
        pass

    def write_hparams(self, hparams: Mapping[str, Any]):
        pass

    def write_summaries(self, step: int, values, metadata=None):
        pass

    def write_videos(self, step: int, videos):
        pass

    def write_audios(self, step: int, audios, *, sample_rate: int):
        pass

    def write_pointcloud(self, step: int, point_clouds, *, point_colors=None, configs=None):
        pass

    def flush(self):
        pass

    def close(self):
        pass


class TensorBoardWriter(_Writer):
    """Scalars, histograms, images and texts as TensorBoard events, without TensorFlow.

    Args:
      logdir: folder of the event files.
      purge_step: records of this step and later ones, from an earlier run, are hidden.
    """

    def __init__(self, logdir: str | Path, purge_step: int | None = None):
        self._writer = tensorboardX.SummaryWriter(str(logdir), purge_step=purge_step)

    def write_scalars(self, step: int, scalars: Mapping[str, Any]):
        for name, value in scalars.items():
            self._writer.add_scalar(name, float(value), step)

    def write_histograms(self, step: int, arrays, num_buckets=None):
        for name, values in arrays.items():
            self._writer.add_histogram(name, np.asarray(values), step)

    def write_texts(self, step: int, texts: Mapping[str, str]):
        for name, text in texts.items():
            self._writer.add_text(name, text, step)

    def write_images(self, step: int, images):
        for name, image in images.items():
            layout = "NHWC" if np.ndim(image) == 4 else "HWC"
            self._writer.add_images(name, np.asarray(image), step, dataformats=layout)

    def write_hparams(self, hparams: Mapping[str, Any]):
        lines = [f"    {name}: {value}" for name, value in hparams.items()]
        self._writer.add_text("config", "\n".join(lines), 0)

    def flush(self):
        self._writer.flush()

    def close(self):
        self._writer.close()


class JsonlWriter(_Writer):
    """One JSON object a line: `step`, `time` (Unix seconds), and every scalar of that call.

    Args:
      path: the file; appended to.
      purge_step: rows of this step and later ones are removed first.
    """

    def __init__(self, path: str | Path, purge_step: int | None = None):
        path = Path(path)
        if purge_step is not None and path.exists():
            kept = [row for row in read_jsonl(path) if row["step"] < purge_step]
            rewritten = path.with_suffix(".tmp")
            rewritten.write_text("".join(json.dumps(row) + "\n" for row in kept))
            os.replace(rewritten, path)
        self._file = path.open("a", encoding="utf-8")

    def write_scalars(self, step: int, scalars: Mapping[str, Any]):
        row = {"step": int(step), "time": round(time.time(), 3)}
        row |= {name: _json_number(value) for name, value in scalars.items()}
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def flush(self):
        self._file.flush()

    def close(self):
        self._file.close()


def read_jsonl(path: str | Path) -> list[dict]:
    """The rows of a metrics file, without a last line that a crash cut short."""
    lines = Path(path).read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]


def _json_number(value) -> float | int | None:
    """JSON has no NaN: None stands for it."""
    number = float(value)
    if not math.isfinite(number):
        return None
    return int(number) if number.is_integer() and isinstance(value, int) else number


def make_writer(workdir: Path, purge_step: int | None = None) -> metric_writers.MetricWriter:
    """The writer of a run folder: `metrics.jsonl` and `tensorboard/`."""
    return metric_writers.MultiWriter(
        [
            JsonlWriter(workdir / "metrics.jsonl", purge_step),
            TensorBoardWriter(workdir / "tensorboard", purge_step),
        ]
    )
