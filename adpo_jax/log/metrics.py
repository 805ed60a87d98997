"""Metrics: clu's writer interface onto `metrics.jsonl` and TensorBoard.

A row belongs to a step, the number of iterations done when it was measured. After a resume from
step k, the rows beyond k are taken back, since their iterations are about to be done again.
"""

import codecs
import html
import json
import math
import os
import textwrap
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto import event_pb2

from adpo_jax.log.clu_without_tensorflow import metric_writers
from adpo_jax.log.redaction import redacted


class Writer(metric_writers.MetricWriter):
    """A clu writer that leaves out every kind of record that it has no place for.

    Attributes:
      num_failures: how many writes failed so far without ending the run.
    """

    num_failures = 0

    def write_scalars(self, step: int, scalars: Mapping[str, Any]):
        pass

    def write_texts(self, step: int, texts: Mapping[str, str]):
        pass

    def write_histograms(self, step: int, arrays, num_buckets=None):
        pass

    def write_images(self, step: int, images):
        pass

    def write_table(self, step: int, name: str, rows: Sequence[Mapping[str, Any]]):
        """Writes rows, one or more, that have the same keys."""

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


class TensorBoardWriter(Writer):
    """Scalars, histograms, images and texts as TensorBoard events, without TensorFlow.

    tensorboardX's own SummaryWriter hands events to a thread that its `flush` does not wait for, so
    that events before a checkpoint could be lost. Here `flush` waits.

    Args:
      logdir: folder of the event files.
      purge_step: records of this step and later ones, from an earlier run, are hidden.
    """

    def __init__(self, logdir: str | Path, purge_step: int | None = None):
        Path(logdir).mkdir(parents=True, exist_ok=True)
        self._events = EventsWriter(str(Path(logdir) / "events"), f".{os.getpid()}")
        if purge_step is not None:
            started = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._write(purge_step, session_log=started)

    def _write(self, step: int, **content):
        self._events.write_event(event_pb2.Event(wall_time=time.time(), step=step, **content))

    def write_scalars(self, step: int, scalars: Mapping[str, Any]):
        for name, value in scalars.items():
            self._write(step, summary=summary.scalar(name, float(value)))

    def write_histograms(self, step: int, arrays, num_buckets=None):
        for name, values in arrays.items():
            histogram = summary.histogram(name, np.asarray(values), num_buckets or 64)
            self._write(step, summary=histogram)

    def write_texts(self, step: int, texts: Mapping[str, str]):
        for name, text in texts.items():
            self._write(step, summary=summary.text(name, text))

    def write_table(self, step: int, name: str, rows: Sequence[Mapping[str, Any]]):
        self._write(step, summary=summary.text(name, markdown_table(rows)))

    def write_images(self, step: int, images):
        for name, image in images.items():
            batch = np.asarray(image).reshape(-1, *np.shape(image)[-3:])
            self._write(step, summary=summary.image(name, batch, dataformats="NHWC"))

    def write_hparams(self, hparams: Mapping[str, Any]):
        text = json.dumps(redacted(dict(hparams)), default=str, indent=2)
        self._write(0, summary=summary.text("config", textwrap.indent(text, "    ")))

    def flush(self):
        self._events.flush()

    def close(self):
        self._events.close()


class JsonlWriter(Writer):
    """One JSON object a line: `step`, `time` (Unix seconds), and every scalar of that call.

    Args:
      path: the file; appended to.
      purge_step: rows of this step and later ones are removed first.
    """

    def __init__(self, path: str | Path, purge_step: int | None = None):
        path = Path(path)
        if purge_step is not None and path.exists():
            rows = read_jsonl(path)
            kept = [row for row in rows if type(row.get("step")) is int]
            if len(kept) < len(rows):
                logging.warning(
                    "%s: %d rows without a step are left out", path, len(rows) - len(kept)
                )
            kept = [row for row in kept if row["step"] < purge_step]
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
    """The rows of a metrics file, without a last line that a crash cut short.

    A line that holds no row, as an editor may leave it, is left out and warned of.
    """
    rows = []
    lines = Path(path).read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n")
    for number, line in enumerate(lines[:-1], 1):
        try:
            row = json.loads(line.decode())
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict):
            rows.append(row)
        else:
            logging.warning("%s: line %d holds no JSON object and is left out", path, number)
    return rows


def write_jsonl(path: str | Path, rows: list[dict]) -> None:
    """Writes one row a line; rows may hold any text."""
    lines = [json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows]
    # Text of a model may hold lone surrogates, which UTF-8 has no bytes for.
    Path(path).write_text("".join(lines), encoding="utf-8", errors="replace")


def _json_number(value) -> float | int | None:
    """A number for JSON, which has no NaN: None stands for it."""
    number = float(value)
    if not math.isfinite(number):
        return None
    return int(number) if number.is_integer() and isinstance(value, int) else number


class Writers(metric_writers.MultiWriter):
    """Several writers as one, tables included."""

    def write_scalars(self, step: int, scalars: Mapping[str, Any]):
        """Writes scalars, with the failures so far where there were any."""
        failures = sum(writer.num_failures for writer in self._writers)
        counted = {"tracker/failures": failures} if failures else {}
        super().write_scalars(step, {**scalars, **counted})

    def write_table(self, step: int, name: str, rows: Sequence[Mapping[str, Any]]):
        """Writes rows that have the same keys; nothing where there are none."""
        for writer in self._writers if rows else ():
            writer.write_table(step, name, rows)


def make_writer(
    workdir: Path,
    purge_step: int | None = None,
    *others: Writer,
    writes: bool = True,
) -> Writers:
    """The writer of a run folder: `metrics.jsonl`, `tensorboard/`, and `others`.

    Args:
      purge_step: rows of this step and later ones, from an earlier run, are taken back.
      writes: False for a process that leaves writing to another.
    """
    if not writes:
        return Writers([])
    return Writers(
        [
            JsonlWriter(workdir / "metrics.jsonl", purge_step),
            TensorBoardWriter(workdir / "tensorboard", purge_step),
            *others,
        ]
    )


def markdown_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows with the same keys as a Markdown table, their text shown as it is."""

    def cell(value) -> str:
        if isinstance(value, float):
            return f"{value:.3g}"
        text = html.escape(str(value), quote=False).replace("|", "&#124;").replace("`", "&#96;")
        return text.replace("\n", "<br>")

    lines = [list(rows[0]), ["---"] * len(rows[0])]
    lines += [[cell(value) for value in row.values()] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
