"""Sources of rows: files, data sets of the Hugging Face Hub, and generated tasks."""

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from adpo_jax.data import embedded, folders, generated, stored
from adpo_jax.data.readers import (
    BEGINNING,
    Placed,
    parquet_batches,
    rows_of,
    suffix_of,
    text_batches,
)
from adpo_jax.data.stored import Segment


class StoredFile(NamedTuple):
    """The rows of one file in the cache.

    Attributes:
      path: the file, or what the user gave in its place.
      digest: a digest of the rows.
      segments: the rows.
    """

    path: str
    digest: str
    segments: list[Segment]


class Files(NamedTuple):
    """Files of rows.

    Attributes:
      name: as the user gave it.
      paths: the files.
      weight: bytes of the rows, about.
    """

    name: str
    paths: list[Path]
    weight: int

    def files(self) -> Iterator[Iterator[Placed]]:
        """The rows of each file."""
        return map(rows_of, self.paths)

    def converted(self, cache_dir: str) -> Iterator[StoredFile]:
        """The rows of each file, from the cache or converted now."""
        for path in self.paths:
            digest = _digest_of(path)
            place, batches = _batches_of(path)
            segments = stored.segments_of_file(path, digest, place, batches, cache_dir)
            yield StoredFile(str(path), digest, segments)


class Table(NamedTuple):
    """Rows that come without files.

    Attributes:
      name: as the user gave it.
      split: the split that was loaded.
      rows: a data set of the Hugging Face Hub, or a list of generated rows.
      weight: bytes of the rows, about; 0 where they need not be stored.
    """

    name: str
    split: str
    rows: Any
    weight: int

    def files(self) -> Iterator[Iterator[Placed]]:
        """The rows, as those of one file."""
        place = f"{self.name} ({self.split}): row "
        yield ((place, number, row) for number, row in enumerate(self.rows, 1))

    def converted(self, cache_dir: str) -> Iterator[StoredFile]:
        """The rows as those of one file, from the cache or converted now."""
        is_list = isinstance(self.rows, list)
        name = json.dumps(self.rows) if is_list else f"{self.name} {self.rows._fingerprint}"
        digest = hashlib.sha256(name.encode()).hexdigest()

        def batches():
            if is_list:
                yield from stored.batches_of_rows(enumerate(self.rows, 1))
                return
            first = 1
            for batch in self.rows.with_format("arrow").iter(batch_size=1000):
                for part in batch.to_batches():
                    yield stored.numbered(part, first)
                    first += part.num_rows

        path = Path(self.name)
        segments = stored.segments_of_file(path, digest, ": row ", batches, cache_dir)
        yield StoredFile(self.name, digest, segments)


def find(source: str, split: str | None) -> Files | Table:
    """The source of a name that the user gave; see `files.load_rows`."""
    if not source:
        raise ValueError(
            "a list of data files, separated by commas, has an empty name: name a file or a folder "
            "there, or remove the comma too many (the working folder is .)"
        )
    if embedded.is_embedded(source):
        raise ValueError(
            f"{source} comes with the package and stands alone in its option: name no other data "
            "beside it, and no spaces"
        )
    if source.startswith(generated.PREFIX):
        split = split or "train"
        return Table(source, split, generated.rows(source, split), 0)
    path = folders.path_of(source)
    if path.is_dir():
        files = folders.files_of(path, split)
    elif path.exists():
        files = [path]
    elif suffix_of(path) or source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise ValueError(f"{source}: there is no such file or folder (looked from {os.getcwd()})")
    else:
        split = split or "train"
        rows = _hub_rows(source, split)
        # Without a fingerprint of its contents, what is in the cache could be of another version.
        known = hasattr(rows, "with_format") and getattr(rows, "_fingerprint", None)
        size = (getattr(rows, "dataset_size", None) or 0) if known else 0
        return Table(source, split, rows, size)
    compressed = {".jsonl.gz": 10, ".csv.gz": 10, ".parquet": 10}
    weight = sum(file.stat().st_size * compressed.get(suffix_of(file), 1) for file in files)
    return Files(source, files, weight)


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
