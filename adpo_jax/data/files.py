"""Data sets: rows from files or the Hugging Face Hub, their solutions, and the order of training.

A data set is small next to a model, so it lies in memory as columns of Python values. Files are
read line by line, and whatever is wrong in them is reported with file, line and column.

Left out: streaming of data sets larger than memory, and remote file systems.
"""

import functools
import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

SUFFIXES = (".jsonl", ".json", ".parquet")

# A prompt of 100,000 tokens is about half a megabyte; a longer line is a file of another kind.
MAX_LINE_BYTES = 32 * 2**20

_BOM = b"\xef\xbb\xbf"

# The first word of a file's name in a folder, and the split that the file then belongs to.
_SPLITS = {"train": "train", "test": "test", "dev": "validation", "val": "validation"}
_SPLITS["validation"] = _SPLITS["valid"] = "validation"

_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")

Row = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Dataset:
    """Rows as columns of equal length.

    Attributes:
      columns: one value a row under each name; None where a row has no such column.
    """

    columns: dict[str, list]

    def __post_init__(self):
        lengths = {name: len(values) for name, values in self.columns.items()}
        if len(set(lengths.values())) != 1:
            raise ValueError(f"a data set needs columns of one length, given {lengths}")

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def row(self, index: int) -> Row:
        """One row as a dict."""
        return {name: values[index] for name, values in self.columns.items()}

    def select(self, rows: Iterable[int]) -> "Dataset":
        """The rows with these numbers, in this order."""
        rows = list(rows)
        return Dataset({name: [values[i] for i in rows] for name, values in self.columns.items()})

    def with_column(self, name: str, values: Sequence) -> "Dataset":
        """The data set with a column added or replaced."""
        return Dataset(self.columns | {name: list(values)})


def load_rows(
    source: str | Sequence[str],
    *,
    prompt_key: str,
    answer_key: str,
    split: str | None = None,
    answer_option: str = "data.answer_key",
) -> Dataset:
    """Read a data set.

    Args:
      source: one or several of: a .jsonl, .json or .parquet file; a folder of such files; the name
        of a Hugging Face data set (package `datasets`), `owner/name` or `owner/name:configuration`.
      prompt_key: the column of prompts, strings or lists of chat messages.
      answer_key: the column of answers.
      split: which split of a Hugging Face data set, "train" unless given. In a folder whose files
        are named after splits (train.jsonl, test-00000.parquet) it chooses among them.
      answer_option: what the user calls `answer_key`, for errors.

    Returns:
      All rows of all sources in order, with every column that they have.

    Raises:
      ValueError: nothing there, a file that does not parse, a missing column, an empty set; with
        file, line and column where there are such.
    """
    sources = [source] if isinstance(source, str) else list(source)
    columns: dict[str, list] = {}
    count = 0
    for name in sources:
        for where, row in _source_rows(name.strip(), split):
            _check_row(row, where, {"data.prompt_key": prompt_key, answer_option: answer_key})
            for key in row.keys() - columns.keys():
                columns[key] = [None] * count
            for key, values in columns.items():
                values.append(row.get(key))
            count += 1
    if count == 0:
        raise ValueError(f"{', '.join(sources) or 'the list of data files'}: there are no rows")
    return Dataset(columns)


def extract_solution(answer: Any) -> Any:
    """The solution that completions are compared with, from a data set's answer.

    GSM8K's worked answers end in `#### 1,234`, whose solution is that number without its commas.
    Other text is stripped, a number becomes text, and anything else (a dict of test cases, say)
    stays as it is.
    """
    if isinstance(answer, float) and answer.is_integer():
        return str(int(answer))
    if isinstance(answer, bool | int | float):
        return str(answer)
    if not isinstance(answer, str):
        return answer
    _, hashes, result = answer.rpartition("####")
    result = result.strip()
    # Only the last line counts, since elsewhere four hashes are a heading of the worked solution.
    if hashes and result and "\n" not in result:
        return _THOUSANDS.sub("", result)
    return answer.strip()


def prompt_indices(step: int, *, seed: int, num_rows: int, batch_size: int) -> np.ndarray:
    """The rows of training step `step`. It is a pure function, so that a resume needs no iterator.

    The rows are dealt out epoch after epoch, each epoch in its own order, without a gap: a batch
    that an epoch cannot fill goes on with the next epoch's order, so that every row comes exactly
    once an epoch. An epoch's order sorts the rows by the raw output of Philox keyed by
    (seed, epoch), which NumPy guarantees to be the same on every platform and in every version.

    Args:
      step: from 0.
      seed: any integer.
      num_rows: rows of the data set.
      batch_size: rows a step; may exceed `num_rows`.

    Returns:
      [batch_size] int64.
    """
    if step < 0 or num_rows < 1 or batch_size < 1:
        raise ValueError(
            "step must be at least 0, num_rows and batch_size at least 1; given "
            f"step={step}, num_rows={num_rows}, batch_size={batch_size}"
        )
    epochs, offsets = np.divmod(step * batch_size + np.arange(batch_size), num_rows)
    rows = np.empty(batch_size, np.int64)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        rows[here] = _epoch_order(seed, int(epoch), num_rows)[offsets[here]]
    return rows


@functools.lru_cache(maxsize=4)  # training and cold start may each be at a border of two epochs
def _epoch_order(seed: int, epoch: int, num_rows: int) -> np.ndarray:
    key = np.array([seed % 2**64, epoch], np.uint64)
    order = np.argsort(np.random.Philox(key=key).random_raw(num_rows), kind="stable")
    order.flags.writeable = False
    return order


def _source_rows(source: str, split: str | None) -> Iterator[tuple[str, Row]]:
    """(place in the file, row) for every row of one source."""
    path = Path(source).expanduser()
    if path.is_dir():
        files = _folder_files(path, split)
    elif path.exists():
        files = [path]
    elif path.suffix in SUFFIXES or source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise ValueError(f"{source}: there is no such file or folder (looked from {os.getcwd()})")
    else:
        yield from _hub_rows(source, split or "train")
        return
    for file in files:
        yield from _file_rows(file)


def _folder_files(folder: Path, split: str | None) -> list[Path]:
    files = sorted(file for file in folder.iterdir() if file.suffix in SUFFIXES)
    if not files:
        raise ValueError(f"{folder}: the folder has no {', '.join(SUFFIXES)} file")
    splits = {file: _SPLITS.get(re.split(r"[^a-z]", file.stem.lower())[0]) for file in files}
    if split is None or not any(splits.values()):
        return files
    # Test rows must not slip into training because the files lie in one folder.
    wanted = _SPLITS.get(split, split)
    chosen = [file for file in files if splits[file] == wanted]
    if not chosen:
        raise ValueError(
            f"{folder}: none of {', '.join(file.name for file in files)} is named after the split "
            f"{split!r}; name the file itself"
        )
    return chosen


def _file_rows(path: Path) -> Iterator[tuple[str, Row]]:
    readers = {".jsonl": _jsonl_rows, ".json": _json_rows, ".parquet": _parquet_rows}
    if path.suffix not in readers:
        raise ValueError(f"{path}: data files end in {', '.join(SUFFIXES)}")
    try:
        yield from readers[path.suffix](path)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror or error}") from error


def _jsonl_rows(path: Path) -> Iterator[tuple[str, Row]]:
    with path.open("rb") as file:
        for line in itertools.count(1):
            raw = file.readline(MAX_LINE_BYTES + 1)
            if not raw:
                return
            if len(raw) > MAX_LINE_BYTES:
                raise ValueError(
                    f"{path}:{line}: the line is longer than {MAX_LINE_BYTES} bytes; a .jsonl file "
                    "has one row on each line"
                )
            text = _decode(raw, path, line).rstrip()
            if text:
                where = f"{path}:{line}"
                yield where, _check_object(_parse_json(text, path, line), where)


def _json_rows(path: Path) -> Iterator[tuple[str, Row]]:
    """Rows of a JSON file: an array of objects, or JSON Lines under another name."""
    with path.open("rb") as file:
        start = file.read(4096).removeprefix(_BOM).lstrip()
    if not start.startswith(b"["):
        yield from _jsonl_rows(path)
        return
    rows = _parse_json(_decode(path.read_bytes(), path, 1), path, 1)
    for number, row in enumerate(rows, 1):
        where = f"{path}: row {number}"
        yield where, _check_object(row, where)


def _parquet_rows(path: Path) -> Iterator[tuple[str, Row]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            batches = (batch.to_pylist() for batch in file.iter_batches())
            for number, row in enumerate(itertools.chain.from_iterable(batches), 1):
                yield f"{path}: row {number}", row
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path}: not a readable Parquet file: {error}") from error


def _hub_rows(source: str, split: str) -> Iterator[tuple[str, Row]]:
    name, _, configuration = source.partition(":")
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            f"{source} is no file here; to load it from the Hugging Face Hub: "
            'pip install "adpo-jax[hub]" (or: pip install datasets)'
        ) from error
    try:
        rows = datasets.load_dataset(name, configuration or None, split=split)
    except Exception as error:  # errors of datasets, the hub and the network have no common base
        raise ValueError(
            f"{source} is no file here, and its split {split!r} cannot be loaded from the Hugging "
            f"Face Hub: {error}"
        ) from error
    for number, row in enumerate(rows, 1):
        yield f"{source} ({split}): row {number}", row


def _decode(raw: bytes, path: Path, first_line: int) -> str:
    if first_line == 1:
        raw = raw.removeprefix(_BOM)
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        line = first_line + raw.count(b"\n", 0, error.start)
        column = error.start - raw.rfind(b"\n", 0, error.start)
        raise ValueError(
            f"{path}:{line}:{column}: byte 0x{raw[error.start]:02x} is not UTF-8; "
            "save the file as UTF-8"
        ) from error


def _parse_json(text: str, path: Path, first_line: int) -> Any:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise ValueError(f"{path}:{line}:{error.colno}: not JSON: {error.msg}") from error
    except (ValueError, RecursionError) as error:  # e.g. a number of 5,000 digits, 10,000 brackets
        raise ValueError(f"{path}:{first_line}: not usable JSON: {error}") from error
    if "\\ud" in text.lower():
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{path}:{first_line}: the text has half a surrogate pair "
                f"(\\u{ord(error.object[error.start]):04x}), which is no character"
            ) from error
    return value


def _check_object(row: Any, where: str) -> Row:
    if not isinstance(row, dict):
        raise ValueError(
            f"{where}: a row must be a JSON object with named columns, "
            f"got {type(row).__name__} {_shorten(row)}"
        )
    return row


def _check_row(row: Row, where: str, wanted: dict[str, str]) -> None:
    for option, key in wanted.items():
        if key not in row:
            raise ValueError(
                f"{where}: no column {key!r}; the columns are {', '.join(map(repr, row))}. "
                f"Name the right one in {option}"
            )
        if row[key] is None:
            raise ValueError(f"{where}: the column {key!r} ({option}) is null")
    prompt_key = wanted["data.prompt_key"]
    if not isinstance(row[prompt_key], str | list):
        raise ValueError(
            f"{where}: the prompt in column {prompt_key!r} must be text or a list of chat "
            f"messages, got {_shorten(row[prompt_key])}"
        )


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
