"""The checks of a data set's rows: needed columns are there, and no `id` comes twice in a file."""

from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from adpo_jax.data.dataset import Dataset, read_key, split_path
from adpo_jax.data.readers import Row, refuse_twice, shorten
from adpo_jax.data.stored import Segment, StoredColumn


class Ids:
    """The ids of the rows of one file, by which one that was appended to itself is found.

    Two files may both count from 0.

    Args:
      name: of the file or its source, for the error.
    """

    def __init__(self, name: str):
        self._name = name
        self._first_rows: dict[str, int] = {}

    def add(self, number: int, value: Any) -> None:
        """Takes the id of a row, and refuses one that another row has.

        None and the empty text, as an empty cell of a CSV file, are no ids.
        """
        if value is None or value == "":
            return
        first = self._first_rows.setdefault(str(value), number)
        if first != number:
            raise ValueError(
                f"{self._name}: rows {first} and {number} have the same id {value!r}; remove one, "
                "or rename the column if it is no id"
            )


def check_row(row: Row, where: str, wanted: dict[str, str]) -> None:
    """Refuses a row that lacks a column, or has no answer or prompt there.

    Args:
      where: the place of the row, for the error.
      wanted: the name or dotted path of each needed column, under the option that gives it.
    """
    for option, key in wanted.items():
        found, value = read_key(row, key)
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


def check_segments(segments: Sequence[Segment], path: str, wanted: dict[str, str]) -> None:
    """The checks of `check_row` and `Ids` on the stored rows of one file."""
    for segment in segments:
        refuse_twice(path, segment.table.column_names)  # one converted before this was refused
        for option, key in wanted.items():
            if not split_path(key, segment.names)[0]:
                row = dict.fromkeys(segment.names)
                check_row(row, segment.where(path, 0), {option: key})
        if segment.table.num_rows == 0:
            continue
        part = Dataset({name: StoredColumn([segment], name) for name in segment.names})
        for option, key in wanted.items():
            _check_stored(segment, part, path, option, key)
    if segments and all("id" in segment.names for segment in segments):
        _check_stored_ids(StoredColumn(segments, "id"), segments, path)


def _check_stored(segment: Segment, part: Dataset, path: str, option: str, key: str) -> None:
    """Checks one needed column; what Arrow can tell by itself is not read."""
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
            check_row(part.row(row), segment.where(path, row), {option: key})


def _check_stored_ids(ids: StoredColumn, segments: Sequence[Segment], path: str) -> None:
    try:
        columns = [pc.cast(segment.table["id"], pa.large_string()) for segment in segments]
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):  # bytes, lists
        pass
    else:
        column = pa.chunked_array([chunk for c in columns for chunk in c.iterchunks()])
        if pc.count_distinct(column, mode="only_valid").as_py() == len(column) - column.null_count:
            return
    found = Ids(path)
    for number, value in enumerate(ids, 1):
        found.add(number, value)
