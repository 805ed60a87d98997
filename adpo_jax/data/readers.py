"""Readers of data files: the rows of one file, in any of the formats, each with its place.

Files are read line by line, and whatever is wrong in them is reported with file, line and column.
"""

import csv
import gzip
import itertools
import json
import re
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.json

from adpo_jax.data import stored

SUFFIXES = (".jsonl", ".json", ".csv", ".jsonl.gz", ".csv.gz", ".parquet")

# A prompt of 100,000 tokens is about half a megabyte; a longer line is a file of another kind.
MAX_LINE_BYTES = 32 * 2**20
# What Arrow parses at once.
_BLOCK_BYTES = 8 * 2**20

_BOM = b"\xef\xbb\xbf"
_CR = re.compile(r"(?<=\r)(?!\n|\Z)")
_SEPARATORS = re.compile(r"[;\t|]")

Row = dict[str, Any]
Placed = tuple[str, int, Row]  # (the place in a file up to the row's number, that number, row)


class _TwiceError(ValueError):
    """An object that has a key twice, of whose values JSON's readers keep the last."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise _TwiceError(f"the object {shorten(dict(pairs))} has the key {twice!r} twice")
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_object)


def suffix_of(path: Path) -> str:
    """The one of `SUFFIXES` that a file's name ends in; "" for none."""
    return next((s for s in sorted(SUFFIXES, key=len, reverse=True) if path.name.endswith(s)), "")


class Start(NamedTuple):
    """Where to begin in a .jsonl file."""

    line: int  # lines before it
    byte: int


BEGINNING = Start(0, 0)


def rows_of(path: Path, start: Start = BEGINNING) -> Iterator[Placed]:
    """The rows of a file.

    Args:
      start: where to begin; other than the beginning for a .jsonl file alone.

    Raises:
      ValueError: for a file that cannot be read or parsed, with its line and column.
    """
    readers = {
        ".jsonl": _jsonl_rows,
        ".json": _json_rows,
        ".csv": _csv_rows,
        ".jsonl.gz": _jsonl_rows,
        ".csv.gz": _csv_rows,
        ".parquet": _parquet_rows,
    }
    if suffix_of(path) not in readers:
        raise ValueError(f"{path}: data files end in {', '.join(SUFFIXES)}")
    options = {} if start == BEGINNING else {"start": start}
    try:
        yield from readers[suffix_of(path)](path, **options)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: not a whole gzip file: {error}") from error
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror or error}") from error


def _open(path: Path):
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")


def _lines(path: Path, advice: str, start: Start = BEGINNING) -> Iterator[tuple[int, str]]:
    """(number, text) of each line, its end included."""
    with _open(path) as file:
        file.seek(start.byte)
        for line in itertools.count(start.line + 1):
            raw = file.readline(MAX_LINE_BYTES + 1)
            if not raw:
                return
            if len(raw) > MAX_LINE_BYTES:
                raise ValueError(
                    f"{path}:{line}: the line is longer than {MAX_LINE_BYTES} bytes; {advice}"
                )
            yield line, _decode(raw, path, line)


def _jsonl_rows(path: Path, start: Start = BEGINNING) -> Iterator[Placed]:
    place = f"{path}:"
    for line, text in _lines(path, "a .jsonl file has one row on each line", start):
        if text := text.rstrip():
            try:  # what most lines are, without the calls of those that are wrong
                row, end = _DECODER.raw_decode(text)
                plain = end == len(text) and "\\u" not in text and type(row) is dict
            except (ValueError, RecursionError):
                plain = False
            if not plain:
                row = _check_object(_parse_json(text, path, line), place, line)
            yield place, line, row


def text_batches(path: Path) -> Iterator[tuple[pa.RecordBatch, Start]]:
    """The rows of a .jsonl file as far as their values are all text, and where the next ones begin.

    Arrow's parser reads what nearly all lines are and nothing else: one object with names of the
    first line, each with text or null. It ends before the first block of lines with another, where
    the reader of lines has to go on.
    """
    with path.open("rb") as file:
        names, first = None, 1
        while block := file.read(_BLOCK_BYTES):
            block += b"" if block.endswith(b"\n") else file.readline(MAX_LINE_BYTES)
            if names is None:
                names = _names_of_text(block[: block.find(b"\n") + 1])
            batch = names and _text_batch(block, names)
            if not batch:
                return
            yield stored.numbered(batch, first), Start(first + batch.num_rows - 1, file.tell())
            first += batch.num_rows


def _names_of_text(line: bytes) -> list[str] | None:
    """The names of an object whose values are all text or null; None for any other line."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    plain = isinstance(row, dict) and all(v is None or isinstance(v, str) for v in row.values())
    return list(row) if plain and 0 < len(row) <= stored.MAX_COLUMNS else None


def _text_batch(block: bytes, names: list[str]) -> pa.RecordBatch | None:
    """Whole lines as columns of text; None where a line is anything else."""
    lines = block.count(b"\n") + (not block.endswith(b"\n"))
    # A line that does not begin an object, or is empty, would shift the numbers of the others.
    if not block.startswith(b"{") or block.count(b"\n{") + 1 != lines:
        return None
    schema = pa.schema([pa.field(name, pa.string()) for name in names])
    try:
        table = pa.json.read_json(
            pa.BufferReader(block),
            pa.json.ReadOptions(block_size=len(block) + 1),
            pa.json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="error"),
        )
        table.validate(full=True)  # that the text is UTF-8, without half characters
    except pa.ArrowException:
        return None
    if table.num_rows != lines:
        return None
    wide = table.cast(pa.schema([pa.field(name, pa.large_string()) for name in names]))
    return wide.combine_chunks().to_batches()[0]


def _json_rows(path: Path) -> Iterator[Placed]:
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
        value = json.loads(path.read_bytes().removeprefix(_BOM), object_pairs_hook=_object)
    except _TwiceError as error:
        raise ValueError(f"{path}: {error}; remove one") from None
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
    _refuse_half_escapes(_decode(path.read_bytes(), path, 1), value, f"{path}:1")
    return value


def _csv_rows(path: Path) -> Iterator[Placed]:
    """Rows of a CSV file with a header; every value is text."""
    place = f"{path}:"
    whole = (text for _, text in _lines(path, "a quotation mark may be open"))
    # Lines may end with CR alone, as old programs for the Macintosh write them.
    lines = (line for text in whole for line in _CR.split(text))
    reader = csv.reader(lines, strict=True)
    csv.field_size_limit(MAX_LINE_BYTES)
    try:
        names = [name.strip() for name in next(reader, [])]
        if len(names) == 1 and (other := _SEPARATORS.search(names[0])):
            raise ValueError(
                f"{place}1: the columns of the header are separated by {other[0]!r}; separate them "
                "by commas, with quotation marks around values that have commas"
            )
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


def _parquet_rows(path: Path) -> Iterator[Placed]:
    numbers = itertools.count(1)
    for batch in parquet_batches(path):
        for row in batch.to_pylist():
            del row[stored.NUMBER]
            yield f"{path}: row ", next(numbers), row


def refuse_twice(path: Path | str, names: list[str]) -> None:
    """Refuses a table that has two columns of one name."""
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"{path}: the table has the column {twice!r} twice; rename or remove one")


def parquet_batches(path: Path) -> Iterator:
    """The record batches of a Parquet file, with `stored.NUMBER`."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            refuse_twice(path, file.schema_arrow.names)
            first = 1
            for batch in file.iter_batches(batch_size=4096):
                _refuse_unreadable(path, batch, first)
                yield stored.numbered(batch, first)
                first += batch.num_rows
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: not a readable Parquet file: {error}") from error


def _refuse_unreadable(path: Path, batch: Any, first: int) -> None:
    """Refuses values that Python cannot hold: text that is not UTF-8, times out of its range.

    Args:
      batch: a `pyarrow.RecordBatch` that begins with row `first`.
    """
    import pyarrow

    for name, column in zip(batch.schema.names, batch.columns):
        try:
            column.validate(full=True)
            if stored.has_times(column.type):
                stored.as_of_python(column).to_pylist()
        # An unknown time zone is a KeyError.
        except (pyarrow.ArrowException, ValueError, OverflowError, KeyError) as error:
            raise ValueError(
                f"{path}: column {name!r} has a value in rows {first} to "
                f"{first + len(column) - 1} that cannot be read: {error}"[:500]
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
        value = json.loads(text, object_pairs_hook=_object)
    except _TwiceError as error:
        line = (
            f":{first_line}" if text.lstrip().startswith("{") else ""
        )  # of an array, in one of many
        raise ValueError(f"{path}{line}: {error}; remove one") from None
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise ValueError(f"{path}:{line}:{error.colno}: not JSON: {error.msg}") from error
    except RecursionError as error:  # 10,000 brackets
        raise ValueError(f"{path}:{first_line}: not usable JSON: {error}") from error
    except ValueError as error:  # Python reads no integer of over 4,300 digits
        raise ValueError(
            f"{path}:{first_line}: not usable JSON: a number has more than "
            f"{sys.get_int_max_str_digits():,} digits; write it as text, in quotes"
        ) from error
    _refuse_half_escapes(text, value, f"{path}:{first_line}")
    return value


def _refuse_half_escapes(text: str, value: Any, where: str) -> None:
    """As `refuse_half_characters`, for what was read of JSON."""
    if "\\ud" in text or "\\uD" in text:
        refuse_half_characters(json.dumps(value, ensure_ascii=False), where)


def refuse_half_characters(text: str, where: str) -> None:
    """Refuses text that UTF-8 has no bytes for.

    Args:
      where: the place of the text, for the error.

    Raises:
      ValueError: naming the half of a character.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where}: the text has half a surrogate pair "
            f"(\\u{ord(error.object[error.start]):04x}), which is no character"
        ) from None


def _check_object(row: Any, place: str, number: int) -> Row:
    if not isinstance(row, dict):
        raise ValueError(
            f"{place}{number}: a row must be a JSON object with named columns, "
            f"got {type(row).__name__} {shorten(row)}"
        )
    return row


def shorten(value: Any) -> str:
    """A value in at most 60 characters, for errors."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
