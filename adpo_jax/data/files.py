"""Data sets: rows from files or the Hugging Face Hub, their solutions, and the order of training.

Files are read line by line, and whatever is wrong in them is reported with file, line and column.
A small data set lies in memory as columns of Python values; a large one is converted to Arrow once
and mapped into memory (`stored`), so that a million rows take no more than those in use.

Left out: remote file systems.
"""

import csv
import functools
import gzip
import hashlib
import itertools
import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from adpo_jax.data import stored
from adpo_jax.data.stored import Segment, StoredColumn

SUFFIXES = (".jsonl", ".json", ".csv", ".jsonl.gz", ".csv.gz", ".parquet")

# Above so many bytes in its files a data set is mapped into memory. Compressed ones count tenfold.
LARGE_BYTES = 32 * 2**20

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
      columns: one value a row under each name; None where a row has no such column. A sequence that
        has a method `take(rows)` reads its values when they are asked for.
      digest: a digest of the files' contents where the rows are stored; "" where they lie in
        memory.
    """

    columns: dict[str, Sequence]
    digest: str = ""

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
        """The rows with these numbers, in this order; those of stored columns stay stored."""
        rows = list(rows) if not isinstance(rows, range | np.ndarray) else rows

        def chosen(values: Sequence) -> Sequence:
            if isinstance(values, StoredColumn):
                return values.select(rows)
            return [values[i] for i in rows]

        columns = {name: chosen(values) for name, values in self.columns.items()}
        return Dataset(columns, self.digest)

    def with_column(self, name: str, values: Sequence) -> "Dataset":
        """The data set with a column added or replaced."""
        values = values if isinstance(values, StoredColumn) else list(values)
        return Dataset(self.columns | {name: values}, self.digest)

    def mapped(self, name: str, function) -> Sequence:
        """The column of `function`'s results; name as for `column`."""
        values = self.column(name)
        if isinstance(values, StoredColumn):
            return values.mapped(function)
        return [function(value) for value in values]

    def column(self, name: str) -> Sequence:
        """A column by its name, or what lies in one by a dotted path, as `reward_model.style`."""
        if name in self.columns:
            return self.columns[name]
        first, path = _split_path(name, self.columns)
        return self.mapped(first, functools.partial(_inside, path=path))

    def has(self, name: str) -> bool:
        """Whether there is such a column; of a dotted path, whether any row has something there."""
        if name in self.columns:
            return True
        first, _ = _split_path(name, self.columns)
        return bool(first) and any(value is not None for value in self.column(name))


def _split_path(name: str, columns) -> tuple[str, list[str]]:
    """The column that a dotted path begins with, and the keys inside; "" where there is none."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        if ".".join(parts[:end]) in columns:
            return ".".join(parts[:end]), parts[end:]
    return "", parts


def _inside(value: Any, path: Sequence[str]) -> Any:
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _read_key(row: Row, key: str) -> tuple[bool, Any]:
    """(whether a row has this column or dotted path, its value)."""
    if key in row:
        return True, row[key]
    first, path = _split_path(key, row)
    if not first:
        return False, None
    value = row[first]
    for part in path:
        if not isinstance(value, dict) or part not in value:
            return False, None
        value = value[part]
    return True, value


def load_rows(
    source: str | Sequence[str],
    *,
    prompt_key: str,
    answer_key: str,
    split: str | None = None,
    answer_option: str = "data.answer_key",
    needs_answer: bool = True,
    cache_dir: str = "",
) -> Dataset:
    """Read a data set.

    Args:
      source: one or several of: a file that ends in one of `SUFFIXES`; a folder of such files; the
        name of a Hugging Face data set (package `datasets`), `owner/name` or
        `owner/name:configuration`.
      prompt_key: the column of prompts, strings or lists of chat messages. It and `answer_key` may
        be dotted paths into a column of objects, as in `reward_model.ground_truth`.
      answer_key: the column of answers.
      split: which split of a Hugging Face data set, "train" unless given. In a folder whose files
        are named after splits (train.jsonl, test-00000.parquet) it chooses among them.
      answer_option: what the user calls `answer_key`, for errors.
      needs_answer: whether rows without an answer are refused.
      cache_dir: where large files are kept as Arrow; "" for a folder that goes with the process.

    Returns:
      All rows of all sources in order, with every column that they have.

    Raises:
      ValueError: nothing there, a file that does not parse, a missing column, an empty set, an `id`
        that a file has twice; with file, line and column where there are such.
    """
    names = [source] if isinstance(source, str) else list(source)
    wanted = {"data.prompt_key": prompt_key} | ({answer_option: answer_key} if needs_answer else {})
    sources = [_find(name.strip(), split) for name in names]
    if sum(found.weight for found in sources) > LARGE_BYTES:
        return _stored(sources, wanted, cache_dir)
    columns: dict[str, list] = {}
    count = 0
    for place, number, row in itertools.chain.from_iterable(map(_unique_ids, sources)):
        _check_row(row, f"{place}{number}", wanted)
        for key in row:
            if key not in columns:
                columns[key] = [None] * count
        for key, values in columns.items():
            values.append(row.get(key))
        count += 1
    if count == 0:
        raise ValueError(f"{', '.join(names) or 'the list of data files'}: there are no rows")
    return Dataset(columns)


def _unique_ids(source: "_Source") -> Iterator["_Placed"]:
    """The rows of a source, none of whose files has an `id` twice.

    A file that was appended to itself is found so. Two files may both count from 0.
    """
    for rows in source.files():
        first_rows: dict[str, int] = {}
        for count, placed in enumerate(rows, 1):
            value = placed[2].get("id")
            if value is not None and first_rows.setdefault(str(value), count) != count:
                raise _same_id(source.name, first_rows[str(value)], count, value)
            yield placed


def _same_id(name: str, first: int, second: int, value: Any) -> ValueError:
    return ValueError(
        f"{name}: rows {first} and {second} have the same id {value!r}; remove one, or rename the "
        "column if it is no id"
    )


def _stored(sources: Sequence["_Source"], wanted: dict[str, str], cache_dir: str) -> Dataset:
    """The rows of all sources as stored columns."""
    segments: list[Segment] = []
    digests = []
    for source in sources:
        for file in source.paths or [None]:
            path = source.name if file is None else str(file)
            if file is None:
                digest, found = _hub_segments(source, cache_dir)
            else:
                digest = _digest_of(file)
                place, batches = _batches_of(file)
                found = stored.segments_of_file(file, digest, place, batches, cache_dir)
            _check_segments(found, path, wanted)
            digests.append(digest)
            segments += found
    if not segments:
        raise ValueError(f"{', '.join(s.name for s in sources)}: there are no rows")
    names = dict.fromkeys(name for segment in segments for name in segment.names)
    digest = hashlib.sha256(" ".join(digests).encode()).hexdigest()
    return Dataset({name: StoredColumn(segments, name) for name in names}, digest)


def _digest_of(file: Path) -> str:
    try:
        return stored.sha256(file)
    except OSError as error:
        raise ValueError(f"{file}: cannot be read: {error.strerror or error}") from error


def _batches_of(file: Path):
    """(what stands between a file's name and the number of a row, a function for its batches)."""
    if file.suffix == ".parquet":
        return ": row ", lambda: _parquet_batches(file)
    placed = _file_rows(file)
    first = next(placed, (":", 0, {}))[0].removeprefix(str(file))

    def batches():
        return stored.batches_of_rows((number, row) for _, number, row in _file_rows(file))

    return first, batches


def _hub_segments(source: "_Source", cache_dir: str) -> tuple[str, list[Segment]]:
    """A digest of the rows of a Hub's data set, and the rows."""
    rows = source.hub
    name = f"{source.name} {getattr(rows, '_fingerprint', '')}"
    digest = hashlib.sha256(name.encode()).hexdigest()

    def batches():
        first = 1
        for batch in rows.with_format("arrow").iter(batch_size=1000):
            for part in batch.to_batches():
                yield stored.numbered(part, first)
                first += part.num_rows

    path = Path(source.name)
    return digest, stored.segments_of_file(path, digest, ": row ", batches, cache_dir)


def _check_segments(segments: Sequence[Segment], path: str, wanted: dict[str, str]) -> None:
    """The checks of `_check_row` and `_unique_ids` on the stored rows of one file."""
    for segment in segments:
        head = {name: segment.table[name] for name in segment.names}
        for key in wanted.values():
            if not _split_path(key, head)[0]:
                row = dict.fromkeys(segment.names)
                _check_row(row, segment.where(path, 0), wanted)
        if segment.table.num_rows == 0:
            continue
        part = Dataset({name: StoredColumn([segment], name) for name in segment.names})
        for option, key in wanted.items():
            _check_stored(segment, part, path, option, key)
    if segments and all("id" in segment.names for segment in segments):
        _check_stored_ids(StoredColumn(segments, "id"), segments, path)


def _check_stored(segment: Segment, part: Dataset, path: str, option: str, key: str) -> None:
    """Checks one needed column; what Arrow can tell by itself is not read."""
    import pyarrow as pa

    if key in segment.names and not segment.is_json(key):
        column = segment.table[key]
        kind = column.type
        text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
        if not column.null_count and (text or option != "data.prompt_key"):
            return
    for row, value in enumerate(part.column(key)):
        if value is None or (option == "data.prompt_key" and not isinstance(value, str | list)):
            _check_row(part.row(row), segment.where(path, row), {option: key})


def _check_stored_ids(ids: StoredColumn, segments: Sequence[Segment], path: str) -> None:
    import pyarrow as pa
    import pyarrow.compute as pc

    def texts(segment: Segment) -> pa.ChunkedArray:
        column = segment.table["id"]
        nested = pa.types.is_nested(column.type)
        return None if nested else pc.cast(column, pa.large_string())

    columns = [texts(segment) for segment in segments]
    if any(column is None for column in columns):
        return
    column = pa.chunked_array([chunk for c in columns for chunk in c.iterchunks()])
    if pc.count_distinct(column, mode="only_valid").as_py() == len(column) - column.null_count:
        return
    first_rows: dict[str, int] = {}
    for count, value in enumerate(ids, 1):
        if value is not None and first_rows.setdefault(str(value), count) != count:
            raise _same_id(path, first_rows[str(value)], count, value)


def extract_solution(answer: Any) -> Any:
    """The solution that completions are compared with, from a data set's answer.

    GSM8K's worked answers end in `#### 1,234`, whose solution is that number without its commas.
    Other text is stripped, a number becomes text, and anything else (a dict of test cases, say)
    stays as it is. A list of one chat message, TRL's completion, is that message's text.
    """
    if message := message_text(answer):
        answer = message
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


def message_text(value: Any) -> str | None:
    """The text of a list of one chat message; None for anything else."""
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], dict):
        content = joined_parts(value[0].get("content"))
        if "role" in value[0] and isinstance(content, str):
            return content
    return None


def joined_parts(content: Any) -> Any:
    """A message's content with its text parts joined; what has other parts stays as it is.

    Such parts are {"type": "text", "text": ...}; a table of several kinds of parts may fill in
    further keys with null.
    """
    if not isinstance(content, list) or not content:
        return content
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text":
            return content
        if not isinstance(part.get("text"), str):
            return content
    return "".join(part["text"] for part in content)


def prompt_indices(
    step: int, *, seed: int, num_rows: int, batch_size: int, shuffle: bool = True
) -> np.ndarray:
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
      shuffle: False deals the rows in the order of the data, in every epoch.

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
        places = offsets[here]
        rows[here] = _epoch_order(seed, int(epoch), num_rows)[places] if shuffle else places
    return rows


@functools.lru_cache(maxsize=4)  # training and cold start may each be at a border of two epochs
def _epoch_order(seed: int, epoch: int, num_rows: int) -> np.ndarray:
    key = np.array([seed % 2**64, epoch], np.uint64)
    order = np.argsort(np.random.Philox(key=key).random_raw(num_rows), kind="stable")
    order.flags.writeable = False
    return order


_Placed = tuple[str, int, Row]  # (the place in a file up to the row's number, that number, row)


class _Source(NamedTuple):
    """One source of rows.

    Attributes:
      name: as the user gave it.
      split: the split to load.
      paths: its files; empty for a data set of the Hugging Face Hub.
      hub: the Hub's rows.
      weight: bytes of the rows, about.
    """

    name: str
    split: str
    paths: list[Path]
    hub: Any
    weight: int

    def files(self) -> Iterator[Iterator[_Placed]]:
        """The rows of each file."""
        if not self.paths:
            place = f"{self.name} ({self.split}): row "
            yield ((place, number, row) for number, row in enumerate(self.hub, 1))
        for path in self.paths:
            yield _file_rows(path)


def _find(source: str, split: str | None) -> _Source:
    path = Path(source).expanduser()
    if path.is_dir():
        files = _folder_files(path, split)
    elif path.exists():
        files = [path]
    elif _suffix(path) or source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise ValueError(f"{source}: there is no such file or folder (looked from {os.getcwd()})")
    else:
        rows = _hub_rows(source, split or "train")
        size = getattr(rows, "dataset_size", None) or 0 if hasattr(rows, "with_format") else 0
        return _Source(source, split or "train", [], rows, size)
    compressed = {".jsonl.gz": 10, ".csv.gz": 10, ".parquet": 10}
    weight = sum(file.stat().st_size * compressed.get(_suffix(file), 1) for file in files)
    return _Source(source, split or "train", files, None, weight)


def _suffix(path: Path) -> str:
    """The one of `SUFFIXES` that a file's name ends in; "" for none."""
    return next((s for s in sorted(SUFFIXES, key=len, reverse=True) if path.name.endswith(s)), "")


def _folder_files(folder: Path, split: str | None) -> list[Path]:
    files = sorted(file for file in folder.iterdir() if _suffix(file))
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


def _file_rows(path: Path) -> Iterator[_Placed]:
    readers = {
        ".jsonl": _jsonl_rows,
        ".json": _json_rows,
        ".csv": _csv_rows,
        ".jsonl.gz": _jsonl_rows,
        ".csv.gz": _csv_rows,
        ".parquet": _parquet_rows,
    }
    if _suffix(path) not in readers:
        raise ValueError(f"{path}: data files end in {', '.join(SUFFIXES)}")
    try:
        yield from readers[_suffix(path)](path)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: not a whole gzip file: {error}") from error
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror or error}") from error


def _open(path: Path):
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")


def _lines(path: Path, advice: str) -> Iterator[tuple[int, str]]:
    """(number, text) of each line, its end included."""
    with _open(path) as file:
        for line in itertools.count(1):
            raw = file.readline(MAX_LINE_BYTES + 1)
            if not raw:
                return
            if len(raw) > MAX_LINE_BYTES:
                raise ValueError(
                    f"{path}:{line}: the line is longer than {MAX_LINE_BYTES} bytes; {advice}"
                )
            yield line, _decode(raw, path, line)


def _jsonl_rows(path: Path) -> Iterator[_Placed]:
    place = f"{path}:"
    for line, text in _lines(path, "a .jsonl file has one row on each line"):
        if text := text.rstrip():
            row = _parse_json(text, path, line)
            yield place, line, _check_object(row, place, line)


def _json_rows(path: Path) -> Iterator[_Placed]:
    """Rows of a JSON file: an array of objects, an object of columns, or JSON Lines."""
    with path.open("rb") as file:
        start = file.read(4096).removeprefix(_BOM).lstrip()
    if not start.startswith(b"["):
        columns = _columns_of_json(path)
        if columns is None:
            yield from _jsonl_rows(path)
            return
        rows = [dict(zip(columns, values)) for values in zip(*columns.values())]
    else:
        rows = _parse_json(_decode(path.read_bytes(), path, 1), path, 1)
    place = f"{path}: row "
    for number, row in enumerate(rows, 1):
        yield place, number, _check_object(row, place, number)


def _columns_of_json(path: Path) -> dict[str, list] | None:
    """The columns of a file that is one object of columns; None for any other.

    A column is a list, or an object from the number of a row to its value, as pandas writes it.
    """
    with path.open("rb") as file:
        first = file.readline(MAX_LINE_BYTES).removeprefix(_BOM)
        try:
            json.loads(first)
            of_lines = any(part.strip() for part in iter(lambda: file.read(2**16), b""))
        except (ValueError, RecursionError):
            of_lines = False  # the first line is no row by itself
    if of_lines:
        return None
    try:
        value = json.loads(path.read_bytes().removeprefix(_BOM))
    except (ValueError, RecursionError):
        return None  # the reader of lines says what is wrong
    if not isinstance(value, dict) or not value:
        return None
    if all(isinstance(column, dict) for column in value.values()):
        indices = [list(column) for column in value.values()]
        if any(index != indices[0] for index in indices) or not all(map(str.isdigit, indices[0])):
            return None
        value = {name: list(column.values()) for name, column in value.items()}
    if not all(isinstance(column, list) for column in value.values()):
        return None
    if any(isinstance(x, dict) and "role" in x for column in value.values() for x in column):
        return None  # one row, whose prompt is a list of messages
    lengths = {name: len(column) for name, column in value.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"{path}: an object of columns needs columns of one length, got {lengths}")
    _refuse_half_characters(path.read_text(encoding="utf-8-sig"), value, path, 1)
    return value


def _csv_rows(path: Path) -> Iterator[_Placed]:
    """Rows of a CSV file with a header; every value is text."""
    place = f"{path}:"
    lines = (text for _, text in _lines(path, "a quotation mark may be open"))
    reader = csv.reader(lines, strict=True)
    csv.field_size_limit(MAX_LINE_BYTES)
    try:
        names = next(reader, [])
        if len(set(names)) < len(names):
            raise ValueError(f"{place}1: the header names a column twice: {', '.join(names)}")
        begin = reader.line_num + 1
        for values in reader:
            if values:
                if len(values) != len(names):
                    raise ValueError(
                        f"{place}{begin}: the row has {len(values)} values and the header "
                        f"{len(names)}; values with commas stand in quotation marks"
                    )
                yield place, begin, dict(zip(names, values))
            begin = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"{place}{reader.line_num}: not CSV: {error}") from error


def _parquet_rows(path: Path) -> Iterator[_Placed]:
    numbers = itertools.count(1)
    for batch in _parquet_batches(path):
        for row in batch.to_pylist():
            del row[stored.NUMBER]
            yield f"{path}: row ", next(numbers), row


def _parquet_batches(path: Path) -> Iterator:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            first = 1
            for batch in file.iter_batches(batch_size=4096):
                yield stored.numbered(batch, first)
                first += batch.num_rows
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path}: not a readable Parquet file: {error}") from error


def _hub_rows(source: str, split: str):
    """The rows of a data set of the Hugging Face Hub."""
    name, _, configuration = source.partition(":")
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            f"{source} is no file here; to load it from the Hugging Face Hub: "
            'pip install "adpo-jax[hub]" (or: pip install datasets)'
        ) from error
    try:
        return datasets.load_dataset(name, configuration or None, split=split)
    except Exception as error:  # errors of datasets, the hub and the network have no common base
        raise ValueError(
            f"{source} is no file here, and its split {split!r} cannot be loaded from the Hugging "
            f"Face Hub: {error}"
        ) from error


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
    _refuse_half_characters(text, value, path, first_line)
    return value


def _refuse_half_characters(text: str, value: Any, path: Path, first_line: int) -> None:
    if "\\ud" not in text and "\\uD" not in text:
        return
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{path}:{first_line}: the text has half a surrogate pair "
            f"(\\u{ord(error.object[error.start]):04x}), which is no character"
        ) from error


def _check_object(row: Any, place: str, number: int) -> Row:
    if not isinstance(row, dict):
        raise ValueError(
            f"{place}{number}: a row must be a JSON object with named columns, "
            f"got {type(row).__name__} {_shorten(row)}"
        )
    return row


def _check_row(row: Row, where: str, wanted: dict[str, str]) -> None:
    for option, key in wanted.items():
        found, value = (True, row[key]) if key in row else _read_key(row, key)
        if not found:
            raise ValueError(
                f"{where}: no column {key!r}; the columns are {', '.join(map(repr, row))}. "
                f"Name the right one in {option}"
            )
        if value is None:
            raise ValueError(f"{where}: the column {key!r} ({option}) is null")
        if option == "data.prompt_key" and not isinstance(value, str | list):
            raise ValueError(
                f"{where}: the prompt in column {key!r} must be text or a list of chat "
                f"messages, got {_shorten(value)}"
            )


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
