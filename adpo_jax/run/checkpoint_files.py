"""The files of a checkpoint beside its arrays, and whether an unreadable checkpoint is damaged.

A checkpoint is a folder `<step>`, which lies complete under that name or not at all. Its
description names every array with shape, dtype and digest, and has a checksum of its own.
"""

import errno
import json
import os
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from adpo_jax.run.digests import digests

# These lie beside the folder of checkpoints: the damaged ones, and the note of the first one.
DAMAGED = "damaged_checkpoints"
FIRST = "first_checkpoint.json"


class CheckpointError(ValueError):
    """No checkpoint can be restored."""


class DamagedError(Exception):
    """A checkpoint that is not what was saved."""


def complete_steps(folder: Path) -> list[int]:
    """The steps whose checkpoints lie complete in a folder, ascending; below 0 in a cold start."""
    if not folder.is_dir():
        return []
    names = [path.name for path in folder.iterdir()]
    return sorted(int(name) for name in names if name.removeprefix("-").isdigit())


def check(folder: Path, like: Callable[[int], Any]) -> None:
    """Checks that the newest checkpoint in a folder, if any, has the wanted arrays; reads no array.

    Args:
      like: as for `Checkpoints.restore_latest`.

    Raises:
      CheckpointError: when its arrays are not those of `like`.
    """
    for step in reversed(complete_steps(folder)):
        path = Path(folder) / str(step)
        try:
            arrays = read_description(path)["arrays"]
        except (OSError, ValueError, KeyError, TypeError):
            continue  # it is damaged; a restore will say so and take the one before
        check_arrays(path, arrays, like(step))
        return


def read_description(folder: Path) -> dict:
    """The description of a checkpoint, as `description` gave it, with what was saved beside it.

    Raises:
      OSError, ValueError, KeyError, TypeError: when it is missing or not what was written.
    """
    return unsealed(json.loads(_description_file(folder).read_text(encoding="utf-8")))


def replace_description(folder: Path, content: dict) -> None:
    """Gives a checkpoint another description; a kill leaves the old one or the new one."""
    path = _description_file(folder)
    new = path.with_name(f"{path.name}.new")
    new.write_text(json.dumps(sealed(content)), encoding="utf-8")
    os.replace(new, path)


def _description_file(folder: Path) -> Path:
    return Path(folder) / "description" / "metadata"


def description(state) -> dict:
    """Shape, dtype and digest of every array of a state, by its name."""
    return {"arrays": _shapes(state), "digests": digests(state)}


def _shapes(tree) -> dict[str, list]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path): [list(leaf.shape), str(leaf.dtype)] for path, leaf in leaves
    }


def check_arrays(folder: Path, there: dict, like) -> None:
    """Checks that the arrays in a checkpoint's description are those of a state.

    Raises:
      CheckpointError: naming the differences.
    """
    wanted = _shapes(like)
    if there != wanted:
        raise CheckpointError(_mismatch(folder, there, wanted))


def check_digests(state, there: dict[str, str]) -> None:
    """Checks that arrays are, bit for bit, those that a checkpoint's description has digests of.

    Raises:
      DamagedError: naming the arrays that are not.
    """
    found = digests(state)
    changed = [name for name in found if found[name] != there[name]]
    if changed:
        raise DamagedError(f"bits have changed in {', '.join(changed[:4])}")


def _mismatch(folder: Path, there: dict, wanted: dict) -> str:
    differing = [
        f"{name}: {there.get(name, 'absent')} there, {wanted.get(name, 'absent')} wanted"
        for name in sorted(there.keys() | wanted.keys())
        if there.get(name) != wanted.get(name)
    ]
    return (
        f"{folder} holds the state of another model, optimizer or anchor: "
        f"{'; '.join(differing[:4])} ({len(differing)} arrays differ). Use the config it was "
        "written with, or another folder"
    )


def sealed(content: dict) -> dict:
    """A dict to be written as JSON, with a checksum added."""
    text = json.dumps(content, sort_keys=True)
    return {"content": text, "crc32": zlib.crc32(text.encode())}


def unsealed(written: dict) -> dict:
    """The dict that `sealed` was given.

    Raises:
      ValueError: for a wrong checksum.
    """
    text = written["content"]
    if zlib.crc32(text.encode()) != written["crc32"]:
        raise ValueError("its checksum is wrong")
    return json.loads(text)


def read_on_all(read: Callable[[], Any]) -> Any:
    """The result of `read` on this process, if all processes can read.

    Raises:
      DamagedError: when a file is missing, or is not as it was written.
      OSError, MemoryError or another: when a file cannot be read now, and may be whole.
    """
    result, failure = None, None
    try:
        result = read()
    except Exception as error:
        failure = error
    readable = failure is None or is_damage(failure)
    if not on_all_processes(readable):
        if readable or type(failure) in (ValueError, Exception):  # of tensorstore and orbax
            reason = "another process cannot" if readable else first_line(_causes(failure)[-1])
            raise OSError(f"the checkpoint cannot be read: {reason}") from failure
        raise failure
    if not on_all_processes(failure is None):
        raise DamagedError(first_line(failure and _causes(failure)[-1])) from failure
    return result


def _causes(error: BaseException) -> list[BaseException]:
    """An error and its causes, the first cause last."""
    found = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return found


def is_damage(error: Exception) -> bool:
    """Whether an error of reading says that a file is missing or holds something else."""
    # orbax wraps some errors in a bare Exception.
    causes = [cause for cause in _causes(error) if type(cause) is not Exception]
    return bool(causes) and all(map(_says_damage, causes))


def _says_damage(error: BaseException) -> bool:
    """Whether one error alone says so.

    tensorstore raises ValueError for everything, with the system's error number in its text.
    """
    if isinstance(error, OSError):
        return isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError)
    # orbax looks up what it has read, and asserts what it expects of it.
    said = ValueError | LookupError | TypeError | AttributeError | EOFError | AssertionError
    if not isinstance(error, said):
        return False  # MemoryError, and RuntimeError where no thread can be started
    numbers = re.findall(r"OS error (\d+)", str(error))
    missing = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR)
    return all(int(number) in missing for number in numbers) and not re.search(
        r"\b(RESOURCE_EXHAUSTED|PERMISSION_DENIED|UNAVAILABLE|DEADLINE_EXCEEDED)\b", str(error)
    )


def first_line(error: BaseException | None) -> str:
    """The text of an error in one line, or its class where it has no text."""
    text = "" if error is None else str(error).strip()
    # tensorstore names the same file three times before it says so.
    if "No space" in text and not isinstance(error, OSError):
        return "No space left on device"
    return text.splitlines()[0][:300] if text else type(error).__name__


def on_all_processes(ok: bool) -> bool:
    """Whether `ok` is true on every process; all processes must call this."""
    if jax.process_count() == 1:
        return ok
    return bool(np.all(multihost_utils.process_allgather(np.array(ok))))
