"""Data sets: rows from files or the Hugging Face Hub, their solutions, and the order of training.

`readers` reads the files. A small data set lies in memory as columns of Python values; a large one
is converted to Arrow once and mapped into memory (`stored`), so that a million rows take no more
memory than those in use.

Left out: remote file systems.
"""

import functools
import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from adpo_jax.data import folders, generated, stored
from adpo_jax.data.readers import (
    BEGINNING,
    Placed,
    Row,
    parquet_batches,
    refuse_twice,
    rows_of,
    shorten,
    suffix_of,
    text_batches,
)
from adpo_jax.data.stored import Segment, StoredColumn

# Above so many bytes in its files a data set is mapped into memory. Compressed ones count tenfold.
LARGE_BYTES = 32 * 2**20

_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")


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
        """A column by its name, or what lies in one by a dotted path, as `reward_model.style`.

        Raises:
          KeyError: when no column has the name or begins the path.
        """
        if name in self.columns:
            return self.columns[name]
        first, path = _split_path(name, self.columns)
        if not first:
            raise KeyError(f"no column {name!r}; there are {', '.join(self.columns)}")
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
        `owner/name:configuration`; generated tasks, `reasoning_gym:name` (see `generated`).
      prompt_key: the column of prompts, strings or lists of chat messages. It and `answer_key` may
        be dotted paths into a column of objects, as in `reward_model.ground_truth`.
      answer_key: the column of answers.
      split: which split of a Hugging Face data set, "train" unless given. In a folder whose files
        or folders are named after splits (gsm8k_train.jsonl, test/0.parquet) it chooses among them.
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


def _unique_ids(source: "_Source") -> Iterator[Placed]:
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
        return ": row ", lambda: parquet_batches(file)
    placed = rows_of(file)
    first = next(placed, (":", 0, {}))[0].removeprefix(str(file))

    def batches():
        start = BEGINNING
        if suffix_of(file) == ".jsonl":
            for batch, behind in text_batches(file):
                yield batch
                start = behind
        rest = ((number, row) for _, number, row in rows_of(file, start))
        yield from stored.batches_of_rows(rest)

    return first, batches


def _hub_segments(source: "_Source", cache_dir: str) -> tuple[str, list[Segment]]:
    """A digest of the rows of a Hub's data set or of generated ones, and the rows."""
    rows = source.hub
    if isinstance(rows, list):
        digest = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
        return digest, stored.segments_of_file(
            Path(source.name),
            digest,
            ": row ",
            lambda: stored.batches_of_rows(enumerate(rows, 1)),
            cache_dir,
        )
    name = f"{source.name} {rows._fingerprint}"
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
        refuse_twice(path, segment.table.column_names)  # one converted before this was refused
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
        binary = pa.types.is_binary(kind) or pa.types.is_large_binary(kind)
        binary = binary or pa.types.is_fixed_size_binary(kind)
        if not column.null_count and (text or (option != "data.prompt_key" and not binary)):
            return
    for row, value in enumerate(part.column(key)):
        wrong = option == "data.prompt_key" and not isinstance(value, str | list)
        if value is None or isinstance(value, bytes) or wrong:
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


def text_to_imitate(value: Any) -> str | None:
    """The text of a completion: of text, of a number, or of one message of the assistant.

    The message stands alone or in a list, and has nothing but its role and text. None for anything
    else, whose text would say less than it does.
    """
    if isinstance(value, str | int | float):
        return str(value)
    message = value[0] if isinstance(value, list) and len(value) == 1 else value
    if not isinstance(message, dict) or message.get("role") != "assistant":
        return None
    # Columns of tables have every key in every row.
    if any(v not in (None, "", []) for k, v in message.items() if k not in ("role", "content")):
        return None
    content = joined_parts(message.get("content"))
    return content if isinstance(content, str) else None


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


class _Source(NamedTuple):
    """One source of rows.

    Attributes:
      name: as the user gave it.
      split: the split to load.
      paths: its files; empty for a data set of the Hugging Face Hub.
      hub: the Hub's rows, or a list of generated ones.
      weight: bytes of the rows, about.
    """

    name: str
    split: str
    paths: list[Path]
    hub: Any
    weight: int

    def files(self) -> Iterator[Iterator[Placed]]:
        """The rows of each file."""
        if not self.paths:
            place = f"{self.name} ({self.split}): row "
            yield ((place, number, row) for number, row in enumerate(self.hub, 1))
        for path in self.paths:
            yield rows_of(path)


def _find(source: str, split: str | None) -> _Source:
    if not source:
        raise ValueError(
            "a list of data files, separated by commas, has an empty name: name a file or a folder "
            "there, or remove the comma too many (the working folder is .)"
        )
    if source.startswith(generated.PREFIX):
        split = split or "train"
        return _Source(source, split, [], generated.rows(source, split), 0)
    path = folders.path_of(source)
    if path.is_dir():
        files = folders.files_of(path, split)
    elif path.exists():
        files = [path]
    elif suffix_of(path) or source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise ValueError(f"{source}: there is no such file or folder (looked from {os.getcwd()})")
    else:
        rows = _hub_rows(source, split or "train")
        # Without a fingerprint of its contents, what is in the cache could be of another version.
        known = hasattr(rows, "with_format") and getattr(rows, "_fingerprint", None)
        size = (getattr(rows, "dataset_size", None) or 0) if known else 0
        return _Source(source, split or "train", [], rows, size)
    compressed = {".jsonl.gz": 10, ".csv.gz": 10, ".parquet": 10}
    weight = sum(file.stat().st_size * compressed.get(suffix_of(file), 1) for file in files)
    return _Source(source, split or "train", files, None, weight)


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
        if isinstance(value, bytes):
            raise ValueError(
                f"{where}: the column {key!r} ({option}) holds bytes, got {shorten(value)}; cast "
                "the column to text"
            )
        if option == "data.prompt_key" and not isinstance(value, str | list):
            raise ValueError(
                f"{where}: the prompt in column {key!r} must be text or a list of chat "
                f"messages, got {shorten(value)}"
            )
