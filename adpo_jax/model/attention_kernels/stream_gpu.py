"""Attention over packed streams and rows for GPUs in Triton, with gradients: no scores in memory.

A program is a block of queries of one head (forward, their gradient), or a tile of keys of one
key/value head with some of the queries that see it (their gradient). It walks the list of tiles
that see each other with a running softmax (Dao et al. 2022, arXiv 2205.14135). Tiles of which every
pair of tokens sees each other come first in a list and need no mask. Many completions see the tiles
of their prompt, so the list of a key tile is cut into chunks, whose sums are added by a second
kernel, in order: the same numbers every time. The plain version is
`tile_attention.stream_attention`.

Letters: B streams, N tokens of one, n tiles, L keys, m tiles of them, W tokens of a tile, J listed
key tiles, H heads, K key/value heads, R = H / K, D head dim, S tokens of a block, M chunks.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl

from adpo_jax.model.attention import MASKED, LayerInfo, Places, visible
from adpo_jax.model.tile_attention import Saved, Stream
from adpo_jax.model.triton import plt

# The smallest side of a matrix product on tensor cores.
LEAST_BLOCK = 16
# Above it a block of keys, values and their gradients does not fit the registers.
MAX_HEAD_DIM = 128
# Query tiles of a chunk.
CHUNK = 16
# Places of a tile of rows that are padded to tiles.
ROW_TILE = 128
LOG2_E = math.log2(math.e)


class Shape(NamedTuple):
    """How a kernel is cut: tokens of a block on either side, warps, stages of its pipeline."""

    mine: int
    theirs: int
    warps: int
    stages: int


# Each the fastest of eight or more on an H200.
FORWARD = Shape(64, 64, 4, 3)
OF_QUERIES = Shape(64, 64, 4, 2)
OF_KEYS = Shape(64, 64, 4, 2)


class Kernels(NamedTuple):
    """The kernels that one rule of gradients runs.

    Attributes:
      forward: (static, q, k, v, places, lists, window) -> out [B, N, H, D], log2 of the normaliser
        [B, H, N] float32.
      gradients: (static, q, k, v, places, lists, window, d_out, log_z, mean) -> d_q, d_k, d_v; mean
        [B, H, N] float32 is the product of d_out and out.
    """

    forward: Callable
    gradients: Callable


@dataclasses.dataclass(frozen=True)
class Static:
    """Static settings of the kernels.

    Attributes:
      tile: W.
      windows: whether a layer may have a window.
    """

    scale: float
    soft_cap: float | None
    tile: int
    windows: bool
    interpret: bool
    kernels: Kernels

    @classmethod
    def of(
        cls, stream: Stream, scale, soft_cap=None, windows=True, interpret=False, kernels=None
    ) -> "Static":
        kernels = kernels or Kernels(_run_forward, _run_gradients)
        return cls(scale, soft_cap, stream.tile, windows, interpret, kernels)

    def blocks(self, shape: Shape) -> Shape:
        """A shape whose blocks divide a tile."""
        return shape._replace(
            mine=math.gcd(self.tile, shape.mine), theirs=math.gcd(self.tile, shape.theirs)
        )


class Lists(NamedTuple):
    """Which tiles see each other, sorted for the kernels; those that need no mask come first.

    Attributes:
      keys: [B, n, J] int32, the key tiles of each query tile, and `key_counts` [B, n, 2] int32: how
        many need no mask, and how many there are.
      queries: [B, m, n] int32, the query tiles of each key tile, and `query_counts` [B, m, 2].
      chunks: [B, M, 2] int32, the key tile of a chunk, -1 for none, and its first place in
        `queries`.
      sums: [B, m, 2] int32, the first chunk of a key tile, and how many it has.
      order: [B, n] int32, the query tiles, those that see most tiles first.
    """

    keys: jax.Array
    key_counts: jax.Array
    queries: jax.Array
    query_counts: jax.Array
    chunks: jax.Array
    sums: jax.Array
    order: jax.Array


def obstacle(head_dim: int) -> str:
    """Why the kernel cannot run heads of this size, or not under this jax; empty where it can."""
    if plt is None:
        return f"needs Pallas' Triton backend, which jax {jax.__version__} does not have"
    if head_dim & (head_dim - 1) or not LEAST_BLOCK <= head_dim <= MAX_HEAD_DIM:
        return (
            f"needs a head_dim that is a power of two from {LEAST_BLOCK} to {MAX_HEAD_DIM}; given "
            f"{head_dim}"
        )
    return ""


def limit(num_tokens: int, num_tiles: int) -> str:
    """Why tiles of this size cannot be run; empty if they can."""
    tile = num_tokens // num_tiles
    if tile % LEAST_BLOCK:
        return f"needs tiles of a multiple of {LEAST_BLOCK} tokens; given {tile}"
    return ""


def lists_of(stream: Stream, *, windows: bool = False) -> Lists:
    """The lists of a stream, which are the same for all layers.

    Args:
      windows: whether a layer may have a window; then every tile needs its mask.
    """
    (n, J), m = stream.key_tiles.shape[1:], stream.num_key_tiles
    tile = jnp.arange(m, dtype=jnp.int32)
    seen_Bqk = jnp.any(stream.key_tiles[..., None] == tile, axis=2)
    free_Bqk = jnp.zeros_like(seen_Bqk) if windows else seen_Bqk & _unmasked(stream)
    rank = jnp.where(free_Bqk, 0, jnp.where(seen_Bqk, 1, 2))
    keys = jnp.argsort(rank, axis=2, stable=True)[..., :J].astype(jnp.int32)
    queries = jnp.argsort(rank, axis=1, stable=True).swapaxes(1, 2).astype(jnp.int32)

    def counts(axis):
        found = [jnp.sum(x, axis=axis, dtype=jnp.int32) for x in (free_Bqk, seen_Bqk)]
        return jnp.stack(found, axis=-1)

    key_counts, query_counts = counts(2), counts(1)
    chunks_Bm = -(-query_counts[..., 1] // CHUNK)
    ends_Bm = jnp.cumsum(chunks_Bm, axis=1, dtype=jnp.int32)
    starts_Bm = ends_Bm - chunks_Bm
    chunk = jnp.arange(m + n * J // CHUNK, dtype=jnp.int32)
    of_BM = jnp.sum(ends_Bm[:, None] <= chunk[:, None], axis=2, dtype=jnp.int32)
    first = (chunk - jnp.take_along_axis(starts_Bm, jnp.minimum(of_BM, m - 1), axis=1)) * CHUNK
    chunks = jnp.stack([jnp.where(of_BM < m, of_BM, -1), first], axis=-1)
    sums = jnp.stack([starts_Bm, chunks_Bm], axis=-1)
    order = jnp.argsort(-key_counts[..., 1], axis=1, stable=True).astype(jnp.int32)
    return Lists(keys, key_counts, queries, query_counts, chunks, sums, order)


def _unmasked(stream: Stream) -> jax.Array:
    """[B, n, m] bool: every token of a query tile sees every token of a key tile."""

    def ends(x_BN):
        x = x_BN.reshape(len(x_BN), -1, stream.tile)
        return jnp.min(x, axis=2), jnp.max(x, axis=2)

    def one(x_BN):
        least, most = ends(x_BN)
        return jnp.where(least == most, least, -1)

    segment, prompt, keys = one(stream.segments), one(stream.prompts), stream.key_tokens
    key_segments = one(keys.segments)[:, None]
    same = (segment[..., None] == key_segments) | (prompt[..., None] == key_segments)
    alone = (segment > 0)[..., None] & (key_segments > 0)
    first_query, _ = ends(stream.positions)
    _, last_key = ends(keys.positions)
    return same & alone & (last_key[:, None] <= first_query[..., None])


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    layer: LayerInfo,
    stream: Stream,
    lists: Lists | None = None,
    *,
    scale: float,
    soft_cap: float | None = None,
    windows: bool = True,
    interpret: bool = False,
    kernels: Kernels | None = None,
) -> jax.Array:
    """Attention of the tokens of a stream to its keys, 0 at padding.

    Args:
      q: [B, N, H, D], not scaled; k, v: [B, m W, K, D].
      lists: `lists_of(stream, windows=windows)`, made once for all layers.
      windows: whether a layer may have a window.
      kernels: which ones run; None for those of this module.

    Returns:
      [B, N, H, D] in the dtype of q.
    """
    lists = lists_of(stream, windows=windows) if lists is None else lists
    static = Static.of(stream, scale, soft_cap, windows, interpret, kernels)
    places = _places(layer, stream, lists)
    return _attention(static, q, k, v, *places, layer.sinks)


def forward(q, k, v, layer: LayerInfo, stream: Stream, lists: Lists, **settings) -> Saved:
    """What `attend` gives without sinks, and what it keeps; `settings` as there."""
    static = Static.of(stream, **settings)
    places = _places(layer, stream, lists)
    out, log_z = static.kernels.forward(static, q, k, v, *places)
    return Saved(out, _in_units(log_z, 1 / LOG2_E))


def gradients(
    q, k, v, layer: LayerInfo, stream: Stream, lists: Lists, saved: Saved, d_out, **settings
):
    """Those of q, k and v, where `saved` may be of more keys than these; `settings` as `attend`."""
    static = Static.of(stream, **settings)
    places = _places(layer, stream, lists)
    mean_BHN = _mean(saved.out, d_out)
    d_out = d_out.astype(saved.out.dtype)
    log_z = _in_units(saved.log_z, LOG2_E)
    return static.kernels.gradients(static, q, k, v, *places, d_out, log_z, mean_BHN)


def _in_units(log_z, factor: float):
    """Logs to another base. Those of queries that see nothing stay what masked scores are."""
    return jnp.where(log_z > MASKED / 2, log_z * factor, MASKED)


def _places(layer: LayerInfo, stream: Stream, lists: Lists) -> tuple:
    """What kernels take of where tokens lie: places, lists, window."""
    window = jnp.reshape(jnp.asarray(layer.window, jnp.int32), (1,))
    return (*stream.tokens, *stream.key_tokens[:2]), lists, window


def _mean(out_BNHD, d_out_BNHD):
    """[B, H, N] float32, the product of results and their gradients."""
    product = d_out_BNHD.astype(jnp.float32) * out_BNHD.astype(jnp.float32)
    return jnp.swapaxes(jnp.sum(product, axis=-1), 1, 2)


def rows_as_stream(
    positions: jax.Array, segments: jax.Array, *, least: int = LEAST_BLOCK
) -> Stream:
    """Rows [B, T] as streams whose length is a multiple of `ROW_TILE`; a tile lists those before.

    Args:
      positions, segments: int32, as in `Places`.
      least: the least tokens of a tile, of rows that are shorter than `ROW_TILE`.
    """
    B, T = positions.shape
    tile = ROW_TILE if T >= ROW_TILE else max(least, 1 << (T - 1).bit_length())
    positions, segments = (padded(x, -T % tile) for x in (positions, segments))
    tiles = np.arange(positions.shape[1] // tile, dtype=np.int32)
    lists = np.where(tiles <= tiles[:, None], tiles, -1)
    return Stream(positions, segments, segments, jnp.broadcast_to(lists, (B, *lists.shape)))


def padded(x: jax.Array, more: int) -> jax.Array:
    """An array with so many more zeros behind its second axis."""
    return jnp.pad(x, ((0, 0), (0, more)) + ((0, 0),) * (x.ndim - 2))


def _tokens(refs, b, first, size: int, axis: int) -> Places:
    """The `size` tokens from `first` on, along an axis of two."""
    shape = (size, 1) if axis == 0 else (1, size)
    found = (plt.load(ref.at[b, pl.ds(first, size)]) for ref in refs)
    return Places(*(x.reshape(shape) for x in found))


def capped(static: Static, products):
    """Scores as powers of two from products of queries and keys, and the slope of the soft cap."""
    if static.soft_cap is None:
        return products * (static.scale * LOG2_E), 1.0
    tanh = 2 / (1 + jnp.exp2(products * (-2 * LOG2_E * static.scale / static.soft_cap))) - 1
    return (static.soft_cap * LOG2_E) * tanh, 1.0 - tanh * tanh


def _rows(ref, b, first, size, head):
    return plt.load(ref.at[b, pl.ds(first, size), head, slice(None)])


def _walk(static: Static, counts, blocks: int, visit, carry):
    """Runs `visit(masked, j, carry)` over the blocks of tiles, those that need no mask first."""
    free, all_of_them = counts
    if not static.windows:
        turns = free * blocks
        carry = jax.lax.fori_loop(0, turns, functools.partial(visit, False), carry)
    else:
        turns = free * 0
    return jax.lax.fori_loop(turns, all_of_them * blocks, functools.partial(visit, True), carry)


def _seen(static, queries: Places, keys: Places, window):
    return visible(queries, keys, window[0] if static.windows else None)


def _forward_kernel(static, shape, R, *refs):
    tiles, counts, window, *places, q, k, v, out, log_z = refs
    b, h, i = pl.program_id(2), pl.program_id(1), pl.program_id(0)
    S, T, blocks = shape.mine, shape.theirs, static.tile // shape.theirs
    first = i * S
    tile, head = jax.lax.div(first, static.tile), jax.lax.div(h, R)
    places, key_places = places[:3], places[3:]
    query, queries = _rows(q, b, first, S, h), _tokens(places, b, first, S, 0)

    def visit(masked, j, carry):
        total_out, top, total = carry
        at = tiles[b, tile, jax.lax.div(j, blocks)] * static.tile + jax.lax.rem(j, blocks) * T
        scores, _ = capped(static, plt.dot(query, _rows(k, b, at, T, head), trans_b=True))
        if masked:
            seen = _seen(static, queries, _tokens(key_places, b, at, T, 1), window)
            scores = jnp.where(seen, scores, MASKED)
        new_top = jnp.maximum(top, jnp.max(scores, axis=1))
        weights = jnp.exp2(scores - new_top[:, None])
        if masked:
            weights = jnp.where(seen, weights, 0.0)
        shrink = jnp.exp2(top - new_top)
        added = plt.dot(weights.astype(v.dtype), _rows(v, b, at, T, head))
        total = total * shrink + jnp.sum(weights, axis=1)
        return total_out * shrink[:, None] + added, new_top, total

    start = (
        jnp.zeros(query.shape, jnp.float32),
        jnp.full((S,), MASKED, jnp.float32),
        jnp.zeros((S,), jnp.float32),
    )
    tile_counts = counts[b, tile, 0], counts[b, tile, 1]
    total_out, top, total = _walk(static, tile_counts, blocks, visit, start)
    total = jnp.where(total > 0, total, 1.0)  # padding sees nothing
    plt.store(
        out.at[b, pl.ds(first, S), h, slice(None)], (total_out / total[:, None]).astype(out.dtype)
    )
    plt.store(log_z.at[b, h, pl.ds(first, S)], top + jnp.log2(total))


def _query_kernel(static, shape, R, *refs):
    tiles, counts, window, *places, q, k, v, d_out, log_z, mean, d_q = refs
    b, h, i = pl.program_id(2), pl.program_id(1), pl.program_id(0)
    S, T, blocks = shape.mine, shape.theirs, static.tile // shape.theirs
    first = i * S
    tile, head = jax.lax.div(first, static.tile), jax.lax.div(h, R)
    places, key_places = places[:3], places[3:]
    query, queries = _rows(q, b, first, S, h), _tokens(places, b, first, S, 0)
    d_rows, at_query = _rows(d_out, b, first, S, h), (b, h, pl.ds(first, S))
    z, m = plt.load(log_z.at[at_query])[:, None], plt.load(mean.at[at_query])[:, None]

    def visit(masked, j, grad):
        at = tiles[b, tile, jax.lax.div(j, blocks)] * static.tile + jax.lax.rem(j, blocks) * T
        key = _rows(k, b, at, T, head)
        scores, slope = capped(static, plt.dot(query, key, trans_b=True))
        weights = jnp.exp2(scores - z)
        if masked:
            seen = _seen(static, queries, _tokens(key_places, b, at, T, 1), window)
            weights = jnp.where(seen, weights, 0.0)
        d_weights = plt.dot(d_rows, _rows(v, b, at, T, head), trans_b=True)
        d_scores = weights * (d_weights - m) * slope
        return grad + plt.dot(d_scores.astype(key.dtype), key)

    tile_counts = counts[b, tile, 0], counts[b, tile, 1]
    grad = _walk(static, tile_counts, blocks, visit, jnp.zeros(query.shape, jnp.float32))
    here = (b, pl.ds(first, S), h, slice(None))
    plt.store(d_q.at[here], (grad * static.scale).astype(d_q.dtype))


def _key_kernel(static, shape, R, *refs):
    tiles, counts, chunks, window, *all_places, q, k, v, d_out, log_z, mean, d_k, d_v = refs
    b, head, i = pl.program_id(2), pl.program_id(1), pl.program_id(0)
    S, T, blocks = shape.mine, shape.theirs, static.tile // shape.theirs
    part = static.tile // S
    chunk, row = jax.lax.div(i, part), jax.lax.rem(i, part) * S
    tile, place = chunks[b, chunk, 0], chunks[b, chunk, 1]

    @pl.when(tile >= 0)
    def _():
        first = tile * static.tile + row
        key, value = _rows(k, b, first, S, head), _rows(v, b, first, S, head)
        places, key_places = all_places[:3], all_places[3:]
        keys = _tokens(key_places, b, first, S, 0)

        def add_head(r, grads):
            h = head * R + r

            def visit(masked, j, grads):
                """A block of queries; keys down the rows, queries along."""
                grad_k, grad_v = grads
                listed = tiles[b, tile, place + jax.lax.div(j, blocks)]
                at = listed * static.tile + jax.lax.rem(j, blocks) * T
                query, d_rows = _rows(q, b, at, T, h), _rows(d_out, b, at, T, h)
                scores, slope = capped(static, plt.dot(key, query, trans_b=True))
                at_query = (b, h, pl.ds(at, T))
                z, m = plt.load(log_z.at[at_query])[None, :], plt.load(mean.at[at_query])[None, :]
                weights = jnp.exp2(scores - z)
                if masked:
                    seen = _seen(static, _tokens(places, b, at, T, 1), keys, window)
                    weights = jnp.where(seen, weights, 0.0)
                grad_v = grad_v + plt.dot(weights.astype(d_rows.dtype), d_rows)
                d_weights = plt.dot(value, d_rows, trans_b=True)
                d_scores = weights * (d_weights - m) * slope
                return grad_k + plt.dot(d_scores.astype(query.dtype), query), grad_v

            free, listed = (jnp.clip(counts[b, tile, c] - place, 0, CHUNK) for c in range(2))
            return _walk(static, (free, listed), blocks, visit, grads)

        zeros = jnp.zeros(key.shape, jnp.float32)
        grad_k, grad_v = jax.lax.fori_loop(0, R, add_head, (zeros, zeros))
        here = (b, chunk, head, pl.ds(row, S), slice(None))
        plt.store(d_k.at[here], grad_k * static.scale)
        plt.store(d_v.at[here], grad_v)


def _sum_kernel(static, S, whole, *refs):
    """Adds the chunks of a tile; tiles of one chunk are left alone where results are `whole`."""
    sums, parts_k, parts_v, *_, d_k, d_v = refs
    b, head, i = pl.program_id(2), pl.program_id(1), pl.program_id(0)
    part = static.tile // S
    tile, row = jax.lax.div(i, part), jax.lax.rem(i, part) * S
    start, count = sums[b, tile, 0], sums[b, tile, 1]

    @pl.when((count != 1) | (not whole))
    def _():
        for parts, grad in ((parts_k, d_k), (parts_v, d_v)):

            def add(j, total, parts=parts):
                return total + plt.load(parts.at[b, start + j, head, pl.ds(row, S), slice(None)])

            zeros = jnp.zeros((S, grad.shape[-1]), jnp.float32)
            total = jax.lax.fori_loop(0, count, add, zeros)
            here = (b, pl.ds(i * S, S), head, slice(None))
            plt.store(grad.at[here], total.astype(grad.dtype))


def _call(static, kernel, shape, grid, inputs, out_shape, name, aliases=None):
    whole = pl.BlockSpec(memory_space=pl.ANY)
    return pl.pallas_call(
        kernel,
        grid=grid,
        in_specs=[whole] * len(inputs),
        out_specs=[whole] * len(out_shape),
        out_shape=out_shape,
        compiler_params=plt.CompilerParams(num_warps=shape.warps, num_stages=shape.stages),
        input_output_aliases=aliases or {},
        interpret=static.interpret,
        name=name,
    )(*inputs)


def like(x):
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(static: Static, q_BNHD, k_BLKD, v_BLKD, places, lists: Lists, window, sinks_H):
    return _forward(static, q_BNHD, k_BLKD, v_BLKD, places, lists, window, sinks_H)[0]


def _beside_sinks(out_BNHD, log_z_BHN, sinks_H):
    """The results where each head has a sink too, whose value is 0."""
    whole_BHN = jnp.logaddexp2(log_z_BHN, sinks_H[:, None])
    share = jnp.swapaxes(jnp.exp2(log_z_BHN - whole_BHN), 1, 2)[..., None]
    return (out_BNHD * share).astype(out_BNHD.dtype), whole_BHN


def _in_base_two(sinks_H):
    return sinks_H.astype(jnp.float32) * LOG2_E


def _run_forward(static: Static, q_BNHD, k_BLKD, v_BLKD, places, lists: Lists, window):
    B, N, H, _ = q_BNHD.shape
    shape = static.blocks(FORWARD)
    return _call(
        static,
        functools.partial(_forward_kernel, static, shape, H // k_BLKD.shape[2]),
        shape,
        (N // shape.mine, H, B),
        [lists.keys, lists.key_counts, window, *places, q_BNHD, k_BLKD, v_BLKD],
        [like(q_BNHD), jax.ShapeDtypeStruct((B, H, N), jnp.float32)],
        "stream_attention",
    )


def _forward(static: Static, q_BNHD, k_BLKD, v_BLKD, places, lists: Lists, window, sinks_H):
    out, log_z = static.kernels.forward(static, q_BNHD, k_BLKD, v_BLKD, places, lists, window)
    if sinks_H is not None:
        out, log_z = _beside_sinks(out, log_z, _in_base_two(sinks_H))
    out, log_z = checkpoint_name((out, log_z), "attention")
    return out, (q_BNHD, k_BLKD, v_BLKD, places, lists, window, sinks_H, out, log_z)


def _run_gradients(
    static: Static, q_BNHD, k_BLKD, v_BLKD, places, lists: Lists, window, d_out_BNHD, log_z, mean
):
    B, N, H, D = q_BNHD.shape
    K, M = k_BLKD.shape[2], lists.chunks.shape[1]
    tensors = [q_BNHD, k_BLKD, v_BLKD, d_out_BNHD, log_z, mean]
    shape = static.blocks(OF_QUERIES)
    (d_q,) = _call(
        static,
        functools.partial(_query_kernel, static, shape, H // K),
        shape,
        (N // shape.mine, H, B),
        [lists.keys, lists.key_counts, window, *places, *tensors],
        [like(q_BNHD)],
        "stream_attention_d_query",
    )
    shape = static.blocks(OF_KEYS)
    part = jax.ShapeDtypeStruct((B, M, K, static.tile, D), jnp.float32)
    parts = _call(
        static,
        functools.partial(_key_kernel, static, shape, H // K),
        shape,
        (M * (static.tile // shape.mine), K, B),
        [lists.queries, lists.query_counts, lists.chunks, window, *places, *tensors],
        [part, part],
        "stream_attention_d_key",
    )
    return d_q, *sum_of_parts(static, lists, *parts, like(k_BLKD), like(v_BLKD))


def sum_of_parts(static: Static, lists: Lists, parts_k, parts_v, like_k, like_v, *, whole=False):
    """The gradients of keys and values, from the sums of chunks.

    Args:
      parts_k, parts_v: [B, M, K, W, D] float32.
      like_k, like_v: shapes and dtypes of the results; where they are `whole`, arrays in which the
        tiles that have one chunk alone are there already.
    """
    B, L, K, _ = like_k.shape
    S = math.gcd(static.tile, 32)
    inputs = [lists.sums, parts_k, parts_v, *((like_k, like_v) if whole else ())]
    return _call(
        static,
        functools.partial(_sum_kernel, static, S, whole),
        Shape(S, S, 4, 1),
        (L // S, K, B),
        inputs,
        [like(like_k), like(like_v)],
        "stream_attention_d_key_sum",
        {3: 0, 4: 1} if whole else {},
    )


def _backward(static: Static, residuals, d_out_BNHD):
    *inputs, sinks_H, out_BNHD, log_z = residuals
    mean = _mean(out_BNHD, d_out_BNHD)
    d_out_BNHD = d_out_BNHD.astype(out_BNHD.dtype)
    d_q, d_k, d_v = static.kernels.gradients(static, *inputs, d_out_BNHD, log_z, mean)
    d_sinks = None
    if sinks_H is not None:
        shares = jnp.exp2(_in_base_two(sinks_H)[:, None] - log_z)
        d_sinks = -jnp.sum(shares * mean, axis=(0, 2)).astype(sinks_H.dtype)
    return d_q, d_k, d_v, None, None, None, d_sinks


_attention.defvjp(_forward, _backward)
