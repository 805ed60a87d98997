"""Tensors in MXFP4: 4 bits a number and one scale for 32 of them, read as bfloat16.

On disk such a matrix is two tensors of bytes: `<name>_blocks` [.., rows, n, 16], two numbers a byte
with the first in its lower half, and `<name>_scales` [.., rows, n]. A number is one of `VALUES`
times 2 ** (scale - 127). Every such number is one of bfloat16, so that nothing is rounded. The
matrix that they stand for is the transposed one, [.., 32 n, rows].

Sources: Open Compute Project, Microscaling Formats (MX) v1.0, sections 5.2 and 5.3;
https://huggingface.co/openai/gpt-oss-20b.
"""

import dataclasses
from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np

BLOCK = 32  # numbers with one scale
BLOCK_BYTES = BLOCK // 2
BIAS = 127
MOST_AT_ONCE = 8  # experts that are read; 200 MB each in gpt-oss
# Sign, two bits of exponent and one of mantissa.
VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
# The two numbers of each byte.
PAIRS = np.stack([VALUES[np.arange(256) & 15], VALUES[np.arange(256) >> 4]], axis=-1)
SUFFIXES = ("_blocks", "_scales")


@dataclasses.dataclass(frozen=True)
class Mxfp4:
    """A tensor [E, columns, rows] in MXFP4, of which parts are read when they are asked for.

    It is indexed by slices like an array, and the result is a part of it; `np.asarray` reads that.

    Attributes:
      blocks: uint8 [E, rows, n, 16].
      scales: uint8 [E, rows, n].
      start, stop: the columns, of 32 n.
    """

    blocks: np.ndarray
    scales: np.ndarray
    start: int
    stop: int

    dtype = np.dtype(ml_dtypes.bfloat16)

    @classmethod
    def of(cls, name: str, blocks: np.ndarray, scales: np.ndarray) -> "Mxfp4":
        """The tensor of two tensors of bytes.

        Raises:
          ValueError: naming it, where their shapes or dtypes do not fit.
        """
        check(name, blocks.shape, scales.shape)
        return cls(blocks, scales, 0, BLOCK * scales.shape[-1])

    @property
    def shape(self) -> tuple[int, ...]:
        E, rows, _ = self.scales.shape
        return (E, self.stop - self.start, rows)

    def reshape(self, shape: tuple[int, ...]) -> "Mxfp4":
        assert tuple(shape) == self.shape, f"{shape} is not {self.shape}"
        return self

    def __getitem__(self, index) -> "Mxfp4":
        index = index if isinstance(index, tuple) else (index,)
        if index[0] is Ellipsis:
            index = (*(slice(None),) * (4 - len(index)), *index[1:])
        experts, columns, rows = (*index, *(slice(None),) * (3 - len(index)))
        start, stop, step = columns.indices(self.stop - self.start)
        assert step == 1, "the columns of a part lie side by side"
        return dataclasses.replace(
            self,
            blocks=self.blocks[experts, rows],
            scales=self.scales[experts, rows],
            start=self.start + start,
            stop=self.start + max(start, stop),
        )

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        out = np.empty(self.shape, self.dtype)
        first, last = self.start // BLOCK, -(-self.stop // BLOCK)
        inside = slice(self.start - first * BLOCK, self.stop - first * BLOCK)

        def read(expert: int) -> None:
            numbers = np.take(PAIRS, self.blocks[expert, :, first:last], axis=0)
            exponents = self.scales[expert, :, first:last].astype(np.int32) - BIAS
            # A scale of 255 stands for NaN, and is refused as such.
            with np.errstate(over="ignore", invalid="ignore"):
                numbers *= np.ldexp(np.float32(1), exponents)[..., None, None]
                out[expert] = numbers.reshape(len(numbers), -1)[:, inside].astype(self.dtype).T

        # Few experts at a time, since the numbers are float32 in between.
        with ThreadPoolExecutor(MOST_AT_ONCE) as pool:
            list(pool.map(read, range(len(out))))
        return out if dtype is None else out.astype(dtype)


def check(name: str, blocks: tuple[int, ...], scales: tuple[int, ...]) -> None:
    """Refuses shapes that are no MXFP4.

    Raises:
      ValueError: naming the tensor.
    """
    if len(blocks) != 4 or blocks[-1] != BLOCK_BYTES or blocks[:-1] != scales:
        raise ValueError(
            f"{name} in MXFP4 needs blocks [E, rows, n, {BLOCK_BYTES}] and scales [E, rows, n]; "
            f"given {list(blocks)} and {list(scales)}"
        )
