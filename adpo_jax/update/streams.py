"""The stream of a micro-batch: which completions it takes, and where they lie.

`cut` decides which completions run together, from their lengths. A `StreamPlan` gives their
segments places, lists the key tiles that each tile of queries sees, and writes the arrays of a
`Micro`, of which attention reads a `Stream` (`model/tile_attention.py`).

Letters: P prompts, G completions of a prompt, B streams side by side, M micro-batches, N tokens of
a stream, C of them of completions, n tiles, J listed key tiles, L layers, k experts of a token.
"""

import bisect
import functools
import heapq
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from adpo_jax.records import Sequences


class Micro(NamedTuple):
    """The streams of the micro-batches; leaves [B, M, ...] int32.

    In every array 0 stands for nothing, so that the memory of empty micro-batches is never touched.
    """

    tokens: np.ndarray  # [B, M, N]
    positions: np.ndarray  # [B, M, N], in the sequence
    segments: np.ndarray  # [B, M, N], the prompt or completion of each token, 0 for padding
    prompts: np.ndarray  # [B, M, N], the segment of its group's prompt
    key_tiles: np.ndarray  # [B, M, n, J], 1 + the tiles that a tile of queries sees, 0 for none
    targets: np.ndarray  # [B, M, C], the token that each place of the completions predicts


class Budget(NamedTuple):
    """What a micro-batch has room for.

    Attributes:
      tokens: those of its completions, by their costs.
      places: those of its completions and of their prompts, each once.
    """

    tokens: int
    places: float = math.inf


class _Piece(NamedTuple):
    """Completions of one prompt that go into the same micro-batch."""

    prompt: int
    completions: tuple[int, ...]
    num_tokens: int
    num_prompt: int  # places of the prompt


def cut(
    costs_PG, num_prompt_P: Sequence[int], rows, budget: Budget, whole_groups: bool
) -> list[list[_Piece]]:
    """The prompts `rows`, cut into micro-batches within the budget.

    Completions alone decide, unless that takes more places than there are. What is larger than the
    budget by itself has a micro-batch to itself.

    Args:
      costs_PG: [P, G] int, what each completion takes of `budget.tokens`.
      num_prompt_P: places of each prompt.
    """
    for within in (Budget(budget.tokens), budget):
        micros = _cut(costs_PG, num_prompt_P, rows, within, whole_groups)
        if all(_num_places(micro) <= budget.places for micro in micros):
            break
    return micros


def _cut(costs_PG, num_prompt_P, rows, budget: Budget, whole_groups: bool) -> list[list[_Piece]]:
    every = tuple(range(costs_PG.shape[1]))
    groups = [_Piece(p, every, int(costs_PG[p].sum()), num_prompt_P[p]) for p in rows]
    whole = _cut_whole(groups, budget)
    if whole_groups:
        return whole
    singles = [_Piece(p, (g,), int(costs_PG[p, g]), num_prompt_P[p]) for p in rows for g in every]
    split = [_merged(micro) for micro in _next_fit(singles, budget)]
    return min((micros for micros in (whole, split) if micros), key=_heaviest)


def _heaviest(cut: list[list[_Piece]]) -> int:
    return len(cut) * max(map(_num_tokens, cut))


def _num_tokens(micro: list[_Piece]) -> int:
    return sum(piece.num_tokens for piece in micro)


def _num_places(micro: list[_Piece]) -> int:
    """Places of pieces of different prompts."""
    return sum(piece.num_prompt + piece.num_tokens for piece in micro)


def _cut_whole(groups: list[_Piece], budget: Budget) -> list[list[_Piece]]:
    """Whole groups dealt out from the largest to the smallest, each to the lightest micro-batch.

    Where places are bounded, size and weight are in places, otherwise in tokens of completions. The
    result is [] where a group does not fit.
    """
    total = sum(group.num_tokens for group in groups)
    if max(group.num_tokens for group in groups) > budget.tokens:
        return []
    fewest = max(
        math.ceil(_num_places(groups) / budget.places),
        -(-total // budget.tokens),
        # No two groups of more than half a micro-batch share one.
        sum(2 * group.num_tokens > budget.tokens for group in groups),
        sum(2 * _num_places([group]) > budget.places for group in groups),
        1,
    )
    by_places = budget.places < math.inf
    sized = [(_num_places([group]) if by_places else group.num_tokens, group) for group in groups]
    sized.sort(key=lambda each: -each[0])
    most = budget.places if by_places else budget.tokens
    for num_micro in range(fewest, len(groups) + 1):
        micros = _dealt(sized, num_micro, most)
        if micros and max(map(_num_tokens, micros)) <= budget.tokens:
            return micros
    return [[group] for group in groups]


def _dealt(sized: list[tuple[int, _Piece]], num_micro: int, most: float) -> list[list[_Piece]]:
    """Sized groups, each dealt to the lightest micro-batch; [] where one is over `most`."""
    micros: list[list[_Piece]] = [[] for _ in range(num_micro)]
    loads = [(0, nth) for nth in range(num_micro)]  # a heap, the lightest first
    for size, group in sized:
        load, nth = loads[0]
        if load + size > most:
            return []
        micros[nth].append(group)
        heapq.heapreplace(loads, (load + size, nth))
    return micros


def _next_fit(pieces: list[_Piece], budget: Budget) -> list[list[_Piece]]:
    """The pieces in their order, in the fewest micro-batches, as even as that order allows."""

    def fill(bound: int) -> list[list[_Piece]]:
        micros, load, places = [[]], 0, 0
        for piece in pieces:
            last = micros[-1]
            new = 0 if last and last[-1].prompt == piece.prompt else piece.num_prompt
            more = new + piece.num_tokens
            if last and (load + piece.num_tokens > bound or places + more > budget.places):
                micros.append([])
                load, places, more = 0, 0, piece.num_prompt + piece.num_tokens
            micros[-1].append(piece)
            load += piece.num_tokens
            places += more
        return micros

    fewest = len(fill(budget.tokens))
    bounds = range(max(piece.num_tokens for piece in pieces), budget.tokens + 1)
    return fill(bounds[bisect.bisect_left(bounds, -fewest, key=lambda bound: -len(fill(bound)))])


def _merged(pieces: Iterable[_Piece]) -> list[_Piece]:
    """The pieces with neighbours of the same prompt put together."""
    merged: list[_Piece] = []
    for piece in pieces:
        if merged and merged[-1].prompt == piece.prompt:
            last = merged.pop()
            piece = last._replace(
                completions=last.completions + piece.completions,
                num_tokens=last.num_tokens + piece.num_tokens,
            )
        merged.append(piece)
    return merged


class _Segment(NamedTuple):
    """A prompt, or a completion, in a stream."""

    prompt: int
    start: int  # among the tokens of its kind
    length: int
    completion: int = 0
    behind: int = 0  # of a completion: the number of its prompt's segment in the stream


def _tiles(segment: _Segment, tile: int) -> range:
    end = segment.start + segment.length
    return range(segment.start // tile, -(-end // tile) if segment.length else 0)


class StreamPlan:
    """The stream of one micro-batch: where its prompts and completions lie."""

    def __init__(
        self,
        pieces,
        first_prompt: int,
        prompt_lengths_P,
        lengths_PG,
        share_prompts: bool,
        tile: int,
        starts: int,
    ):
        self.starts = starts
        self.tile, self.first_prompt, self.group_size = tile, first_prompt, lengths_PG.shape[1]
        self.prompts: list[_Segment] = []
        self.completions: list[_Segment] = []
        self.num_prompt = self.num_completion = 0
        for p, completions, *_ in pieces:
            for nth, g in enumerate(completions):
                if nth == 0 or not share_prompts:
                    start = self._start(self.num_prompt)
                    self.prompts.append(_Segment(p, start, prompt_lengths_P[p] - 1))
                    self.num_prompt = start + prompt_lengths_P[p] - 1
                start, length = self._start(self.num_completion), int(lengths_PG[p, g])
                behind = len(self.prompts) - 1
                self.completions.append(_Segment(p, start, length, g, behind))
                self.num_completion = start + length

    def _start(self, end: int) -> int:
        """Where the next segment starts: at the next tile, if that costs next to nothing."""
        gap = -end % self.tile
        return end + gap if gap <= self.tile // 16 else end + -end % self.starts

    @property
    def num_tokens(self) -> int:
        return sum(segment.length for segment in (*self.prompts, *self.completions))

    def places(self):
        """For each completion: (prompt, completion, its number in the shard, its places)."""
        for p, start, length, g, _ in self.completions:
            number = (p - self.first_prompt) * self.group_size + g
            yield p, g, number, slice(start, start + length)

    @functools.cached_property
    def _seen(self) -> tuple[list[tuple[int, int]], list[tuple[set[int], int, int]]]:
        """What each tile of queries sees.

        Returns:
          For each tile of prompts the first of those that it sees, and the end; for each tile of
          completions the tiles of prompts that it sees, and likewise its first tile of completions.
        """
        of_prompts = [_tiles(segment, self.tile) for segment in self.prompts]
        prompts = [(tile, tile) for tile in range(-(-self.num_prompt // self.tile))]
        completions = [(set(), t, t) for t in range(-(-self.num_completion // self.tile))]
        # A segment sees its tiles up to the tile at hand, so all segments of a tile see a range.
        for tiles in of_prompts:
            for tile in tiles:
                prompts[tile] = min(prompts[tile][0], tiles[0]), tile + 1
        for segment in self.completions:
            tiles = _tiles(segment, self.tile)
            for tile in tiles:
                also, first, _ = completions[tile]
                also.update(of_prompts[segment.behind])
                completions[tile] = also, min(first, tiles[0]), tile + 1
        return prompts, completions

    @functools.cached_property
    def num_listed(self) -> int:
        """The most key tiles that a tile of queries sees."""
        prompts, completions = self._seen
        counts = [end - first for first, end in prompts]
        counts += [len(also) + end - first for also, first, end in completions]
        return max(counts, default=0)

    def key_tiles(self, prompt_tiles: int) -> list[list[int]]:
        """The key tiles of each query tile, where completions start at the tile `prompt_tiles`."""
        prompts, completions = self._seen
        lists = [list(range(first, end)) for first, end in prompts]
        lists += [[]] * (prompt_tiles - len(lists))
        for also, first, end in completions:
            lists.append([*sorted(also), *range(prompt_tiles + first, prompt_tiles + end)])
        return lists

    def write(self, sequences: Sequences, micro: Micro) -> None:
        """Fills the arrays of one micro-batch."""
        num_prompt = len(micro.tokens) - len(micro.targets)
        for number, (p, start, length, *_) in enumerate(self.prompts, start=1):
            part = slice(start, start + length)
            micro.tokens[part] = sequences.prompts[p][:-1]
            micro.positions[part] = np.arange(length)
            micro.segments[part] = micro.prompts[part] = number
        for number, segment in enumerate(self.completions, start=len(self.prompts) + 1):
            p, start, length, g, behind = segment
            tokens, last = sequences.completions[p][g].tokens, sequences.prompts[p][-1]
            part = slice(num_prompt + start, num_prompt + start + length)
            micro.tokens[part] = np.concatenate([[last], tokens])[:length]
            micro.positions[part] = len(sequences.prompts[p]) - 1 + np.arange(length)
            micro.segments[part] = number
            micro.prompts[part] = behind + 1
            micro.targets[start : start + length] = tokens

    def write_experts(self, sequences: Sequences, num_prompt: int, into: np.ndarray) -> None:
        """Fills the experts [N, L, k] of one micro-batch, where completions start at a place."""

        def write(start: int, length: int, experts: np.ndarray | None) -> None:
            if experts is not None:
                into[start : start + length] = np.add(experts, 1, dtype=np.uint16)

        for p, start, length, *_ in self.prompts:
            write(start, length, sequences.prompt_experts(p))
        for p, start, length, g, _ in self.completions:
            write(num_prompt + start, length, sequences.completions[p][g].experts)
