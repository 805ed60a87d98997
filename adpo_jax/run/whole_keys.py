"""Whole keys in refusals: below `run` nothing knows the config, and a user knows nothing else."""

import contextlib
import re
from collections.abc import Iterable, Iterator, Mapping


@contextlib.contextmanager
def whole_keys(*names: Mapping[str, str]) -> Iterator[None]:
    """Gives each argument that a refusal inside speaks of the whole name of its key.

    Args:
      names: from what the refusal calls an argument to the key, see `section`.

    Raises:
      ValueError: a refusal with the keys in place.
    """
    keys = {name: key for mapping in names for name, key in mapping.items()}
    try:
        yield
    except ValueError as error:
        longest_first = sorted(keys, key=len, reverse=True)
        # A name that is part of another one, or of a key already, stays as it is.
        pattern = rf"(?<![\w.])({'|'.join(map(re.escape, longest_first))})(?!\w)"
        text = re.sub(pattern, lambda found: keys[found[1]], str(error))
        if type(error) is not ValueError:  # others say more than their text
            raise
        raise ValueError(text) from error


def section(prefix: str, names: Iterable[str]) -> dict[str, str]:
    """The keys of arguments that are called as the last part of their key."""
    return {name: f"{prefix}.{name}" for name in names}
