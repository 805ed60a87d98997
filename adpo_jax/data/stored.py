"""Large data files as memory-mapped Arrow: converted once, read value by value.

A file of rows becomes one or more segments (Arrow IPC files) in the cache folder, under the SHA-256
of its bytes, so that a changed file is another entry. A column whose values are all text lies there
as text, and any other as JSON, since rows of one file may have numbers here and lists there.
Columns of Parquet files keep their types. A segment ends where a column appears or stops being all
text. The cache may be removed at any time: what is in use stays open.

Left out: limits on the size of the cache.
"""

import contextlib
import functools
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.ipc

VERSION = 3

# The column with the number of each row in its file: a line, or a count of rows.
NUMBER = "\0number"
MAX_COLUMNS = 1000

_JSON = {b"adpo_jax": b"json"}
_ROWS_OF_A_BATCH = 1024


class Segment(NamedTuple):
    """Rows that have the same columns.

    Attributes:
      table: memory-mapped; one of its columns is `NUMBER`.
      place: what stands between the file's name and a row's number, for errors: ":" or ": row ".
    """

    table: pa.Table
    place: str

    @property
    def names(self) -> list[str]:
        return [name for name in self.table.column_names if name != NUMBER]

    def is_json(self, name: str) -> bool:
        """Whether the column holds JSON."""
        return self.table.schema.field(name).metadata == _JSON

    def where(self, path: str, row: int) -> str:
        """The place of a row in its file, for errors."""
        return f"{path}{self.place}{self.table[NUMBER][row].as_py()}"


class StoredColumn(Sequence):
    """One column over segments, each value read when it is asked for.

    Args:
      segments: the segments; where one lacks the column, values are None.
      name: the column's name.
      rows: [N] the numbers of its rows; None for all.
      then: turns what is stored into the value.
    """

    def __init__(
        self,
        segments: Sequence[Segment],
        name: str,
        rows: np.ndarray | None = None,
        then: Callable[[Any], Any] | None = None,
    ):
        self._segments, self.name, self._rows, self._then = segments, name, rows, then
        self._ends = np.cumsum([segment.table.num_rows for segment in segments])
        self._columns = [s.table[name] if name in s.names else None for s in segments]

    def __len__(self) -> int:
        return int(self._ends[-1]) if self._rows is None else len(self._rows)

    def __getitem__(self, index: int) -> Any:
        if isinstance(index, slice):
            return self.take(range(*index.indices(len(self))))
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index = int(index) % len(self)
        row = index if self._rows is None else int(self._rows[index])
        number = int(np.searchsorted(self._ends, row, side="right"))
        column = self._columns[number]
        if column is None:
            return self._value(None, number)
        begin = int(self._ends[number]) - self._segments[number].table.num_rows
        return self._value(column[row - begin].as_py(), number)

    def __iter__(self) -> Iterator[Any]:
        if self._rows is not None:
            yield from (self[index] for index in range(len(self)))
            return
        for number, (segment, column) in enumerate(zip(self._segments, self._columns)):
            if column is None:
                yield from (self._value(None, number) for _ in range(segment.table.num_rows))
                continue
            for chunk in column.iterchunks():
                yield from (self._value(value, number) for value in chunk.to_pylist())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None

    def take(self, rows: Iterable[int]) -> list:
        """The values of these rows."""
        return [self[row] for row in rows]

    def select(self, rows: Sequence[int]) -> "StoredColumn":
        """The column of these rows alone."""
        rows = np.asarray(rows, np.int64)
        rows = rows if self._rows is None else self._rows[rows]
        return StoredColumn(self._segments, self.name, rows, self._then)

    def mapped(self, function: Callable[[Any], Any]) -> "StoredColumn":
        """The column of `function`'s results, each computed when it is asked for."""
        before = self._then

        def then(value):
            return function(value if before is None else before(value))

        return StoredColumn(self._segments, self.name, self._rows, then)

    def is_text(self) -> bool:
        """Whether all values are text or null, as far as their types tell."""
        return self._then is None and all(
            column is None or (_is_text(column) and not segment.is_json(self.name))
            for segment, column in zip(self._segments, self._columns)
        )

    def first_null(self) -> int | None:
        """The first of the rows, by its number in the files, that is null; None for none."""
        begin = 0
        for segment, column in zip(self._segments, self._columns):
            length = segment.table.num_rows
            nulls = np.arange(length if column is None else 0)
            if column is not None and column.null_count:
                nulls = np.flatnonzero(pc.is_null(column).to_numpy())
            if self._rows is not None:
                nulls = nulls[np.isin(begin + nulls, self._rows)]
            if len(nulls):
                return begin + int(nulls[0])
            begin += length
        return None

    def sizes(self) -> np.ndarray:
        """[N] int64, at least the bytes of each value as UTF-8; null has 0."""
        parts = []
        for segment, column in zip(self._segments, self._columns):
            if column is None:
                parts.append(np.zeros(segment.table.num_rows, np.int64))
            elif self._then is None and _is_text(column):
                parts += [
                    pc.fill_null(pc.binary_length(chunk), 0).to_numpy(zero_copy_only=False)
                    for chunk in column.iterchunks()
                ]
            else:
                values = StoredColumn([segment], self.name, then=self._then)
                texts = (json.dumps(v, ensure_ascii=False, default=str) for v in values)
                parts.append(np.fromiter((len(t.encode()) for t in texts), np.int64))
        sizes = np.concatenate(parts).astype(np.int64)
        return sizes if self._rows is None else sizes[self._rows]

    def _value(self, value: Any, number: int) -> Any:
        if value is not None and self._segments[number].is_json(self.name):
            value = json.loads(value)
        return value if self._then is None else self._then(value)


def _is_text(column: pa.ChunkedArray) -> bool:
    return pa.types.is_string(column.type) or pa.types.is_large_string(column.type)


def sha256(path: Path) -> str:
    """The digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def segments_of_file(path: Path, digest: str, place: str, batches, cache: str) -> list[Segment]:
    """The segments of a file, from the cache or converted now.

    Args:
      digest: SHA-256 of the file's bytes.
      place: see `Segment`.
      batches: called without arguments for the file's rows as `pa.RecordBatch`es.
      cache: the cache folder; "" for one that goes when the process ends.

    Raises:
      ValueError: for a file that cannot be converted, or no room to do it.
    """
    kind = "line" if place == ":" else "row"
    folder = _cache_folder(cache) / f"{digest}-{kind}-{VERSION}"
    try:
        return _opened(folder, place)
    except (OSError, pa.ArrowException):  # it is not there, or damaged
        pass
    unfinished = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=".unfinished-", dir=folder.parent))
        _write(unfinished, batches())
        with contextlib.suppress(OSError, pa.ArrowException):
            return _opened(folder, place)  # another process was quicker
        damaged = unfinished.with_name(f"{unfinished.name}.damaged")
        try:
            with contextlib.suppress(FileNotFoundError):
                os.rename(folder, damaged)
            os.rename(unfinished, folder)
        except OSError:
            if not folder.is_dir():
                raise
        finally:
            shutil.rmtree(damaged, ignore_errors=True)
        return _opened(folder, place)
    except OSError as error:
        raise ValueError(
            f"{path} cannot be converted to Arrow in {folder.parent} ({error.strerror or error}); "
            "name another folder, with room, in data.cache_dir"
        ) from error
    finally:
        if unfinished is not None:
            shutil.rmtree(unfinished, ignore_errors=True)


def batches_of_rows(rows: Iterable[tuple[int, dict]]) -> Iterator[pa.RecordBatch]:
    """Record batches of (number, row) pairs."""
    names: dict[str, bool] = {}  # name -> whether it is stored as JSON, which it then stays
    numbers, waiting = [], []
    for number, row in rows:
        numbers.append(number)
        waiting.append(row)
        if len(waiting) == _ROWS_OF_A_BATCH:
            yield _batch(numbers, waiting, names)
            numbers, waiting = [], []
    if waiting:
        yield _batch(numbers, waiting, names)


def _batch(numbers: list[int], rows: list[dict], names: dict[str, bool]) -> pa.RecordBatch:
    for row in rows:
        if not row.keys() <= names.keys():
            names.update((name, False) for name in row if name not in names)
    if len(names) > MAX_COLUMNS:
        raise ValueError(
            f"the rows up to number {numbers[-1]} have {len(names)} different columns; a data set "
            f"has at most {MAX_COLUMNS}"
        )
    arrays, fields = [], []
    for name in names:
        values = [row.get(name) for row in rows]
        if not names[name]:
            names[name] = not all(value is None or type(value) is str for value in values)
        if names[name]:
            dump = functools.partial(json.dumps, ensure_ascii=False, default=str)
            values = [None if value is None else dump(value) for value in values]
        arrays.append(pa.array(values, pa.large_string()))
        fields.append(pa.field(name, pa.large_string(), metadata=_JSON if names[name] else None))
    arrays.append(pa.array(numbers, pa.int64()))
    fields.append(pa.field(NUMBER, pa.int64()))
    return pa.RecordBatch.from_arrays(arrays, schema=pa.schema(fields))


def numbered(batch: pa.RecordBatch, first: int) -> pa.RecordBatch:
    """A record batch with the numbers of its rows and, but for the following, its types.

    It has no dictionaries, its numbers of 16 and 32 bits are those of 64 that one writes like them
    (the float32 nearest to 0.1 is 0.1, and not 0.10000000149011612), and its times are those of
    Python, which have no nanoseconds.
    """
    arrays = []
    for column in batch.columns:
        if pa.types.is_dictionary(column.type):
            column = column.dictionary_decode()
        arrays.append(as_of_python(column))
    arrays.append(pa.array(np.arange(first, first + batch.num_rows), pa.int64()))
    return pa.RecordBatch.from_arrays(arrays, [*batch.schema.names, NUMBER])


def as_of_python(array: pa.Array) -> pa.Array:
    """An array whose short numbers and times, at any depth, are as `numbered` says."""
    kind = array.type
    if not _differs_in_python(kind):
        return array
    if pa.types.is_struct(kind):
        fields = [as_of_python(field) for field in array.flatten()]
        return pa.StructArray.from_arrays(fields, [f.name for f in kind], mask=array.is_null())
    if _is_list(kind):
        ends = np.cumsum(pc.fill_null(pc.list_value_length(array), 0).to_numpy(), dtype=np.int64)
        is_null = [*array.is_null().to_pylist(), False]  # of the place where each list begins
        begins = pa.array([0, *ends], pa.int64(), mask=np.array(is_null))
        return pa.LargeListArray.from_arrays(begins, as_of_python(array.flatten()))
    if pa.types.is_float16(kind):
        numbers = [  # whole ones are exact; the shortest text of 65504 is 65500
            x if x is None or float(x).is_integer() else float(str(np.float16(x)))
            for x in array.to_pylist()
        ]
        return pa.array(numbers, pa.float64())
    if pa.types.is_float32(kind):
        return pc.cast(pc.cast(array, pa.string()), pa.float64())
    return pc.cast(array, _MICROSECONDS[kind.id](kind), safe=False)


# The types of times in nanoseconds, and what makes those in microseconds of them.
_MICROSECONDS = {
    pa.timestamp("ns").id: lambda kind: pa.timestamp("us", kind.tz),
    pa.duration("ns").id: lambda kind: pa.duration("us"),
    pa.time64("ns").id: lambda kind: pa.time64("us"),
}


def has_times(kind: pa.DataType) -> bool:
    """Whether a type has times or dates, at any depth."""
    if pa.types.is_dictionary(kind):
        return has_times(kind.value_type)
    fields = (kind.field(i).type for i in range(kind.num_fields))
    return pa.types.is_temporal(kind) or any(map(has_times, fields))


def _differs_in_python(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return any(_differs_in_python(field.type) for field in kind)
    if _is_list(kind):
        return _differs_in_python(kind.value_type)
    if kind.id in _MICROSECONDS:
        return kind.unit == "ns"
    return pa.types.is_float16(kind) or pa.types.is_float32(kind)


def _is_list(kind: pa.DataType) -> bool:
    return (
        pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    )


def _write(folder: Path, batches: Iterable[pa.RecordBatch]) -> None:
    writer = schema = None
    count = 0
    try:
        for batch in batches:
            if schema is None or not batch.schema.equals(schema, check_metadata=True):
                if writer is not None:
                    writer.close()
                schema = batch.schema
                writer = pa.ipc.new_file(str(folder / f"{count:06d}.arrow"), schema)
                count += 1
            writer.write_batch(batch)
    finally:
        if writer is not None:
            writer.close()
    (folder / "count").write_text(str(count))


def _opened(folder: Path, place: str) -> list[Segment]:
    try:
        count = int((folder / "count").read_text())
    except ValueError as error:
        raise OSError(f"{folder} is damaged") from error
    files = [folder / f"{number:06d}.arrow" for number in range(count)]
    return [Segment(pa.ipc.open_file(pa.memory_map(str(f))).read_all(), place) for f in files]


def _cache_folder(cache: str) -> Path:
    return Path(cache).expanduser() if cache else _temporary_folder()


@functools.cache
def _temporary_folder() -> Path:
    import atexit

    folder = Path(tempfile.mkdtemp(prefix="adpo_jax-data-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder
