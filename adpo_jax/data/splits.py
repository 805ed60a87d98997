"""The splits of embedded data: questions for training, for evaluation and for demonstrations."""

from collections.abc import Callable

# The seed of each split.
SEEDS = {"train": 1, "val": 2, "demonstrations": 3}


def held_out(name: str, split: str, rows: Callable[[str], dict[str, list]]) -> set[str]:
    """The questions that a split must not have: those of the splits before it.

    Args:
      name: of the data, for the error.
      rows: gives the columns of a split.

    Raises:
      ValueError: for another split than those of `SEEDS`.
    """
    if split not in SEEDS:
        raise ValueError(f"{name} has the splits {sorted(SEEDS)}, given {split!r}")
    before = {"val": (), "train": ("val",), "demonstrations": ("val", "train")}[split]
    return {question for other in before for question in rows(other)["question"]}
