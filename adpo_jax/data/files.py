"""Loading of data sets from files, the Hugging Face Hub or generated tasks.

`readers` reads the files. A small data set lies in memory as columns of Python values; a large one
is converted to Arrow once and mapped into memory (`stored`), so that a million rows take no more
memory than those in use.

Left out: remote file systems.
"""

import hashlib
import itertools
from collections.abc import Iterator, Sequence

from adpo_jax.data.checks import Ids, check_row, check_segments
from adpo_jax.data.dataset import Dataset
from adpo_jax.data.readers import Placed
from adpo_jax.data.sources import Files, Table, find
from adpo_jax.data.stored import Segment, StoredColumn

# Above so many bytes in its files a data set is mapped into memory. Compressed ones count tenfold.
LARGE_BYTES = 32 * 2**20


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
    sources = [find(name.strip(), split) for name in names]
    if sum(found.weight for found in sources) > LARGE_BYTES:
        return _stored(sources, wanted, cache_dir)
    columns: dict[str, list] = {}
    count = 0
    for place, number, row in itertools.chain.from_iterable(map(_unique_ids, sources)):
        check_row(row, f"{place}{number}", wanted)
        for key in row:
            if key not in columns:
                columns[key] = [None] * count
        for key, values in columns.items():
            values.append(row.get(key))
        count += 1
    if count == 0:
        raise ValueError(f"{', '.join(names) or 'the list of data files'}: there are no rows")
    return Dataset(columns)


def _unique_ids(source: Files | Table) -> Iterator[Placed]:
    """The rows of a source, none of whose files has an `id` twice."""
    for rows in source.files():
        ids = Ids(source.name)
        for number, placed in enumerate(rows, 1):
            ids.add(number, placed[2].get("id"))
            yield placed


def _stored(sources: Sequence[Files | Table], wanted: dict[str, str], cache_dir: str) -> Dataset:
    """The rows of all sources as stored columns."""
    segments: list[Segment] = []
    digests = []
    for file in itertools.chain.from_iterable(source.converted(cache_dir) for source in sources):
        check_segments(file.segments, file.path, wanted)
        digests.append(file.digest)
        segments += file.segments
    if not segments:
        raise ValueError(f"{', '.join(s.name for s in sources)}: there are no rows")
    names = dict.fromkeys(name for segment in segments for name in segment.names)
    digest = hashlib.sha256(" ".join(digests).encode()).hexdigest()
    return Dataset({name: StoredColumn(segments, name) for name in names}, digest)
