"""Prompts of large data sets: rendered and tokenised when they are due.

Before training only the prompts that may be too long are tokenised, on all cores by the tokenizer,
and which of them are is kept in the cache folder. A row is taken to fit where the bytes that it
fills in and the tokens of a prompt of its kind with hardly any text are no more than the limit
together, since a token stands for a byte at least. (Where a tokenizer makes more tokens than bytes
after all, a prompt that is due is cut at its front.)
"""

import collections
import contextlib
import hashlib
import itertools
import json
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from adpo_jax.data import prompts
from adpo_jax.data.dataset import Dataset
from adpo_jax.data.stored import StoredColumn

VERSION = 4

_ROWS_AT_ONCE = 1024
_MOST_KINDS = 1000
_NO_LIMIT = 2**31


class DuePrompts(Sequence):
    """The token ids of a data set's prompts, each computed when it is asked for.

    Args:
      dataset: the rows.
      rows: [N] their numbers in the data, for errors.
      options: keyword arguments of `render_prompts`.
      source: the name of the data, for errors.
    """

    def __init__(
        self, dataset: Dataset, rows: np.ndarray, tokenizer: Any, options: dict, source: str = ""
    ):
        self._dataset, self._rows, self._tokenizer = dataset, rows, tokenizer
        self._source = source
        self._options = options | {"overlong": "truncate"}

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> list[int]:
        return self.take([index])[0]

    def __iter__(self) -> Iterator[list[int]]:
        for begin in range(0, len(self), _ROWS_AT_ONCE):
            yield from self.take(range(begin, min(begin + _ROWS_AT_ONCE, len(self))))

    def take(self, rows: Iterable[int]) -> list[list[int]]:
        """The token ids of these rows."""
        rows = np.asarray(list(rows), np.int64)
        if not len(rows):
            return []
        chosen, numbers = self._dataset.select(rows), self._rows[rows]
        with _naming(self._source):
            return prompts.render_prompts(
                chosen, self._tokenizer, numbers=numbers, **self._options
            ).token_ids


@contextlib.contextmanager
def _naming(source: str) -> Iterator[None]:
    """Puts the name of the data before the row that an error names; "" for none.

    (`render_prompts` does so too, but warns of each of its rows besides.)
    """
    try:
        yield
    except ValueError as error:
        if not (source and re.match(r"row \d", str(error))):
            raise
        raise ValueError(f"{source}: {error}") from error


def overlong_rows(
    dataset: Dataset, tokenizer: Any, options: dict, cache: str, source: str = ""
) -> np.ndarray:
    """The rows whose prompts are too long, after the checks that need no tokens.

    Args:
      options: keyword arguments of `render_prompts`.
      cache: the cache folder; "" for none.
      source: the name of the data, for errors.

    Returns:
      [N] int64 in ascending order.

    Raises:
      ValueError: as `render_prompts`, as far as it can be told without tokenising every prompt.
    """
    path = _cache_path(dataset, tokenizer, options, cache)
    if path is not None and path.exists():
        try:
            return np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError):  # damaged
            pass
    with _naming(source):
        rows = _overlong_rows(dataset, tokenizer, options)
    if path is not None:
        _save(path, rows)
    return rows


def _overlong_rows(dataset: Dataset, tokenizer: Any, options: dict) -> np.ndarray:
    limit, prompt_key = options["max_prompt_length"], options["prompt_key"]
    filled = _filled_in(dataset, prompt_key, options["prompt_template"])
    for name in filled:
        _refuse_null(dataset.columns[name], name)
    sizes = sum(_sizes(dataset.columns[name]) * times for name, times in filled.items())
    tells_apart = len(options.get("tools") or ()) > 1
    environments = dataset.columns.get("environment") if tells_apart else None
    kinds, examples = _kinds(dataset.columns[prompt_key], environments)
    chosen, numbers = dataset.select(examples), np.array(examples)
    _lengths(chosen, numbers, tokenizer, options)  # a template may refuse some kind
    bare = chosen
    for name in filled:
        bare = bare.with_column(name, ["."] * len(bare))
    bare = bare.with_column(prompt_key, [_bare(prompt) for prompt in chosen.columns[prompt_key]])
    around = _lengths(bare, numbers, tokenizer, options)
    unsure = (sizes + around[kinds] > limit) | (sizes < 4)
    rows = np.flatnonzero(unsure)
    lengths = np.zeros(len(dataset), np.int64)
    lengths[rows] = _lengths(dataset.select(rows), rows, tokenizer, options)
    overlong = np.flatnonzero(lengths > limit)
    if options["overlong"] == "filter" and len(overlong) == len(lengths):
        raise ValueError(
            f"all {len(lengths)} prompts are longer than max_prompt_length={limit}: "
            f"{lengths.min()} to {lengths.max()} tokens. Raise data.max_prompt_length to "
            f"{lengths.max()}, or truncate them"
        )
    return overlong


def _bare(prompt: str | list) -> str | list:
    """A prompt with one character of text where it has text."""
    if not isinstance(prompt, list):
        return "."
    return [message | {"content": "."} for message in prompt]


def _filled_in(dataset: Dataset, prompt_key: str, template: str) -> dict[str, int]:
    """The columns that a prompt is made of, and how often each is filled in at most."""
    names = prompts.names_in_template(template, {"prompt", *dataset.columns})
    counts = collections.Counter(prompt_key if name == "prompt" else name for name in names)
    counts[prompt_key] = max(counts[prompt_key], 1)  # earlier messages stay whatever the template
    return counts


def _refuse_null(column: Sequence, name: str) -> None:
    row = column.first_null() if isinstance(column, StoredColumn) else None
    if row is not None:
        raise ValueError(
            f"row {row + 1}: the prompt template uses the column {name!r}, which is null there"
        )


def _sizes(column: Sequence) -> np.ndarray:
    if isinstance(column, StoredColumn):
        return column.sizes()
    return np.array([len(str(value).encode()) for value in column], np.int64)


def _kinds(column: Sequence, environments: Sequence | None = None) -> tuple[np.ndarray, list[int]]:
    """(the kind of each prompt, the first row of each kind): text, or messages alike.

    Messages of one kind have the same roles and the same keys. A chat template adds
    the same to prompts of one kind, or about so.

    Args:
      environments: those of the prompts, where their tools differ.
    """
    if environments is None and isinstance(column, StoredColumn) and column.is_text():
        return np.zeros(len(column), np.int32), [0]
    numbers: dict[tuple, int] = {}
    kinds, examples = np.zeros(len(column), np.int32), []
    environments = itertools.repeat("") if environments is None else environments
    for row, (prompt, environment) in enumerate(zip(column, environments)):
        kind = (str(environment),)
        if not isinstance(prompt, str):
            messages = prompts.checked_messages(prompt, row)
            kind += tuple((message["role"], *sorted(message)) for message in messages)
        if kind not in numbers:
            if len(numbers) == _MOST_KINDS:  # such conversations grow; the last stands for them
                kinds[row] = _MOST_KINDS - 1
                continue
            numbers[kind] = len(numbers)
            examples.append(row)
        kinds[row] = numbers[kind]
    return kinds, examples


def _lengths(dataset: Dataset, numbers: np.ndarray, tokenizer: Any, options: dict) -> np.ndarray:
    """[N] int64, tokens of the prompts of all rows.

    Args:
      numbers: of the rows in the whole data, for errors.
    """
    options = options | {"max_prompt_length": _NO_LIMIT}
    due = DuePrompts(dataset, numbers, tokenizer, options)
    return np.fromiter((len(ids) for ids in due), np.int64, len(dataset))


def _cache_path(dataset: Dataset, tokenizer: Any, options: dict, cache: str) -> Path | None:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not cache or backend is None or not dataset.digest:
        return None
    found = hashlib.sha256(backend.to_str().encode())
    about = [VERSION, dataset.digest, len(dataset), list(dataset.columns), options]
    about += [str(getattr(tokenizer, "chat_template", "")), type(tokenizer).__name__]
    found.update(json.dumps(about, default=str).encode())
    return Path(cache).expanduser() / f"overlong-{found.hexdigest()}.npy"


def _save(path: Path, rows: np.ndarray) -> None:
    unfinished = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
            unfinished = file.name
            np.save(file, rows)
        os.replace(unfinished, path)
    except OSError:  # it is computed again next time
        if unfinished is not None:
            Path(unfinished).unlink(missing_ok=True)
