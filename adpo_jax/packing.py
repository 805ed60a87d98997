"""The layout of a batch for the training forward: packed streams in which groups share a prompt.

A micro-batch is one stream of tokens a device: first the prompts of its groups, each once, then
their completions, one after the other without padding between them. A completion's part of the
stream starts with the prompt's last token and ends before its own last token, so that every place
in it predicts one completion token, and no token runs through the model for nothing.

All of this is decided on the host from the lengths. Sizes are rounded up to a few values (sixteen
an octave for completions, fewer for the rest), so that an update compiles a few times a run, not
once an iteration.

Letters: P prompts, G completions of a prompt, S prompt and completion tokens, T completion tokens,
B streams side by side (batch shards of the mesh), M micro-batches, N tokens of a stream, the last C
of them of completions, n tiles, J listed key tiles.
"""

import bisect
from collections.abc import Iterable
from typing import NamedTuple

import flax.struct
import numpy as np

# Tokens of an attention tile.
TILE = 64


class Batch(NamedTuple):
    """Completions of one iteration, the group axis explicit.

    A row is the prompt, padded on its left, followed by the completion, padded on its right, so
    that completions start in the same column everywhere.
    """

    tokens_PGS: np.ndarray  # int32
    attention_mask_PGS: np.ndarray  # int32, 1 at real tokens
    completion_mask_PGT: np.ndarray  # float32, 1 at sampled tokens, the stop token included
    sampler_log_probs_PGT: np.ndarray  # float32, the sampler's, tempered and not truncated

    @property
    def num_completion(self) -> int:
        return self.completion_mask_PGT.shape[-1]

    @property
    def padding_frac(self) -> float:
        """The share of the places run through the model that hold no token."""
        return 1.0 - float(np.mean(self.attention_mask_PGS > 0))


def balanced(batch: Batch, num_shards: int) -> np.ndarray:
    """An order of the prompts in which shards of equally many hold about equally many tokens.

    The longest group first, each to the shard with the fewest tokens that has room: devices whose
    streams are shorter wait for the longest.

    Returns:
      [P] int, the prompts of the first shard first; to index all that has a row a prompt.
    """
    P, T = len(batch.tokens_PGS), batch.num_completion
    tokens_P = (batch.completion_mask_PGT > 0).sum((1, 2))
    tokens_P = tokens_P + batch.attention_mask_PGS[:, 0, :-T].sum(-1)
    shards: list[list[int]] = [[] for _ in range(num_shards)]
    loads = np.zeros(num_shards)
    for prompt in np.argsort(-tokens_P, kind="stable"):
        lightest = int(np.argmin(loads))
        shards[lightest].append(prompt)
        full = len(shards[lightest]) * num_shards >= P
        loads[lightest] = np.inf if full else loads[lightest] + tokens_P[prompt]
    return np.concatenate([sorted(shard) for shard in shards])


class Micro(NamedTuple):
    """The streams of the micro-batches; leaves [B, M, ...] int32."""

    tokens: np.ndarray  # [B, M, N]
    positions: np.ndarray  # [B, M, N], in the sequence
    segments: np.ndarray  # [B, M, N], prompt or completion it is part of, 0 for padding
    prompts: np.ndarray  # [B, M, N], the segment of its group's prompt
    key_tiles: np.ndarray  # [B, M, n, J], tiles that a tile of queries sees, -1 for none
    targets: np.ndarray  # [B, M, C], the token that each place of the completions predicts
    places: np.ndarray  # [B, M, C], its index among the stream's P / B * G * T tokens, or -1


@flax.struct.dataclass
class PackedBatch:
    """A `Batch` laid out in streams; `pack` makes it."""

    micro: Micro
    num_micro_B: np.ndarray  # int32 [B], all alike: micro-batches that hold anything
    slots_PGT: np.ndarray  # int32, the place of a token among its stream's M * C places, or -1
    completion_mask_PGT: np.ndarray
    sampler_log_probs_PGT: np.ndarray
    whole_groups: bool = flax.struct.field(pytree_node=False, default=False)

    @property
    def padding_frac(self) -> float:
        """The share of the places run through the model that hold no token."""
        held = np.count_nonzero(self.micro.segments)
        B, _, N = self.micro.tokens.shape
        return 1.0 - held / (B * int(self.num_micro_B[0]) * N)


class _Piece(NamedTuple):
    """Completions of one prompt that go into the same micro-batch."""

    prompt: int
    completions: tuple[int, ...]
    num_tokens: int


def pack(
    batch: Batch,
    *,
    completions_per_micro: int = 0,
    num_shards: int = 1,
    whole_groups: bool = False,
    share_prompts: bool = True,
    tile: int = TILE,
) -> PackedBatch:
    """Lays a batch out in streams.

    Args:
      batch: host arrays.
      completions_per_micro: so many completions of full length fit in a device's stream; shorter
        ones, correspondingly more. 0 for all in one.
      num_shards: streams side by side; divides P.
      whole_groups: keep the completions of a prompt in one micro-batch.
      share_prompts: False runs each completion with a prompt of its own.
      tile: tokens of an attention tile.

    Raises:
      ValueError: when the prompts do not spread over the streams, a group does not fit in a
        micro-batch that must hold it whole, or the rows of a group have different prompts.
    """
    P, G, S = batch.tokens_PGS.shape
    T = batch.num_completion
    if P % num_shards:
        raise ValueError(f"{P} prompts do not spread over {num_shards} streams; pass a multiple")
    budget = (completions_per_micro or P // num_shards * G) * T
    if whole_groups and budget < G * T:
        raise ValueError(
            f"a micro-batch of {completions_per_micro} completions does not hold a group of {G}; "
            f"pass completions_per_micro of at least {G}, or whole_groups=False"
        )
    lengths_PG = np.asarray(batch.completion_mask_PGT > 0).sum(-1)
    _check_prompts(batch, S - T)
    shards = np.split(np.arange(P), num_shards)
    cuts = [_cut(lengths_PG, rows, budget, whole_groups) for rows in shards]
    num_micro = max(map(len, cuts))
    streams = [
        [_Stream(batch, pieces, lengths_PG, share_prompts, tile) for pieces in cut] for cut in cuts
    ]
    flat = [stream for shard in streams for stream in shard]
    num_completion = _rounded(max(s.num_completion for s in flat), tile, 16)
    num_prompt = max(s.num_prompt for s in flat)
    # By the length of the whole stream: short prompts need few sizes, long ones close ones.
    num_prompt = _up(num_prompt, _step(num_prompt + num_completion, tile, 32))
    key_tiles = [[s.key_tiles(num_prompt, num_completion) for s in shard] for shard in streams]
    J = _rounded(max(len(row) for shard in key_tiles for s in shard for row in s), 1, 2)

    # Room for as many micro-batches as completions of full length would make.
    room = max(num_micro, -(-P // num_shards * G * T // budget))
    shape, N = (num_shards, room), num_prompt + num_completion
    micro = Micro(
        *(np.zeros((*shape, N), np.int32) for _ in range(4)),
        np.full((*shape, N // tile, J), -1, np.int32),
        np.zeros((*shape, num_completion), np.int32),
        np.full((*shape, num_completion), -1, np.int32),
    )
    slots_PGT = np.full((P, G, T), -1, np.int32)
    for b, shard in enumerate(streams):
        for m, stream in enumerate(shard):
            stream.write(
                Micro(*(leaf[b, m] for leaf in micro)),
                key_tiles[b][m],
                slots_PGT,
                first_prompt=shards[b][0],
                first_slot=m * num_completion,
            )
    return PackedBatch(
        micro,
        np.full(num_shards, num_micro, np.int32),
        slots_PGT,
        batch.completion_mask_PGT,
        batch.sampler_log_probs_PGT,
        whole_groups,
    )


def _check_prompts(batch: Batch, prompt_length: int) -> None:
    prompts = (
        batch.tokens_PGS[:, :, :prompt_length] * batch.attention_mask_PGS[:, :, :prompt_length]
    )
    if (prompts != prompts[:, :1]).any():
        raise ValueError(
            "the rows of a group have different prompts; put completions of one prompt in a group"
        )


def _rounded(size: int, least: int, per_octave: int) -> int:
    """The next of so many values an octave (a power of 2), a multiple of `least`."""
    return _up(size, _step(size, least, per_octave))


def _step(size: int, least: int, per_octave: int) -> int:
    step = 2 ** max((size - 1).bit_length() - per_octave.bit_length(), 0)
    return _up(max(step, least), least)


def _up(size: int, step: int) -> int:
    """The next multiple of `step`, and at least one."""
    return max(-(-size // step), 1) * step


def _cut(lengths_PG, rows, budget: int, whole_groups: bool) -> list[list[_Piece]]:
    """The prompts `rows`, cut into micro-batches of at most `budget` completion tokens."""
    groups = [_Piece(p, tuple(range(lengths_PG.shape[1])), int(lengths_PG[p].sum())) for p in rows]
    whole = _cut_whole(groups, budget)
    if whole_groups:
        return whole
    singles = [
        _Piece(p, (g,), int(lengths_PG[p, g])) for p in rows for g in range(lengths_PG.shape[1])
    ]
    split = [_merged(micro) for micro in _next_fit(singles, budget)]
    return min((cut for cut in (whole, split) if cut), key=_heaviest)


def _heaviest(cut: list[list[_Piece]]) -> int:
    return len(cut) * max(sum(piece.num_tokens for piece in micro) for micro in cut)


def _cut_whole(groups: list[_Piece], budget: int) -> list[list[_Piece]]:
    """The longest group first, each to the lightest micro-batch; [] where a group does not fit."""
    total = sum(group.num_tokens for group in groups)
    if max(group.num_tokens for group in groups) > budget:
        return []
    for num_micro in range(max(-(-total // budget), 1), len(groups) + 1):
        micros: list[list[_Piece]] = [[] for _ in range(num_micro)]
        loads = [0] * num_micro
        for group in sorted(groups, key=lambda group: -group.num_tokens):
            lightest = loads.index(min(loads))
            micros[lightest].append(group)
            loads[lightest] += group.num_tokens
        if max(loads) <= budget:
            return micros
    return [[group] for group in groups]


def _next_fit(pieces: list[_Piece], budget: int) -> list[list[_Piece]]:
    """In order, into the fewest micro-batches, and these as even as that order allows."""

    def fill(bound: int) -> list[list[_Piece]]:
        micros, load = [[]], 0
        for piece in pieces:
            if load + piece.num_tokens > bound and micros[-1]:
                micros.append([])
                load = 0
            micros[-1].append(piece)
            load += piece.num_tokens
        return micros

    fewest = len(fill(budget))
    bounds = range(max(piece.num_tokens for piece in pieces), budget + 1)
    return fill(bounds[bisect.bisect_left(bounds, -fewest, key=lambda bound: -len(fill(bound)))])


def _merged(pieces: Iterable[_Piece]) -> list[_Piece]:
    """Neighbours of one prompt put together."""
    merged: list[_Piece] = []
    for piece in pieces:
        if merged and merged[-1].prompt == piece.prompt:
            last = merged.pop()
            piece = _Piece(
                piece.prompt,
                last.completions + piece.completions,
                last.num_tokens + piece.num_tokens,
            )
        merged.append(piece)
    return merged


class _Stream:
    """The stream of one micro-batch: where its prompts and completions lie."""

    def __init__(self, batch: Batch, pieces, lengths_PG, share_prompts: bool, tile: int):
        self.batch, self.tile = batch, tile
        self.prompt_ids: list[np.ndarray] = []
        self.prompt_starts: list[int] = []
        # (prompt, completion, number of the prompt segment, start among the completions, tokens)
        self.completions: list[tuple[int, int, int, int, int]] = []
        self.num_prompt = self.num_completion = 0
        S, T = batch.tokens_PGS.shape[-1], batch.num_completion
        for piece in pieces:
            real = batch.attention_mask_PGS[piece.prompt, 0, : S - T] > 0
            ids = batch.tokens_PGS[piece.prompt, 0, : S - T][real]
            for nth, g in enumerate(piece.completions):
                if nth == 0 or not share_prompts:
                    self.num_prompt = self._start(self.num_prompt)
                    self.prompt_ids.append(ids)
                    self.prompt_starts.append(self.num_prompt)
                    self.num_prompt += len(ids) - 1
                length = int(lengths_PG[piece.prompt, g])
                start = self._start(self.num_completion)
                number = len(self.prompt_ids) - 1
                self.completions.append((piece.prompt, g, number, start, length))
                self.num_completion = start + length

    def _start(self, end: int) -> int:
        """Where the next segment starts: at a tile, where that costs next to nothing."""
        gap = -end % self.tile
        return end + gap if gap <= self.tile // 16 else end

    def _tiles(self, start: int, end: int) -> set[int]:
        return set(range(start // self.tile, -(-end // self.tile))) if end > start else set()

    def key_tiles(self, num_prompt: int, num_completion: int) -> list[list[int]]:
        """The key tiles of each query tile of a stream with so many places for each kind."""
        lists = [set() for _ in range((num_prompt + num_completion) // self.tile)]

        def sees(start: int, end: int, also: set[int]):
            own = self._tiles(start, end)
            for tile in own:
                lists[tile] |= also | {other for other in own if other <= tile}

        prompts = [(s, s + len(ids) - 1) for s, ids in zip(self.prompt_starts, self.prompt_ids)]
        for start, end in prompts:
            sees(start, end, set())
        for _, _, number, start, length in self.completions:
            sees(num_prompt + start, num_prompt + start + length, self._tiles(*prompts[number]))
        return [sorted(tiles) for tiles in lists]

    def write(self, micro: Micro, key_tiles, slots_PGT, *, first_prompt: int, first_slot: int):
        """Fills the arrays of one micro-batch, and the slots of its tokens."""
        num_prompt = len(micro.tokens) - len(micro.targets)
        for row, tiles in zip(micro.key_tiles, key_tiles):
            row[: len(tiles)] = tiles
        for number, (start, ids) in enumerate(zip(self.prompt_starts, self.prompt_ids), start=1):
            part = slice(start, start + len(ids) - 1)
            micro.tokens[part] = ids[:-1]
            micro.positions[part] = np.arange(len(ids) - 1)
            micro.segments[part] = micro.prompts[part] = number
        G, T = slots_PGT.shape[1:]
        for p, g, number, start, length in self.completions:
            ids, row = self.prompt_ids[number], self.batch.tokens_PGS[p, g, -T:][:length]
            part = slice(num_prompt + start, num_prompt + start + length)
            micro.tokens[part] = np.concatenate([ids[-1:], row])[:length]
            micro.positions[part] = len(ids) - 1 + np.arange(length)
            micro.segments[part] = len(self.prompt_ids) + 1 + (p - first_prompt) * G + g
            micro.prompts[part] = number + 1
            ends = slice(start, start + length)
            micro.targets[ends] = row
            micro.places[ends] = ((p - first_prompt) * G + g) * T + np.arange(length)
            slots_PGT[p, g, :length] = first_slot + start + np.arange(length)
