"""Weights by version: what a trainer offers to its samplers, and how these take what has changed.

Every version has a manifest, which holds the dtype, the shape and a digest of each tensor. A
sampler takes the tensors whose digests are not those of the ones that it has. Their bytes lie in
the trainer's memory, or in a safetensors file of a folder on shared storage.

The manifest comes from the trainer in both cases. Whatever somebody else puts into the folder is
read as far as the manifest says, and is used only if it is what the trainer wrote.
"""

import contextlib
import dataclasses
import json
import os
import re
import secrets
import shutil
import stat
import struct
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors
import safetensors.numpy

from adpo_jax.rollouts.wire import WireError, digest_of

# Versions that are kept for samplers that are still reading them.
KEPT = 2
# Bytes of a file that are read at a time.
_PART = 16 << 20
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,99}")
_FILE = re.compile(_NAME.pattern + r"\.safetensors")


class Unreadable(Exception):
    """Tensors that are not there, or not as the manifest says, and may be a little later."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """A tensor of a manifest.

    Attributes:
      digest: of its bytes.
      at: where they begin in the file.
    """

    dtype: np.dtype
    shape: tuple[int, ...]
    digest: str
    at: int = 0


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a version of the weights consists of.

    Attributes:
      entries: the tensors by their names.
      file: the name of the file that has them; "" where the trainer's memory has.
    """

    entries: dict[str, Entry]
    file: str = ""

    def packed(self) -> bytes:
        """The manifest as JSON."""
        tensors = {
            name: {"dtype": str(e.dtype), "shape": e.shape, "digest": e.digest, "at": e.at}
            for name, e in self.entries.items()
        }
        return json.dumps({"file": self.file, "tensors": tensors}).encode()

    @classmethod
    def read(cls, content: bytes, abstract: Any) -> "Manifest":
        """The manifest that `packed` wrote.

        Args:
          abstract: a tree of the shapes and dtypes that the tensors must have.

        Raises:
          WireError: for anything else, and for the weights of another model.
        """
        try:
            found = json.loads(content)
            file, tensors = found["file"], found["tensors"]
            entries = {
                name: (str(t["dtype"]), list(t["shape"]), t["digest"], t["at"])
                for name, t in tensors.items()
            }
            told = [(digest, at) for _, _, digest, at in entries.values()]
            good = all(type(d) is str and type(at) is int and 0 <= at < 1 << 62 for d, at in told)
            if not good or (file != "" and _FILE.fullmatch(file) is None):
                raise ValueError("digests, places or the name of the file are none")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise WireError(f"no manifest of weights: {str(error)[:200]}") from None
        wanted = by_name(abstract)
        differing = sorted(wanted.keys() ^ entries.keys())
        if differing:
            raise WireError(f"weights of another model: {differing[0]:.200} is not in both")
        for name, leaf in wanted.items():
            dtype, shape, _, _ = entries[name]
            if dtype != str(leaf.dtype) or shape != list(leaf.shape):
                given = f"{dtype}{shape}"[:100]
                raise WireError(
                    f"weights of another model: {name} is {given}, wanted "
                    f"{leaf.dtype}{list(leaf.shape)}"
                )
        return cls(
            {
                name: Entry(np.dtype(leaf.dtype), tuple(leaf.shape), *entries[name][2:])
                for name, leaf in wanted.items()
            },
            file,
        )

    def digests(self) -> dict[str, str]:
        return {name: entry.digest for name, entry in self.entries.items()}

    def changed(self, held: Mapping[str, str]) -> list[str]:
        """The tensors that a sampler lacks, in the order of their places.

        Args:
          held: the digests of those that it has.
        """
        lacking = [n for n, entry in self.entries.items() if held.get(n) != entry.digest]
        return sorted(lacking, key=lambda name: self.entries[name].at)


def by_name(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by their paths."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}


def as_tree(named: Mapping[str, Any], like: Any) -> Any:
    """The tree that `by_name` took the leaves of."""
    return jax.tree.unflatten(jax.tree.structure(like), [named[name] for name in by_name(like)])


# --- the trainer's side


@dataclasses.dataclass(frozen=True, eq=False)
class _Version:
    manifest: bytes
    digests: dict[str, str]
    tensors: dict[str, np.ndarray]  # none where a file has them


class Versions:
    """The newest versions of a trainer's weights.

    Two versions share the memory of the tensors that are equal. Methods are called from any thread.

    Args:
      folder: where the tensors are written; None to keep them in memory.
    """

    def __init__(self, folder: "WeightsFolder | None" = None):
        self._folder = folder
        self._lock = threading.Lock()
        self._kept: dict[int, _Version] = {}

    def add(self, version: int, params: Any) -> None:
        """Takes the weights of a version; those of the oldest go.

        Args:
          params: a tree of numpy arrays, which must not change after this.

        Raises:
          OSError: where they cannot be written.
        """
        arrays = {name: np.asarray(x, order="C") for name, x in by_name(params).items()}
        with self._lock:
            before = self._kept[max(self._kept)] if self._kept else _Version(b"", {}, {})

        def held(name: str) -> tuple[str, np.ndarray | None]:
            digest = digest_of(_bytes(arrays[name]))
            if self._folder is not None:
                return digest, None
            if before.digests.get(name) == digest:
                return digest, before.tensors[name]
            return digest, arrays[name] if arrays[name].flags.owndata else arrays[name].copy()

        found = _on_all(held, arrays)
        file, places = "", dict.fromkeys(arrays, 0)
        if self._folder is not None:
            file, places = self._folder.write(version, arrays)
        entries = {
            name: Entry(array.dtype, array.shape, found[name][0], places[name])
            for name, array in arrays.items()
        }
        manifest = Manifest(entries, file)
        tensors = {name: array for name, (_, array) in found.items() if array is not None}
        with self._lock:
            self._kept[version] = _Version(manifest.packed(), manifest.digests(), tensors)
            for old in sorted(self._kept)[:-KEPT]:
                del self._kept[old]

    def manifest(self, version: int) -> bytes | None:
        """The manifest of a version; None where it is not there any more."""
        with self._lock:
            return self._kept[version].manifest if version in self._kept else None

    def tensors(self, version: int, names: Sequence[str]) -> list[memoryview] | None:
        """The bytes of tensors that are in memory; None where any of them is not."""
        with self._lock:
            there = self._kept[version].tensors if version in self._kept else {}
        if not all(name in there for name in names):
            return None
        return [memoryview(_bytes(there[name])) for name in names]


def name_of_run(folder: Path) -> str:
    """A name for the files of a run in a folder that it may share with others.

    It stays the same as long as the run stays where it is.

    Args:
      folder: one inside the run's folder, in which a number that is drawn once is kept.
    """
    kept = folder / "weights_name"
    try:
        drawn = kept.read_text()[:100]
    except (FileNotFoundError, UnicodeDecodeError):
        folder.mkdir(parents=True, exist_ok=True)
        drawn = secrets.token_hex(16)
        unfinished = kept.with_name(f"{kept.name}.tmp")
        unfinished.write_text(drawn)
        os.replace(unfinished, kept)
    place = folder.resolve()
    digest = digest_of(f"{drawn} {place}".encode())[:8]  # a copy of the folder is another run
    words = re.sub(r"[^A-Za-z0-9_-]+", "_", place.parent.name)[:60]
    return f"{words or 'run'}-{digest}"


class WeightsFolder:
    """A folder on shared storage that a trainer writes the versions of its weights into.

    Each version is a file, which is there whole or not at all. Files of others are not touched.

    Args:
      folder: one that is there.
      name_of: returns the run's name, which begins the names of its files. It is called before the
        first file is written.

    Raises:
      ValueError: where no file can be written.
    """

    def __init__(self, folder: str, name_of: Callable[[], str]):
        self.path = Path(folder).expanduser().absolute()
        self._name_of, self._name = name_of, ""
        self._written: list[Path] = []
        try:
            with tempfile.NamedTemporaryFile(dir=self.path, prefix=".adpo_jax-"):
                pass
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise ValueError(
                f"--weights: no file can be written into {str(self.path)!r:.200} ({reason}); name "
                "a folder that is there, on storage that the samplers read too"
            ) from None

    def write(self, version: int, arrays: dict[str, np.ndarray]) -> tuple[str, dict[str, int]]:
        """Writes a version; those before the newest `KEPT` go.

        Returns:
          The name of the file, and where the bytes of each tensor begin in it.

        Raises:
          OSError: where it cannot be written.
        """
        if not self._name:
            self._name = self._name_of()
            self._clean()
        final = self.path / f"{self._name}-{version:06d}.safetensors"
        # It is written in a folder of its own, since the library draws a name that says nothing
        # for a file that it has not finished.
        unfinished = self.path / f".{final.name}.{secrets.token_hex(8)}"
        written = unfinished / final.name
        try:
            unfinished.mkdir()
            stored = {name: x.view(_stored(x.dtype)) for name, x in arrays.items()}
            safetensors.numpy.save_file(stored, written)
            written.chmod(unfinished.stat().st_mode & 0o666)  # the library's is its owner's alone
            with written.open("rb") as file:
                (size,) = struct.unpack("<Q", file.read(8))
                header = json.loads(file.read(size))
                os.fsync(file.fileno())
            os.replace(written, final)
            _sync(self.path)
        except (OSError, safetensors.SafetensorError) as error:
            raise OSError(
                f"--weights: {final} cannot be written ({error}); mend that, and the same command "
                "goes on from the last checkpoint"
            ) from error
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
        self._written.append(final)
        for old in self._written[:-KEPT]:
            with contextlib.suppress(OSError):
                old.unlink()
        del self._written[:-KEPT]
        return final.name, {name: 8 + size + header[name]["data_offsets"][0] for name in arrays}

    def _clean(self) -> None:
        """Removes what an earlier start of this run left."""
        name = re.escape(self._name)
        whole = re.compile(rf"{name}-\d+\.safetensors")
        unfinished = re.compile(rf"\.{whole.pattern}\.[0-9a-f]+")
        for path in list(self.path.iterdir()):
            if whole.fullmatch(path.name):
                with contextlib.suppress(OSError):
                    path.unlink()
            if unfinished.fullmatch(path.name):
                shutil.rmtree(path, ignore_errors=True)


def _sync(folder: Path) -> None:
    """Has the disk keep the names in a folder, where its file system can be told to."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


# --- the sampler's side


def parts_of_file(folder: Path, manifest: Manifest, names: Iterable[str]) -> Iterator[bytes]:
    """The bytes of tensors in a manifest's file, one tensor after the other.

    Nothing but a regular file is read: no link, no pipe and no device.

    Raises:
      Unreadable: where they are not there.
    """
    path = folder / manifest.file
    try:
        # Without O_NONBLOCK a pipe would be waited for.
        flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(path, flags)
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise Unreadable(f"{path} is no regular file")
            for name in names:
                entry = manifest.entries[name]
                at, left = entry.at, _size(entry)
                while left:
                    part = os.pread(descriptor, min(left, _PART), at)
                    if not part:
                        raise Unreadable(f"{path} ends before {name} does")
                    at, left = at + len(part), left - len(part)
                    yield part
        finally:
            os.close(descriptor)
    except OSError as error:
        raise Unreadable(f"{path} cannot be read: {error.strerror}") from None


def taken(parts: Iterable[bytes], manifest: Manifest, names: Sequence[str]) -> dict[str, Any]:
    """Tensors from their bytes, one after the other.

    Returns:
      numpy arrays by their names.

    Raises:
      Unreadable: where they are fewer, more or others than the manifest says.
    """
    entries = {name: manifest.entries[name] for name in names}
    arrays = {name: np.empty(entry.shape, entry.dtype) for name, entry in entries.items()}
    left = [_bytes(array) for array in arrays.values()]
    left.reverse()
    for part in parts:
        found = np.frombuffer(part, np.uint8)
        while len(found):
            while left and not len(left[-1]):
                left.pop()
            if not left:
                raise Unreadable("more bytes came than the tensors have")
            count = min(len(found), len(left[-1]))
            left[-1][:count] = found[:count]
            left[-1], found = left[-1][count:], found[count:]
    if any(len(rest) for rest in left):
        raise Unreadable("fewer bytes came than the tensors have")
    digests = _on_all(lambda name: digest_of(_bytes(arrays[name])), arrays)
    for name, entry in entries.items():
        if digests[name] != entry.digest:
            raise Unreadable(f"the bytes of {name} are not those that the trainer wrote")
    return arrays


# --- arrays


def _on_all(function: Callable[[str], Any], names: Iterable[str]) -> dict[str, Any]:
    """The results by name; copies and digests of large arrays keep several cores busy."""
    names = list(names)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        return dict(zip(names, threads.map(function, names)))


def _bytes(array: np.ndarray) -> np.ndarray:
    """[size] uint8, the memory of an array."""
    return array.reshape(-1).view(np.uint8)


def _size(entry: Entry) -> int:
    return entry.dtype.itemsize * int(np.prod(entry.shape, dtype=np.int64))


def _stored(dtype: np.dtype) -> np.dtype:
    """The dtype of a file: numpy has no bfloat16 of its own, so its bits are stored."""
    return dtype if dtype.isbuiltin == 1 else np.dtype(f"uint{8 * dtype.itemsize}")
