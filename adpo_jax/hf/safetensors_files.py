"""The tensors of safetensors files, by name, as views of the mapped files.

The files are mapped, so that a slice of a tensor is all that is read from the disk. bf16 works too,
which NumPy does not know by itself.
"""

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np

DISK_DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}


def read_header(path: Path) -> dict[str, dict]:
    """Name -> {"dtype", "shape", "data_offsets" (within the file)} of a safetensors file.

    Source: https://huggingface.co/docs/safetensors, "Format".

    Raises:
      ValueError: naming a file that is no safetensors file, or cut short.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise ValueError(f"{path} is no safetensors file, or is cut short ({size} bytes)")
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            for entry in header.values():
                start, end = entry["data_offsets"]
                if not 0 <= start <= end:
                    raise ValueError(f"data_offsets {start} to {end}")
                entry["data_offsets"] = (start + 8 + length, end + 8 + length)
                entry["shape"] = tuple(entry["shape"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} has no valid safetensors header: {error}") from error
    needed = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if needed > size:
        raise ValueError(f"{path} is cut short: {size} bytes of {needed}; download it again")
    return header


class Checkpoint:
    """The tensors of one or several safetensors files, by name; the files are mapped, not read."""

    def __init__(self, files: list[Path]):
        self._entries: dict[str, tuple[Path, dict]] = {}
        self._maps = {}
        for path in files:
            for name, entry in read_header(path).items():
                if name in self._entries:
                    raise ValueError(f"{name} is both in {self._entries[name][0]} and in {path}")
                self._entries[name] = (path, entry)
            self._maps[path] = np.memmap(path, np.uint8, mode="r")

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

    def array(self, name: str) -> np.ndarray:
        """A read-only view of the file.

        Raises:
          ValueError: for a dtype that is no float of 16 or 32 bits, or a broken entry.
        """
        path, entry = self._entries[name]
        if entry["dtype"] not in DISK_DTYPES:
            raise ValueError(
                f"{name} in {path} has dtype {entry['dtype']}; supported: "
                f"{', '.join(DISK_DTYPES)}. Dequantise the checkpoint first."
            )
        dtype = DISK_DTYPES[entry["dtype"]]
        start, end = entry["data_offsets"]
        if end - start != math.prod(entry["shape"]) * dtype.itemsize:
            raise ValueError(f"{name} in {path}: the header's shape and extent disagree")
        return self._maps[path][start:end].view(dtype).reshape(entry["shape"])
