"""Which files of a folder belong to a split.

Files lie side by side, or as the Hugging Face Hub lays them out: in a folder for each split, in
data/, or in one folder of a configuration. Left out: choosing among several configurations.
"""

import re
from pathlib import Path
from typing import NamedTuple

from adpo_jax.data.readers import SUFFIXES, suffix_of

# The words that say a split, as the Hub's package `datasets` takes them.
_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SPLITS = {word: split for split, words in _WORDS.items() for word in words}
# gsm8k_train, train2 and gsm8kTrain all have the word train; constrained has not.
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")

# So far below a folder its files may lie.
_LEVELS = 2
# What lies beside data and describes it.
_NO_DATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")


class Placed(NamedTuple):
    """A file and the splits that its name or its folder's says: none, one or several."""

    path: Path
    splits: frozenset[str]


def splits_of(name: str) -> frozenset[str]:
    """The splits that the words of a name say."""
    return frozenset(_SPLITS[w] for w in map(str.lower, _WORD.findall(name)) if w in _SPLITS)


def files_of(folder: Path, split: str | None) -> list[Path]:
    """The files of a split; all files where none says its split, or no split is asked for.

    Raises:
      ValueError: no file, none of the split, one of several splits, or several configurations.
    """
    placed = placed_files(folder)
    if split is None or not any(file.splits for file in placed):
        return [file.path for file in placed]
    # Test rows must not slip into training because the files lie in one folder.
    for path, splits in placed:
        if len(splits) > 1:
            raise ValueError(
                f"{folder}: the name {path.relative_to(folder)} says the splits "
                f"{', '.join(sorted(splits))}; name the file itself, or give it one of them"
            )
    wanted = _SPLITS.get(split.lower(), split)
    chosen = [path for path, splits in placed if wanted in splits]
    if not chosen:
        names = [str(path.relative_to(folder)) for path, _ in placed]
        shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        raise ValueError(
            f"{folder}: none of {shown} is named after the split {split!r}; name the file itself, "
            "or another split in data.train_split or data.val_split"
        )
    return chosen


def placed_files(folder: Path) -> list[Placed]:
    """All data files of a folder, in the order of their names.

    Raises:
      ValueError: there is none, several folders in it have some, or one cannot be read.
    """
    left_out: list[Path] = []
    try:
        found = _below(folder, folder.resolve(), _LEVELS, frozenset(), left_out)
    except OSError as error:
        where = error.filename or folder
        raise ValueError(f"{where}: cannot be read: {error.strerror or error}") from error
    if not found:
        linked = f"; {left_out[0]} is a link that leaves it, name its target" if left_out else ""
        raise ValueError(f"{folder}: the folder has no {', '.join(SUFFIXES)} file{linked}")
    return found


def path_of(source: str) -> Path:
    """A source as a path, with the home folder that it begins with.

    Raises:
      ValueError: for the home folder of nobody.
    """
    try:
        return Path(source).expanduser()
    except RuntimeError:
        home = Path(source).parts[0]
        raise ValueError(
            f"{source}: there is no home folder {home} here; write the whole path"
        ) from None


def unsplit_files(source: str) -> dict[Path, str]:
    """The files that a source stands for without a word of their split, and the source itself.

    That is a folder none of whose files says its split; any other source has none.
    """
    folder = path_of(source)
    if not folder.is_dir():
        return {}
    placed = placed_files(folder)
    if any(file.splits for file in placed):
        return {}
    return {file.path.resolve(): source for file in placed}


def _below(
    folder: Path, root: Path, levels: int, splits: frozenset[str], left_out: list[Path]
) -> list[Placed]:
    """The files in a folder or, where it has none, in the folders in it.

    Args:
      root: what links to folders must not leave.
      levels: how far down to look.
      splits: what the names of the folders above say.
      left_out: takes the links that leave `root`.
    """
    entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith((".", "_")))
    files = [e for e in entries if suffix_of(e) and not e.is_dir() and e.name not in _NO_DATA]
    if files or not levels:
        return [Placed(file, splits or splits_of(file.stem)) for file in files]
    inside: dict[Path, list[Placed]] = {}
    for entry in filter(Path.is_dir, entries):
        if entry.is_symlink() and not entry.resolve().is_relative_to(root):
            left_out.append(entry)
            continue
        of_entry = splits or splits_of(entry.name)
        if found := _below(entry, root, levels - 1, of_entry, left_out):
            inside[entry] = found
    others = [entry for entry in inside if splits or not splits_of(entry.name)]
    if others and len(inside) > 1:
        raise ValueError(
            f"{folder}: the folders {', '.join(entry.name for entry in inside)} in it all have "
            f"data, as several configurations do; name the one that is meant, as {others[0]}"
        )
    return [file for found in inside.values() for file in found]
