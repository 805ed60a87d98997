"""What samples have of their completions from before they took their slots: the third store.

When a turn ends, its keys and values are copied from the ring into the sample's past row (`put`),
with the state of linear attention after them, and its slot is free for others. What a tool answers
is prefilled in chunks, which attend to the prompt, to the past and to themselves (`chunk`), and are
put into the past row as well. Then the sample may decode in any slot of its shard. Which row
belongs to which sample is in `past_rows`.

Column c of a past row is the token before place c of the completion. So the first column is the
last token of the prompt, which no prefix row holds, and a sample of c tokens has c columns.

Letters: S past rows, N chunks or copies of one call, T tokens of a chunk, K key/value heads, H
heads, R = H / K, D head dim.
"""

import collections
import functools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from adpo_jax.devices.sharding import constrain, on_each_device
from adpo_jax.engine import group_attention, kernels, kv_cache
from adpo_jax.engine.decode_state import Prefixes
from adpo_jax.engine.group_attention import Reach
from adpo_jax.engine.kv_cache import KV, Copies, LayerKV
from adpo_jax.engine.verbs import Verbs
from adpo_jax.model import attention_choice
from adpo_jax.model.attention import by_kv_head
from adpo_jax.model.linear_attention import Memory, where_rows
from adpo_jax.model.linear_attention_chunks import rows_with_memory

# Lengths of a chunk; a longer one is prefilled in pieces, each attending to those before.
CHUNK_LENGTHS = (16, 64, 256)
# The most tokens of one call, padding included, and about the most scores of a layer: with 4 bytes
# each they are 512 MiB. A single chunk may pass either.
CHUNK_TOKENS = 2048
CHUNK_SCORES = 1 << 27


class Chunks(NamedTuple):
    """Tokens that go on after those of past rows, [N] each; those of a shard lie side by side."""

    tokens: np.ndarray  # [N, T] int32, padded on the right
    count: np.ndarray  # int32, tokens of each
    at: np.ndarray  # int32, columns of the past before
    first: np.ndarray  # int32, position of the first column of the past
    row: np.ndarray  # int32, past row; where pages hold the past, the slot that has the state
    prefix_row: np.ndarray  # int32
    table: np.ndarray | None = None  # [N, pages] int32, where pages hold the past; else None


class Piece(NamedTuple):
    """A piece of one sample's chunk.

    Where pages hold the past, `table` lists those of the sample, `row` is its slot, in which its
    state lies, and the piece lies within one of the pages.
    """

    shard: int
    tokens: np.ndarray  # [at most CHUNK_LENGTHS[-1]] int32
    at: int
    first: int
    row: int
    prefix_row: int
    table: np.ndarray | None = None  # [pages] int32


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def empty(verbs: Verbs, rows: int, columns: int) -> KV:
    """A store without tokens."""
    return verbs.sharded(verbs.layout.zeros(rows, columns))


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def put(verbs: Verbs, past: KV, source: KV, copies: Copies) -> KV:
    """Copies columns and states of rings or chunks into past rows, or into pages."""
    return verbs.sharded(verbs.layout.copy(past, source, copies, verbs.policy.mesh))


@functools.partial(jax.jit, static_argnums=0)
def chunk(verbs: Verbs, params, prefix: Prefixes | None, past: KV, chunks: Chunks) -> KV:
    """What tokens that go on after prompts and a past write, [N rows, T columns].

    Args:
      prefix: the prompts; None where the past is all that there is before.
      past: the past rows; or pages, where the chunks have a table.
    """
    policy, layout = verbs.policy, verbs.layout
    N, T = chunks.tokens.shape
    place = jnp.arange(T, dtype=jnp.int32)
    in_past = chunks.at[:, None] + place[None, :]
    positions = chunks.first[:, None] + in_past
    by_row, by_head = ("batch",), ("batch", "kv_heads")
    config = policy.config

    def of_row(kv, rows):
        return jax.tree.map(lambda x: x[rows % len(x)], kv)

    def taken(kv: LayerKV | Memory, rows):
        arrays = jax.tree.leaves(kv)
        heads = min(x.shape[1] for x in arrays)
        sizes = {"batch": math.gcd(N, len(arrays[0])), "kv_heads": heads}
        return on_each_device(of_row, policy.mesh, sizes, (by_head, by_row), by_head)(kv, rows)

    if prefix is not None:
        sizes = {"batch": math.gcd(N, len(prefix.lengths))}
        of_rows = on_each_device(of_row, policy.mesh, sizes, (by_row, by_row), by_row)
        prefix_lengths = of_rows(prefix.lengths, chunks.prefix_row)

    attend_pages = kernels.attend_part(
        attention_choice.PLAIN, layout, config.attention_soft_cap, policy.mesh
    )

    def attend(q, k, v, layer, kv):
        (H, D), K = q.shape[2:], k.shape[2]
        R = H // K
        q = (q * jnp.asarray(config.attention_scale, q.dtype)).reshape(N, T, K, R, D)
        q_NKQD = q.transpose(0, 2, 1, 3, 4).reshape(N, K, T * R, D)
        back = jnp.minimum(layer.window_at(positions) - 1, group_attention.UNBOUNDED)

        def reach_of(origin_NT, length, back=back, ring=False):
            origin_NQ = jnp.repeat(origin_NT, R, axis=1)
            back_NQ = jnp.repeat(jnp.broadcast_to(back, origin_NT.shape), R, axis=1)
            return Reach(origin_NQ, back_NQ, length, ring)

        def part(layer_kv, reach):
            return group_attention.attend_part(
                q_NKQD,
                (layer_kv,),
                0,
                reach,
                soft_cap=config.attention_soft_cap,
                transposed_keys=layout.transposed_keys,
            )

        own = layout.pack(k, v)
        places = jnp.broadcast_to(place, (N, T))
        # A token reaches back to the first of its chunk and not, round a ring, to those after.
        parts = [part(own, reach_of(places, chunks.count, jnp.minimum(back, place), ring=True))]
        if prefix is not None:
            of_prefix = taken(layout.read(prefix.kv, layer), chunks.prefix_row)
            parts.append(part(of_prefix, reach_of(positions, prefix_lengths)))
        in_reach = reach_of(in_past, chunks.at)
        if chunks.table is None:
            parts.append(part(taken(layout.read(past, layer), chunks.row), in_reach))
        else:
            of_past = kv_cache.of_kind(past, layer)
            parts.append(attend_pages(q_NKQD, of_past, layer.at, in_reach, chunks.table))
        sinks = None if layer.sinks is None else jnp.tile(by_kv_head(layer.sinks, K), (1, T))
        out_NKQD = group_attention.merge(*parts, sinks=sinks)
        out = out_NKQD.reshape(N, K, T, R, D).transpose(0, 2, 1, 3, 4).reshape(N, T, H, D)
        return out.astype(q.dtype), layout.write(kv, layer, own)

    def recur(inputs, layer, kv):
        memory = taken(layout.read(past, layer), chunks.row)
        if prefix is not None:
            of_prefix = taken(layout.read(prefix.kv, layer), chunks.prefix_row)
            memory = where_rows(chunks.at > 0, memory, of_prefix)
        segments = (place < chunks.count[:, None]).astype(jnp.int32)
        out, memory = rows_with_memory(inputs, segments, policy.mesh, memory)
        return out, layout.write(kv, layer, memory)

    tokens = constrain(chunks.tokens, policy.mesh, "batch", None)
    store = verbs.sharded(layout.zeros(N, T))
    _, kv, _ = policy(params, tokens, positions, store, verbs.attention_of(attend, recur))
    return verbs.sharded(kv)


@functools.partial(jax.jit, static_argnums=0)
def rows_of(verbs: Verbs, past: KV, rows: jax.Array) -> KV:
    """The past rows with these numbers, [new S] int32."""
    return verbs.sharded(verbs.layout.take(past, rows))


def resized(verbs: Verbs, past: KV, old_rows: np.ndarray | None, columns: int) -> KV:
    """A past of another size.

    Args:
      old_rows: [new S] int32, the old row of each new one; None to keep all as they are.
    """
    if old_rows is not None:
        past = rows_of(verbs, past, old_rows)
    return past if kv_cache.num_columns(past) == columns else verbs.with_columns(past, columns)


@functools.partial(jax.jit, static_argnums=0)
def placed(verbs: Verbs, view):
    """A table, or several in a tree, split over the devices as the rows are."""
    return jax.tree.map(lambda x: constrain(x, verbs.policy.mesh, "batch"), view)


def in_shards(entries: Sequence[tuple[int, NamedTuple]], num_shards: int, most: int):
    """Entries of several shards as equal parts of few sizes, in calls of `most` a shard at most.

    Args:
      entries: the shard of each, and what it is.

    Yields:
      Lists of entries or None, those of a shard side by side.
    """
    queues = [[entry for at, entry in entries if at == shard] for shard in range(num_shards)]
    while any(queues):
        longest = max(map(len, queues))
        count = 1
        while count < min(longest, most):
            count = min(4 * count, most)
        yield [entry for q in queues for entry in [*q[:count], *[None] * (count - len(q[:count]))]]
        queues = [q[count:] for q in queues]


def put_all(verbs: Verbs, past: KV, ring: KV, copies, num_shards: int) -> KV:
    """Copies columns of the ring into past rows, or into pages.

    Args:
      copies: the shard and the `Copies`, of one each, of all of them.
    """
    for entries in in_shards(copies, num_shards, 64):
        past = put(verbs, past, ring, _stacked(entries, Copies(0, 0, 0, 0, 0, 0)))
    return past


def in_rounds(chunks: Sequence[Piece], longest: int) -> Iterator[list[Piece]]:
    """Chunks as pieces of at most `longest` tokens; each round has the next piece of each.

    Args:
      longest: where pages hold the past, a part of a page, across whose end no piece goes.
    """

    def cut(chunk: Piece) -> int:
        return longest if chunk.table is None else longest - chunk.at % longest

    while chunks:
        yield [chunk._replace(tokens=chunk.tokens[: cut(chunk)]) for chunk in chunks]
        chunks = [
            chunk._replace(tokens=chunk.tokens[cut(chunk) :], at=chunk.at + cut(chunk))
            for chunk in chunks
            if len(chunk.tokens) > cut(chunk)
        ]


def prefill_all(
    verbs: Verbs,
    params,
    prefix: Prefixes,
    past: KV,
    pieces: Sequence[Piece],
    num_shards: int,
) -> KV:
    """Prefills pieces of different samples into their past rows, or into their pages.

    Pieces of like length go together, so that short ones are not padded to the longest.
    """
    by_length = collections.defaultdict(list)
    for piece in pieces:
        by_length[chunk_length(len(piece.tokens))].append(piece)
    for length, alike in sorted(by_length.items()):
        past = _prefill_alike(verbs, params, prefix, past, alike, length, num_shards)
    return past


def chunk_length(count: int) -> int:
    """The places that a piece of so many tokens takes, at most `CHUNK_LENGTHS[-1]`."""
    return next(size for size in CHUNK_LENGTHS if size >= count)


def _prefill_alike(
    verbs: Verbs,
    params,
    prefix: Prefixes,
    past: KV,
    pieces: Sequence[Piece],
    length: int,
    num_shards: int,
) -> KV:
    row_columns = kv_cache.num_columns(past)
    columns = kv_cache.num_columns(prefix.kv) + row_columns
    scores = verbs.policy.config.num_heads * (columns + length)
    most = min(CHUNK_TOKENS, CHUNK_SCORES // scores) // length
    if verbs.layout.most_new_rows:
        most = min(most, verbs.layout.most_new_rows)
    most = max(1, most // num_shards)
    tables = pieces[0].table is not None
    no_table = np.zeros_like(pieces[0].table) if tables else None
    nothing = Piece(0, np.zeros(0, np.int32), 0, 0, 0, 0, no_table)
    for entries in in_shards([(piece.shard, piece) for piece in pieces], num_shards, most):
        found = [entry or nothing for entry in entries]
        tokens = np.zeros((len(found), length), np.int32)
        for row, piece in zip(tokens, found, strict=True):
            row[: len(piece.tokens)] = piece.tokens
        count = np.array([len(piece.tokens) for piece in found], np.int32)
        at, first, row, prefix_row = (
            np.array([getattr(piece, name) for piece in found], np.int32)
            for name in ("at", "first", "row", "prefix_row")
        )
        table, target = None, row
        if tables:
            table = np.stack([piece.table for piece in found])
            target = table[np.arange(len(found)), at // row_columns]
        chunks = Chunks(tokens, count, at, first, row, prefix_row, table)
        kv = chunk(verbs, params, prefix, past, chunks)
        places = np.arange(len(found), dtype=np.int32)
        # A past row holds the whole past, a page the columns from a multiple of its length on.
        past = put(verbs, past, kv, Copies(target, places, 0 * row, at % row_columns, count, row))
    return past


def _stacked(entries, nothing: Copies) -> Copies:
    columns = zip(*(entry or nothing for entry in entries), strict=True)
    return Copies(*(np.array(column, np.int32) for column in columns))
