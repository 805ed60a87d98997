"""A data set: rows as columns, each found by its name or by a dotted path into it."""

from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from adpo_jax.data.readers import Row
from adpo_jax.data.stored import StoredColumn


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
        first, path = split_path(name, self.columns)
        if not first:
            raise KeyError(f"no column {name!r}; there are {', '.join(self.columns)}")
        return self.mapped(first, lambda value: _inside(value, path)[1])

    def has(self, name: str) -> bool:
        """Whether there is such a column; of a dotted path, whether any row has something there."""
        if name in self.columns:
            return True
        first, _ = split_path(name, self.columns)
        return bool(first) and any(value is not None for value in self.column(name))


def split_path(name: str, columns: Container[str]) -> tuple[str, list[str]]:
    """The column that a dotted path begins with, and the keys inside; "" where there is none."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        if ".".join(parts[:end]) in columns:
            return ".".join(parts[:end]), parts[end:]
    return "", parts


def read_key(row: Row, key: str) -> tuple[bool, Any]:
    """(whether a row has this column or dotted path, its value)."""
    if key in row:
        return True, row[key]
    first, path = split_path(key, row)
    return _inside(row[first], path) if first else (False, None)


def _inside(value: Any, path: Sequence[str]) -> tuple[bool, Any]:
    """(whether the path leads somewhere in a value, what lies there)."""
    for key in path:
        if not isinstance(value, dict) or key not in value:
            return False, None
        value = value[key]
    return True, value
