"""Files of folders that others made: looked at before they are read, and read within limits."""

import json
import stat
from pathlib import Path
from typing import Any

LARGEST_JSON = 1 << 26  # bytes; an index of 100,000 tensors has a tenth of it
DEEPEST_JSON = 64  # lists and objects within each other; those of models have 5


def size_of(path: Path) -> int:
    """Bytes of a regular file.

    Raises:
      FileNotFoundError: when it is not there.
      ValueError: for anything that could not be read to its end, such as a pipe, a device or links
        that lead in a circle.
    """
    try:
        status = path.stat()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{path} is no regular file")
    return status.st_size


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; raises ValueError, naming the file, if it holds none."""
    try:
        size = size_of(path)
        if size > LARGEST_JSON:
            raise ValueError(f"{path} has {size:,} bytes; at most {LARGEST_JSON:,} are read")
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ValueError(f"{path.parent} has no {path.name}; is it a Hugging Face model?") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no valid JSON: {error}") from None
    try:
        content = json.loads(text)
    except RecursionError:
        raise ValueError(too_deep(path)) from None
    except ValueError as error:
        raise ValueError(f"{path} is no valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object")
    if is_deep(content):
        raise ValueError(too_deep(path))
    return content


def too_deep(path: Path) -> str:
    return f"{path} has more than {DEEPEST_JSON} lists and objects within each other"


def is_deep(content: Any) -> bool:
    """Whether lists and dicts lie deeper within each other than `DEEPEST_JSON`."""
    level = [content]
    for _ in range(DEEPEST_JSON + 1):
        nested = (x for x in level if isinstance(x, dict | list))
        level = [y for x in nested for y in (x.values() if isinstance(x, dict) else x)]
    return bool(level)


def is_plain_name(name: Any) -> bool:
    """Whether it names a file inside a folder: no path, no "..", nothing that a disk refuses."""
    return (
        isinstance(name, str)
        and 0 < len(name.encode(errors="replace")) <= 255
        and name.isprintable()
        and Path(name).name == name
        and name != ".."
    )
