"""The tensors of safetensors files, by name, as views of the mapped files.

The files are mapped, so that a slice of a tensor is all that is read from the disk. bf16 works too,
which NumPy does not know by itself. Two tensors that are one in MXFP4 stand under its name.
"""

import itertools
import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import ml_dtypes
import numpy as np

from adpo_jax.hf import files, mxfp4
from adpo_jax.hf.mxfp4 import Mxfp4

DISK_DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}


# The format's own limit, which keeps a header from filling the memory.
LARGEST_HEADER = 100_000_000


# What a tensor of all experts of a layer holds of each.
_OF_ALL_EXPERTS = {
    ".mlp.experts.gate_up_proj": ("gate_proj", "up_proj"),
    ".mlp.experts.down_proj": ("down_proj",),
}


def read_header(path: Path) -> dict[str, dict]:
    """Name -> {"dtype", "shape", "data_offsets" (within the file)} of a safetensors file.

    Source: https://huggingface.co/docs/safetensors, "Format".

    Raises:
      ValueError: naming a file that is no safetensors file, or cut short.
    """
    try:
        size = files.size_of(path)
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:
                raise ValueError(f"{path} is no safetensors file, or is cut short ({size} bytes)")
            if length > LARGEST_HEADER:
                raise ValueError(
                    f"{path} has no valid safetensors header: it has {length:,} bytes, and at most "
                    f"{LARGEST_HEADER:,} are allowed"
                )
            text = file.read(length)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        header = {name: _checked(name, entry, 8 + length) for name, entry in header.items()}
        _refuse_overlaps(header)
    except RecursionError:
        raise ValueError(f"{path} has no valid safetensors header: it is too deep") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} has no valid safetensors header: {error}") from error
    needed = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if needed > size:
        raise ValueError(f"{path} is cut short: {size} bytes of {needed}; download it again")
    return header


def _checked(name: str, entry: dict, start_of_data: int) -> dict:
    start, end = entry["data_offsets"]
    if not (_is_size(start) and _is_size(end) and start <= end):
        raise ValueError(f"data_offsets {start!r:.40} to {end!r:.40} of {name!r:.200}")
    if not isinstance(entry["dtype"], str):
        raise ValueError(f"dtype {entry['dtype']!r:.40} of {name!r:.200}")
    shape = entry["shape"]
    if not isinstance(shape, list) or len(shape) > 32 or not all(map(_is_size, shape)):
        raise ValueError(f"shape {shape!r:.40} of {name!r:.200}")
    offsets = (start + start_of_data, end + start_of_data)
    return {"dtype": entry["dtype"], "shape": tuple(shape), "data_offsets": offsets}


def _is_size(value) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def _refuse_overlaps(header: dict[str, dict]) -> None:
    extents = sorted((*e["data_offsets"], name) for name, e in header.items())
    for (_, end, name), (start, _, other) in itertools.pairwise(extents):
        if start < end:
            raise ValueError(f"{name!r:.200} and {other!r:.200} overlap")


class Checkpoint:
    """The tensors of one or several safetensors files, by name; the files are mapped, not read."""

    def __init__(self, paths: list[Path]):
        self._entries: dict[str, tuple[Path, dict]] = {}
        self._maps = {}
        for path in paths:
            for name, entry in read_header(path).items():
                if name in self._entries:
                    raise ValueError(f"{name} is both in {self._entries[name][0]} and in {path}")
                self._entries[name] = (path, entry)
            self._maps[path] = np.memmap(path, np.uint8, mode="r")
        self._join_packed()

    def _join_packed(self) -> None:
        """Puts the tensors in MXFP4 in place of those that hold their bytes."""
        blocks, scales = mxfp4.SUFFIXES
        names = {name.removesuffix(blocks) for name in self._entries if name.endswith(blocks)}
        names = {
            name
            for name in names
            if name not in self._entries
            and all(self._is_bytes(name + suffix) for suffix in (blocks, scales))
        }
        for name in sorted(names):
            parts = [self._entries.pop(name + suffix) for suffix in (blocks, scales)]
            shapes = [entry["shape"] for _, entry in parts]
            mxfp4.check(name, *shapes)
            E, rows, n = shapes[1]
            entry = {"dtype": "MXFP4", "shape": (E, mxfp4.BLOCK * n, rows), "parts": parts}
            self._entries[name] = (parts[0][0], entry)

    def part_experts(self, num_experts: int) -> None:
        """Puts the three matrices of each expert in place of two tensors for all of a layer.

        `<layer>.mlp.experts.gate_up_proj` [E, 2 I, D] has for each expert its gate and behind it
        its up, `<layer>.mlp.experts.down_proj` is [E, D, I]. So the matrices of an expert are
        parts of them that lie in one piece, and are called as those of models that have them apart.
        """
        for whole in [name for name in self._entries if name.endswith(tuple(_OF_ALL_EXPERTS))]:
            path, entry = self._entries[whole]
            layer, name = whole.rsplit(".", 1)
            kinds = _OF_ALL_EXPERTS[f".mlp.experts.{name}"]
            E, rows, columns = entry["shape"] if len(entry["shape"]) == 3 else (0, 0, 0)
            if num_experts != E or "parts" in entry or rows % len(kinds):
                continue  # whatever it is, it will be called unexpected
            del self._entries[whole]
            start, end = entry["data_offsets"]
            extent = (end - start) // (E * len(kinds))
            for number in range(E * len(kinds)):
                expert, kind = divmod(number, len(kinds))
                first = start + number * extent
                self._entries[f"{layer}.{expert}.{kinds[kind]}.weight"] = (
                    path,
                    {
                        "dtype": entry["dtype"],
                        "shape": (rows // len(kinds), columns),
                        "data_offsets": (first, first + extent),
                    },
                )

    def _is_bytes(self, name: str) -> bool:
        return name in self._entries and self._entries[name][1]["dtype"] == "U8"

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def rename(self, prefixes: dict[str, str], drop: re.Pattern | None = None) -> None:
        """Replaces prefixes of names, and forgets the tensors that `drop` matches."""

        def renamed(name):
            for old, new in prefixes.items():
                if name.startswith(old):
                    return new + name.removeprefix(old)
            return name

        self._entries = {
            renamed(name): entry
            for name, entry in self._entries.items()
            if drop is None or not drop.match(name)
        }

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entries[name][1]["shape"]

    def forget(self, drop: Callable[[str], bool]) -> None:
        """Forgets the tensors of some names."""
        self._entries = {name: e for name, e in self._entries.items() if not drop(name)}

    def array(self, name: str) -> np.ndarray | Mxfp4:
        """A read-only view of the file, or of two tensors in it.

        Raises:
          ValueError: for a dtype that is no float of 16 or 32 bits, or a broken entry.
        """
        path, entry = self._entries[name]
        if "parts" in entry:
            return Mxfp4.of(name, *(self._view(name, *part, np.uint8) for part in entry["parts"]))
        if entry["dtype"] not in DISK_DTYPES:
            raise ValueError(
                f"{name} in {path} has dtype {entry['dtype']}; supported: "
                f"{', '.join(DISK_DTYPES)}. Dequantise the checkpoint first."
            )
        return self._view(name, path, entry, DISK_DTYPES[entry["dtype"]])

    def _view(self, name: str, path: Path, entry: dict, dtype) -> np.ndarray:
        dtype = np.dtype(dtype)
        start, end = entry["data_offsets"]
        if end - start != math.prod(entry["shape"]) * dtype.itemsize:
            raise ValueError(f"{name} in {path}: the header's shape and extent disagree")
        return self._maps[path][start:end].view(dtype).reshape(entry["shape"])
