"""The few sizes of streams that programs are compiled for.

A size is rounded up to one of a few values, and has some room for batches that are larger where
sizes are known already. `KnownSizes` are those that a run has used, for `packing` to use again.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

# Tokens of an attention tile. On an H200 tiles of 128 are no faster. Forward and the gradients of
# queries and keys reach 7, 13 and 19% of a v5e's peak with 64, 24, 58 and 54% with 256, by the
# bundles of libtpu 0.0.42.1 at commit fa919e7.
TILE, TPU_TILE = 64, 256

# A size that is known is used again where it has at most so many times the places of the best cut,
# and so many times the listed key tiles. The first size of a run is as small as it can be, further
# ones have a share of room for what is to come.
REUSED_PLACES, REUSED_TILES = 1.15, 3.0
GROWN_BEYOND, GROWN_WITHIN, GROWN_PROMPT, GROWN_LISTED = 1.08, 1.04, 1.25, 1.5


def tile_of(platform: str, full_length: int) -> int:
    """Tokens of an attention tile on a platform, for completions of at most so many tokens.

    Short completions have several of them in a wide tile, which is then computed for nothing.

    Args:
      full_length: 0 if it is not known.
    """
    if platform != "tpu":
        return TILE
    return TPU_TILE if full_length >= 2 * TPU_TILE else TPU_TILE // 2


class Size(NamedTuple):
    """The sizes of streams that a program is compiled for.

    Attributes:
      room: micro-batches that the arrays have room for.
      prompt: places of prompts in a stream; completion: those of completions.
      listed: key tiles that are listed for a tile of queries.
    """

    room: int
    prompt: int
    completion: int
    listed: int

    @property
    def places(self) -> int:
        return self.prompt + self.completion

    def holds(self, needed: "Size") -> bool:
        return all(mine >= theirs for mine, theirs in zip(self, needed))

    def fits(self, tile: int) -> bool:
        """Whether it is in whole tiles; a run may go on on a platform with others."""
        return self.prompt % tile == self.completion % tile == 0

    def in_tiles(self, tile: int) -> "Size":
        """The smallest one that holds it in whole tiles."""
        return self._replace(prompt=_up(self.prompt, tile), completion=_up(self.completion, tile))

    def rounded(self, tile: int) -> "Size":
        """The next larger one of the few sizes that are used."""
        completion = rounded(self.completion, tile, 16)
        # The step grows with the whole stream: short prompts need few sizes, long ones close ones.
        prompt = _up(self.prompt, _step(self.prompt + completion, tile, 32))
        return Size(self.room, prompt, completion, rounded(self.listed, 1, 2))

    def grown(self, known: Sequence["Size"], tile: int) -> "Size":
        """With room for batches that are somewhat larger, beside the sizes that are known.

        Where a known size would hold it, and is too large, it stays there for the larger batches.
        """
        growth = GROWN_WITHIN if any(size.holds(self) for size in known) else GROWN_BEYOND

        def at_least(name: str, growth: float, most: float) -> int:
            """As large as in a known size, so that sizes differ in the completions alone."""
            needed, sizes = getattr(self, name), [getattr(size, name) for size in known]
            held = [size for size in sizes if needed <= size <= most * needed]
            return max(held, default=int(growth * needed))

        return Size(
            room=self.room,
            prompt=_up(at_least("prompt", GROWN_PROMPT, 2.0), tile),
            completion=_up(int(self.completion * growth), tile),
            listed=rounded(at_least("listed", GROWN_LISTED, REUSED_TILES), 1, 2),
        )


class KnownSizes:
    """The sizes that a run's programs have been compiled for, in the order of their first use.

    Which size is used changes the rounding of sums, so a run that goes on from a checkpoint must
    know those that it knew then: `saved` and `restore`.
    """

    def __init__(self):
        self._known: dict[str, list[Size]] = {}

    def of(self, program: str) -> tuple[Size, ...]:
        """The sizes of a program."""
        return tuple(self._known.get(program, ()))

    def note(self, program: str, size: Size) -> None:
        """Adds the size of a batch that the program runs, where it is a new one."""
        known = self._known.setdefault(program, [])
        if size not in known:
            known.append(size)

    @property
    def count(self) -> int:
        """The number of programs that have been compiled, over the run's whole life."""
        return sum(map(len, self._known.values()))

    @property
    def saved(self) -> dict[str, list[list[int]]]:
        """The sizes as JSON has them."""
        return {program: [list(size) for size in sizes] for program, sizes in self._known.items()}

    def restore(self, saved: Mapping[str, Iterable[Sequence[int]]]) -> None:
        """Takes over what `saved` gave, in the place of what is known."""
        self._known = {program: [Size(*size) for size in sizes] for program, sizes in saved.items()}


def rounded(size: int, least: int, per_octave: int) -> int:
    """`size` rounded up to one of `per_octave` (a power of 2) values an octave.

    These values are multiples of `least`.
    """
    return _up(size, _step(size, least, per_octave))


def _step(size: int, least: int, per_octave: int) -> int:
    step = 2 ** max((size - 1).bit_length() - per_octave.bit_length(), 0)
    return _up(max(step, least), least)


def _up(size: int, step: int) -> int:
    """`size` rounded up to a multiple of `step`, at least one."""
    return max(-(-size // step), 1) * step
