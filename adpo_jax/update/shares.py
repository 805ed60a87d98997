"""Which devices have which tiles of a packed stream that they share (the mesh axis `sequence`).

Letters: n tiles of a stream, W tokens of a tile, C places of completions, S shares.
"""

import collections
from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np


class Order(NamedTuple):
    """Which tile lies where in a stream whose tiles have been dealt out to shares.

    Attributes:
      all: [n] int, the number that each tile has where prompts lie before completions.
      completions: [C / W] int, likewise of the tiles of completions among themselves.
      loads: [S] int, the key tiles that each share sees.
    """

    all: np.ndarray
    completions: np.ndarray
    loads: np.ndarray


def shared_out(key_tiles: Sequence[Collection[int]], prompt_tiles: int, shares: int) -> Order:
    """Deals tiles out from the dearest to the cheapest, each to the lightest share that has room.

    The tiles of one completion, which see each other, go to all shares alike: in a ring every
    device then has something to do in each turn.

    Args:
      key_tiles: the key tiles that each of the n tiles sees, those of prompts first.
    """
    costs, loads = np.array(list(map(len, key_tiles))), np.zeros(shares, int)
    held = collections.defaultdict(lambda: np.zeros(shares, int))

    def owner(tile: int) -> int:
        """The first tile of the prompt or completion that a tile begins with."""
        first = 0 if tile < prompt_tiles else prompt_tiles
        return min((t for t in key_tiles[tile] if t >= first), default=-1)

    def deal(first: int, end: int) -> np.ndarray:
        """[S, tiles of a share], ascending in each."""
        dealt: list[list[int]] = [[] for _ in range(shares)]
        room = (end - first) // shares
        for tile in first + np.argsort(-costs[first:end], kind="stable"):
            open_ones = [s for s in range(shares) if len(dealt[s]) < room]
            of_owner = held[owner(tile)]
            lightest = min(open_ones, key=lambda s: (of_owner[s], loads[s]))
            dealt[lightest].append(tile)
            loads[lightest] += costs[tile]
            of_owner[lightest] += 1
        return np.sort(np.array(dealt, int).reshape(shares, room), axis=1)

    completions = deal(prompt_tiles, len(costs))
    prompts = deal(0, prompt_tiles)
    every = np.concatenate([prompts, completions], axis=1).reshape(-1)
    return Order(every, completions.reshape(-1) - prompt_tiles, loads)
