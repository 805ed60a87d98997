"""The layout of sequences for the training forward: packed streams in which groups share a prompt.

A micro-batch is one stream of tokens a device. The stream has the prompts of its groups first, each
once, then their completions, one after the other without padding between them:

    prompt A | prompt B | A1 | A2 | A3 | B1 | B2 | B3
      once       once      each sees its own prompt and itself

A completion's part of the stream starts with the prompt's last token and ends before its own last
token, so that every place in it predicts one completion token, and no token runs through the model
for nothing. A token that is not trained on has its place like any other, so later tokens see it.

Where several devices have shares of a stream (the mesh axis `sequence`), the shares lie one after
the other, each with as many tiles of prompts, which come first, and as many of completions. Tiles
are dealt out so that all shares see about equally many key tiles.

`Packing` decides all of this on the host from the lengths; what is of one stream is in `streams`.
All micro-batches have the shape of the largest one. How many of them there are is data, not a
shape. A new shape costs a compile of a minute, a place without a token costs as much as one with a
token. So sizes are rounded up to a few values (completion places to one of sixteen an octave,
prompt places to 1/32 to 1/64 of the stream, listed key tiles to one of two an octave), and
`stream_sizes.KnownSizes` are used again where they waste little.

Letters: P prompts, G completions of a prompt, B streams side by side (batch shards of the mesh), M
micro-batches, S shares of a stream, N tokens of it, C of them of completions, n tiles, W tokens of
a tile, J listed key tiles.
"""

import functools
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import flax.struct
import jax
import numpy as np

from adpo_jax.model.linear_attention import chunk_of
from adpo_jax.model.model_config import ModelConfig
from adpo_jax.records import Batch, Sequences
from adpo_jax.update.shares import Order, shared_out
from adpo_jax.update.stream_sizes import REUSED_PLACES, REUSED_TILES, TILE, Size, rounded
from adpo_jax.update.streams import Budget, Micro, StreamPlan, cut


def starts_of(configs: Iterable[ModelConfig], tile: int) -> int:
    """Where segments must start in streams that run through these models, as `Packing` takes it."""
    return chunk_of(tile) if any(config.linear_attention for config in configs) else 1


def balanced(tokens_P: np.ndarray, num_shards: int) -> np.ndarray:
    """An order of the prompts in which shards of equally many hold about equally many tokens.

    Devices wait for the one with the longest stream. So the groups are dealt out from the longest
    to the shortest, each to the shard with the fewest tokens that has room.

    Args:
      tokens_P: [P] int, tokens of each prompt and its completions.

    Returns:
      [P] int, the prompts of the first shard first; it indexes arrays with one row a prompt.
    """
    P = len(tokens_P)
    shards: list[list[int]] = [[] for _ in range(num_shards)]
    loads = np.zeros(num_shards)
    for prompt in np.argsort(-tokens_P, kind="stable"):
        lightest = int(np.argmin(loads))
        shards[lightest].append(prompt)
        full = len(shards[lightest]) * num_shards >= P
        loads[lightest] = np.inf if full else loads[lightest] + tokens_P[prompt]
    return np.concatenate([sorted(shard) for shard in shards])


@flax.struct.dataclass
class PackedBatch:
    """Sequences laid out in streams; `pack` makes it.

    Attributes:
      num_micro_B: [B] int32, the number of micro-batches that hold anything, B times the same.
      trained: [B, M, C] bool, whether the token that a place predicts is trained on.
      completion: [B, M, C] int32, the number of each place's completion among the P / B * G of its
        shard.
      log_probs: under each policy's name [B, M, C] float32, log-probs of the predicted tokens.
      experts: [B, M, N, L, k] uint16, 1 + the experts that the sampler took in each place, those of
        prompts included, 0 where it is not known; None where the router chooses everywhere.
      whole_groups: whether all completions of a prompt lie in one micro-batch.
      starts: prompts and completions start at multiples of so many places.
      shares: S.
    """

    micro: Micro
    num_micro_B: np.ndarray
    trained: np.ndarray
    completion: np.ndarray
    log_probs: dict[str, np.ndarray]
    num_prompts: int = flax.struct.field(pytree_node=False)
    group_size: int = flax.struct.field(pytree_node=False)
    whole_groups: bool = flax.struct.field(pytree_node=False, default=False)
    experts: np.ndarray | None = None
    starts: int = flax.struct.field(pytree_node=False, default=1)
    shares: int = flax.struct.field(pytree_node=False, default=1)

    def of_completions(self, values_BNZ):
        """What lies at the places of completions, [B, C, ...]."""
        B, N, *rest = values_BNZ.shape
        C, S = self.micro.targets.shape[-1], self.shares
        shares = values_BNZ.reshape(B, S, N // S, *rest)
        return shares[:, :, -(C // S) :].reshape(B, C, *rest)

    def check_starts(self, config: ModelConfig) -> None:
        """Refuses streams whose segments start where linear attention of a model cannot.

        Raises:
          ValueError: naming the argument of `Packing`.
        """
        tile = self.micro.tokens.shape[-1] // self.micro.key_tiles.shape[-2]
        if config.linear_attention and self.starts % chunk_of(tile):
            raise ValueError(
                "a model with linear attention needs segments that start at multiples of "
                f"{chunk_of(tile)} places; these start at multiples of {self.starts}. Pack them "
                f"with starts={chunk_of(tile)}, or use the layout of rows"
            )


def pack(sequences: Sequences | Batch, **options) -> PackedBatch:
    """Lays sequences out in streams.

    Args:
      sequences: ragged `Sequences`, or a `Batch` of host arrays.
      options: the keyword arguments of `Packing`.

    Raises:
      ValueError: as `Packing`, and as `Batch.sequences` for a `Batch`.
    """
    if isinstance(sequences, Batch):
        sequences = sequences.sequences()
    return Packing(sequences, **options).batch(sequences)


class _Cutter(NamedTuple):
    """Cuts completions into the streams of micro-batches.

    Attributes:
      costs_PG: the tokens by which completions are cut.
      prompt_lengths_P: tokens of each prompt.
      shards: the prompts of each stream side by side.
      most_places: of a stream, beside the budget that each cut has.
      whole_groups, share_prompts, tile, starts: as for `Packing`.
    """

    costs_PG: np.ndarray
    lengths_PG: np.ndarray
    prompt_lengths_P: list[int]
    shards: list[np.ndarray]
    most_places: float
    whole_groups: bool
    share_prompts: bool
    tile: int
    starts: int

    def streams(self, budget: int) -> list[list[StreamPlan]]:
        """The streams of each shard's micro-batches, of at most so many tokens by `costs_PG`."""
        most = Budget(budget, self.most_places)
        before_last_P = [length - 1 for length in self.prompt_lengths_P]
        return [
            [
                StreamPlan(
                    pieces,
                    int(rows[0]),
                    self.prompt_lengths_P,
                    self.lengths_PG,
                    self.share_prompts,
                    self.tile,
                    self.starts,
                )
                for pieces in cut(self.costs_PG, before_last_P, rows, most, self.whole_groups)
            ]
            for rows in self.shards
        ]

    @property
    def least(self) -> int:
        """The smallest budget: the longest completion, or group where groups are kept whole."""
        costs = self.costs_PG.sum(1) if self.whole_groups else self.costs_PG
        return int(costs.max())


class Packing:
    """Where the tokens of some sequences lie in streams, decided from their lengths alone.

    Args:
      sequences: P prompts with G completions each.
      completions_per_micro: how many completions of full length fit in a stream, or more shorter
        ones with as many tokens. 0 for all in one.
      full_length: tokens of a completion of full length, with its prompt where prompts count; 0
        for those of the longest.
      prompt_length: tokens of a prompt of full length; 0 for those of the longest. A stream takes
        no more places than completions and prompts of full length do, so shorter completions bring
        only as many more prompts as there is room for.
      num_shards: streams side by side; divides P.
      whole_groups: keep the completions of a prompt in one micro-batch.
      share_prompts: False runs each completion with a prompt of its own.
      count_prompts: cut by the tokens of prompts too, as groups of one completion need: where many
        share a prompt, those of the completions are nearly all there are.
      tile: tokens of an attention tile.
      sizes: sizes to prefer where they waste little, of any tile; () for the smallest size that
        there is.
      size: the size of the streams, which must hold what is `needed`; None to choose one.
      starts: prompts and completions start at multiples of so many places, a part of a tile, as
        linear attention wants it (`starts_of`).
      shares: devices that have a share of each stream.

    Raises:
      ValueError: when the prompts do not spread over the streams, or a group does not fit in a
        micro-batch that must hold it whole.
    """

    def __init__(
        self,
        sequences: Sequences,
        *,
        completions_per_micro: int = 0,
        full_length: int = 0,
        prompt_length: int = 0,
        num_shards: int = 1,
        whole_groups: bool = False,
        share_prompts: bool = True,
        count_prompts: bool = False,
        tile: int = TILE,
        sizes: Sequence[Size] = (),
        size: Size | None = None,
        starts: int = 1,
        shares: int = 1,
    ):
        lengths_PG = sequences.lengths
        P, G = lengths_PG.shape
        if P % num_shards:
            raise ValueError(
                f"{P} prompts do not spread over {num_shards} streams; pass a multiple"
            )
        assert tile % starts == 0
        per_shard = P // num_shards * G
        prompt_lengths_P = [len(ids) for ids in sequences.prompts]
        costs_PG = lengths_PG
        if count_prompts:
            costs_PG = lengths_PG + np.array(prompt_lengths_P)[:, None]
        full_length = max(full_length, int(costs_PG.max(initial=0)), 1)
        completions_per_micro = completions_per_micro or per_shard
        budget = completions_per_micro * full_length
        if whole_groups and budget < G * full_length:
            raise ValueError(
                f"a micro-batch of {completions_per_micro} completions does not hold a group of "
                f"{G}; pass completions_per_micro of at least {G}, or whole_groups=False"
            )
        most_places = math.inf
        if share_prompts and not count_prompts:
            longest = max(prompt_length, *prompt_lengths_P) - 1
            most_places = budget + _prompts_of(completions_per_micro, G) * longest
        cutter = _Cutter(
            costs_PG=costs_PG,
            lengths_PG=lengths_PG,
            prompt_lengths_P=prompt_lengths_P,
            shards=np.split(np.arange(P), num_shards),
            most_places=most_places,
            whole_groups=whole_groups,
            share_prompts=share_prompts,
            tile=tile,
            starts=starts,
        )
        self.num_prompts, self.group_size, self.whole_groups = P, G, whole_groups
        self.tile, self.starts, self.shares = tile, starts, shares
        self.streams = cutter.streams(budget)
        self.needed = _needed(self.streams)
        if size is None:
            whole_tiles = tile * shares  # what a size is a multiple of
            self.streams, size = _fitted(
                cutter,
                self.streams,
                [size for size in sizes if size.fits(whole_tiles)],
                # As many micro-batches as completions of full length would make.
                room=-(-per_shard * full_length // budget),
                most=budget,
                tile=whole_tiles,
            )
        self.size = size
        self.num_micro = _needed(self.streams).room

    @property
    def num_prompt(self) -> int:
        """Places of prompts in a stream."""
        return self.size.prompt

    @property
    def num_completion(self) -> int:
        """Places of completions in a stream."""
        return self.size.completion

    @property
    def padding_frac(self) -> float:
        """The share of the places run through the model that hold no token."""
        held = sum(stream.num_tokens for shard in self.streams for stream in shard)
        return 1.0 - held / self.num_places

    @property
    def num_places(self) -> int:
        """The places that are run through the model."""
        return len(self.streams) * self.num_micro * self.size.places

    def batch(self, sequences: Sequences) -> PackedBatch:
        """The sequences in their places, as host arrays; "sampler" is among the log-probs."""
        names = ("sampler", *sequences.log_probs)
        shapes = self.abstract(names, sequences.experts_shape)
        batch = jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), shapes)
        batch.num_micro_B[:] = self.num_micro
        values = {name: sequences.values(name) for name in names}
        for b, shard in enumerate(self.streams):
            for m, stream in enumerate(shard):
                micro = Micro(*(leaf[b, m] for leaf in batch.micro))
                tiles_of_queries = stream.key_tiles(self.num_prompt // self.tile)
                for row, tiles in zip(micro.key_tiles, tiles_of_queries):
                    row[: len(tiles)] = np.add(tiles, 1)
                stream.write(sequences, micro)
                for p, g, number, part in stream.places():
                    batch.completion[b, m, part] = number
                    batch.trained[b, m, part] = sequences.completions[p][g].trained
                    for name, into in batch.log_probs.items():
                        into[b, m, part] = values[name][p][g]
                if batch.experts is not None:
                    stream.write_experts(sequences, self.num_prompt, batch.experts[b, m])
                if self.shares > 1:
                    self._share_out(batch, b, m)
        return batch

    def _share_out(self, batch: PackedBatch, b: int, m: int) -> None:
        """Deals the tiles of a stream out to its shares, in place."""
        order, micro = self._orders[b][m], batch.micro

        def permute(x, order):
            tiles = x[b, m].reshape(len(order), -1, *x.shape[3:])
            x[b, m] = tiles[order].reshape(x.shape[2:])

        for x in (micro.tokens, micro.positions, micro.segments, micro.prompts, micro.key_tiles):
            permute(x, order.all)
        if batch.experts is not None:
            permute(batch.experts, order.all)
        for x in (micro.targets, batch.trained, batch.completion, *batch.log_probs.values()):
            permute(x, order.completions)
        number = np.zeros(len(order.all) + 1, np.int32)
        number[order.all + 1] = np.arange(1, len(order.all) + 1)
        micro.key_tiles[b, m] = number[micro.key_tiles[b, m]]

    @functools.cached_property
    def _orders(self) -> list[list[Order]]:
        """Of each stream, how its tiles are dealt out."""
        prompt_tiles = self.size.prompt // self.tile

        def of_stream(stream: StreamPlan) -> Order:
            tiles_of_queries = list(stream.key_tiles(prompt_tiles))
            empty = self.size.places // self.tile - len(tiles_of_queries)
            return shared_out(tiles_of_queries + [()] * empty, prompt_tiles, self.shares)

        return [list(map(of_stream, shard)) for shard in self.streams]

    @property
    def load_imbalance(self) -> float:
        """Key tiles that the busiest share of a stream sees, over those of the mean share.

        It is that of the micro-batches one after the other, in which shares wait for each other.
        """
        if self.shares == 1:
            return 1.0
        loads = [order.loads for shard in self._orders for order in shard]
        return float(np.max(loads, axis=1).sum() / np.mean(loads, axis=1).sum())

    def abstract(
        self, names: Iterable[str] = ("sampler",), experts: tuple[int, ...] = ()
    ) -> PackedBatch:
        """The shapes and dtypes of `batch`, with log-probs of these names.

        Args:
          experts: (layers, experts of a token) where completions say what they went through.
        """
        B, M, C, J = len(self.streams), self.size.room, self.size.completion, self.size.listed
        N = self.size.places

        def of(*shape: int, dtype=np.int32):
            return jax.ShapeDtypeStruct(shape, dtype)

        tokens = of(B, M, N)
        micro = Micro(*(tokens,) * 4, key_tiles=of(B, M, N // self.tile, J), targets=of(B, M, C))
        return PackedBatch(
            micro=micro,
            num_micro_B=of(B),
            trained=of(B, M, C, dtype=np.bool_),
            completion=of(B, M, C),
            log_probs={name: of(B, M, C, dtype=np.float32) for name in names},
            experts=of(B, M, N, *experts, dtype=np.uint16) if experts else None,
            num_prompts=self.num_prompts,
            group_size=self.group_size,
            whole_groups=self.whole_groups,
            starts=self.starts,
            shares=self.shares,
        )

    def unpacked(self, values_BMC: np.ndarray) -> list[list[np.ndarray]]:
        """Values at the places of completions as P lists of G arrays, one a completion."""
        found = [[None] * self.group_size for _ in range(self.num_prompts)]
        for b, shard in enumerate(self.streams):
            for m, stream in enumerate(shard):
                values = values_BMC[b, m]
                if self.shares > 1:
                    places = np.argsort(self._orders[b][m].completions)
                    values = values.reshape(len(places), -1)[places].reshape(-1)
                for p, g, _, part in stream.places():
                    found[p][g] = np.array(values[part])
        return found


def _prompts_of(completions: int, group_size: int) -> int:
    """The most prompts that so many neighbouring completions touch, cut one run after the other."""
    return -(-(completions - math.gcd(completions, group_size)) // group_size) + 1


def _needed(streams: list[list[StreamPlan]]) -> Size:
    """What the streams of all shards need; `room` is the number of micro-batches."""
    flat = [stream for shard in streams for stream in shard]
    return Size(
        room=max(map(len, streams)),
        prompt=max(s.num_prompt for s in flat),
        completion=max(s.num_completion for s in flat),
        listed=max(s.num_listed for s in flat),
    )


def _fitted(
    cutter: _Cutter,
    best: list[list[StreamPlan]],
    known: Sequence[Size],
    *,
    room: int,
    most: int,
    tile: int,
) -> tuple[list[list[StreamPlan]], Size]:
    """The cut and the size of its streams: a known size that wastes little, or a new one.

    The first size is as small as it can be; beside others, a new one has room to grow.

    Args:
      known: the sizes to prefer.
      room: micro-batches that the arrays have room for, or more where more are needed.
      tile: the tokens that prompts and completions of a new size are multiples of.
      best, most: as for `_reused`.
    """
    needed = _needed(best)
    needed = needed._replace(room=max(room, needed.room))
    smallest = needed.rounded(tile)
    if not known:
        return best, smallest
    if found := _reused(cutter, known, best, most):
        return found
    grown = needed.grown(known, tile)
    largest = max(smallest.completion, rounded(most, tile, 16))
    return best, grown._replace(completion=min(grown.completion, largest))


def _reused(
    cutter: _Cutter, sizes: Iterable[Size], best: list[list[StreamPlan]], most: int
) -> tuple[list[list[StreamPlan]], Size] | None:
    """The cut that wastes least in one of the sizes, and that size; None if all waste too much.

    Args:
      best: the streams of the cut with the fewest places.
      most: the largest budget that may be asked of the cutter.
    """
    needed, least = _needed(best), cutter.least
    limit = REUSED_PLACES * needed.room * needed.places
    found = []
    for nth, size in enumerate(sizes):
        streams, need = best, needed
        if not size.holds(need):
            bound = min(size.completion, most)
            if bound < least or needed.room * size.places > limit:
                continue
            streams = cutter.streams(bound)
            need = _needed(streams)
            if need.completion > size.completion >= least + need.completion - bound:
                # Segments that start at a tile leave gaps.
                streams = cutter.streams(bound - (need.completion - size.completion))
                need = _needed(streams)
        places = need.room * size.places
        if size.holds(need) and places <= limit and size.listed <= REUSED_TILES * need.listed:
            found.append((places, size.listed, nth, streams, size))
    return min(found, key=lambda one: one[:3])[3:] if found else None
