"""Attention over a packed stream in tiles: each tile of queries sees a short list of key tiles.

A stream holds many segments side by side: prompts, and completions that also see the prompt of
their group. The list of a query tile names the tiles that hold the segments of its tokens and their
prompts. Keys are gathered and scores are made for listed tiles alone, with one softmax over prompt
and completion. Scores are not kept: the backward pass makes them again from the log of the
normaliser (Dao et al. 2022, arXiv 2205.14135). So a layer keeps queries, keys, values, results and
that log, which are linear in the length of the stream.

Letters: B streams, N tokens of one, n tiles, m tiles of keys (n, where queries and keys are the
same tokens), W tokens of a tile, J listed key tiles, S = J W keys, c query tiles at once, H heads,
K key/value heads, R = H / K, Q = R W, D head dim.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from adpo_jax.model.attention import MASKED, Attend, LayerInfo, Places, by_kv_head, visible
from adpo_jax.model.cpu import made, sum_of_columns

# The most bytes of scores that are made at once; further tiles run afterwards. A CPU has a smaller
# limit, by which scores stay in its cache: a third less time for long prompts. An accelerator wants
# much work at once.
SCORE_BYTES = 256 * 2**20
CACHED_SCORE_BYTES = 4 * 2**20

# The most bytes of a mask of all tiles, which is made once for all layers that see alike. A larger
# one is made tile by tile, with the scores.
MASK_BYTES = 16 * 2**20

# From so many tiles of keys on, a CPU adds up their gradients tile by tile: 0.9 ms for 512 listed
# of 528 tiles, where a product with a 0/1 matrix takes 6 (64 tokens of 2 x 16 numbers, one core).
MANY_TILES = 256

# The name of the results for `jax.checkpoint`.
SAVED = "plain_attention"


class Stream(NamedTuple):
    """The place of each token of a packed stream.

    Attributes:
      positions: [B, N] int32, its position in its sequence; a completion counts on from its prompt.
      segments: [B, N] int32, the prompt or completion that it is part of; 0 is padding.
      prompts: [B, N] int32, the segment of the prompt that it sees besides its own segment.
      key_tiles: [B, n, J] int32, the key tiles of each query tile; -1 for none.
      keys: the tokens [B, m W] of which the tiles of keys consist, where they are others than these
        queries: a device may have a share of a stream's queries. None for the same tokens.
    """

    positions: jax.Array
    segments: jax.Array
    prompts: jax.Array
    key_tiles: jax.Array
    keys: Places | None = None

    @property
    def tokens(self) -> Places:
        return Places(self.positions, self.segments, self.prompts)

    @property
    def key_tokens(self) -> Places:
        return self.tokens if self.keys is None else self.keys

    @property
    def tile(self) -> int:
        """W."""
        return self.positions.shape[1] // self.key_tiles.shape[1]

    @property
    def num_key_tiles(self) -> int:
        """m."""
        return self.key_tokens.positions.shape[1] // self.tile


class _Seen(NamedTuple):
    """What tiles of queries see.

    Attributes:
      tiles: [B, n, J] int32, listed tiles of keys; -1 for none.
      mask: [B, n, W, S] bool, who sees whom; None where `queries` say it.
      queries: tokens [B, n, W, 1], with `window` [B, n, W, 1] int32, or a number for all; None
        where there is a mask.
    """

    tiles: jax.Array
    mask: jax.Array | None = None
    queries: Places | None = None
    window: jax.Array | None = None

    @property
    def listed(self) -> jax.Array:
        """Tiles to gather; any where none is listed."""
        return jnp.maximum(self.tiles, 0)

    def masked(self, keys: Places) -> jax.Array:
        """The mask [B, n, W, S] by the tokens [B, m, W] of all keys."""
        if self.mask is not None:
            return self.mask
        B, n, J = self.tiles.shape
        W = keys.positions.shape[-1]
        keys = jax.tree.map(lambda x: _gather(x, self.listed).reshape(B, n, 1, J * W), keys)
        is_listed = jnp.repeat(self.tiles >= 0, W, axis=2)[:, :, None]
        return visible(self.queries, keys, self.window) & is_listed


@dataclasses.dataclass(frozen=True)
class _Shape:
    """Static settings of the kernel."""

    scale: float
    soft_cap: float | None
    chunk: int  # tiles of a stream whose scores are alive at once
    tile_by_tile: bool


def stream_attention(stream: Stream, **settings) -> Attend:
    """Attention of a packed stream to itself, for the training forward.

    Args:
      settings: as of `StreamAttention`.
    """
    return StreamAttention(stream, **settings).attend


class Saved(NamedTuple):
    """What a backward pass needs of a forward pass besides its inputs.

    Attributes:
      out: [B, N, H, D], the results.
      log_z: [B, H, N] float32, the log of the softmax's normaliser.
    """

    out: jax.Array
    log_z: jax.Array


class StreamAttention:
    """Attention of a packed stream to its keys, and its two passes each alone.

    Args:
      windows: whether any layer has a window or chunks; else all layers see alike.
      score_bytes: the most bytes of scores that are alive at once, on all devices together.
      mask_bytes: the most bytes of a mask that is made for all tiles at once.
      tile_by_tile: whether gradients of keys are added up in a loop over the listed tiles, on one
        device; else by a product with a 0/1 matrix, which the partitioner can split.
    """

    def __init__(
        self,
        stream: Stream,
        *,
        scale: float,
        soft_cap: float | None = None,
        windows: bool = False,
        score_bytes: int = SCORE_BYTES,
        mask_bytes: int = MASK_BYTES,
        tile_by_tile: bool = False,
    ):
        B, N = stream.positions.shape
        n, J = stream.key_tiles.shape[1:]
        W, m = stream.tile, stream.num_key_tiles
        queries = jax.tree.map(lambda x: x.reshape(B, n, W, 1), stream.tokens)
        self._keys = Places(*(x.reshape(B, m, W) for x in stream.key_tokens[:2]))
        self._causal = _Seen(stream.key_tiles, queries=queries)
        if not windows and mask_bytes >= B * N * J * W:
            self._causal = _Seen(stream.key_tiles, self._causal.masked(self._keys))
        self._queries, self._windows = queries, windows
        self._sizes, self._score_bytes = (B, n, W, m, J), score_bytes
        self._scale, self._soft_cap, self._tile_by_tile = scale, soft_cap, tile_by_tile

    def attend(self, q, k, v, layer: LayerInfo, cache):
        sinks = None
        if layer.sinks is not None:
            W, K = self._sizes[2], k.shape[2]
            sinks = jnp.repeat(by_kv_head(layer.sinks, K), W, axis=1)
        tensors = self._query_tiles(q, k), self._key_tiles(k), self._key_tiles(v)
        out = _attention(self._shape(q), *tensors, self._seen(layer), self._keys, sinks)
        return self._in_heads(out), cache

    def forward(self, q, k, v, layer: LayerInfo) -> Saved:
        """The results without sinks. Of a query that sees no key `log_z` is about `MASKED`."""
        B, n, W, *_ = self._sizes
        tensors = self._query_tiles(q, k), self._key_tiles(k), self._key_tiles(v)
        out, (*_, log_z) = _forward(self._shape(q), *tensors, self._seen(layer), self._keys, None)
        log_z = log_z.reshape(B, n, -1, W).swapaxes(1, 2).reshape(B, -1, n * W)
        return Saved(self._in_heads(out), log_z)

    def gradients(self, q, k, v, layer: LayerInfo, saved: Saved, d_out):
        """Those of q, k and v, where `saved` may be of more keys than these."""
        B, n, W, *_ = self._sizes
        K = k.shape[2]
        log_z = saved.log_z.reshape(B, -1, n, W).swapaxes(1, 2).reshape(B, n, K, -1, 1)
        tensors = self._query_tiles(q, k), self._key_tiles(k), self._key_tiles(v)
        out, d_out = self._query_tiles(saved.out, k), self._query_tiles(d_out, k)
        residuals = *tensors, self._seen(layer), self._keys, None, out, log_z
        d_q, d_k, d_v, *_ = _backward(self._shape(q), residuals, d_out)
        return self._in_heads(d_q), d_k.reshape(k.shape), d_v.reshape(v.shape)

    def _shape(self, q) -> _Shape:
        B, n, W, _, J = self._sizes
        chunk = _even_chunk(n, at_most=self._score_bytes // (4 * B * q.shape[2] * W * J * W))
        return _Shape(self._scale, self._soft_cap, chunk, self._tile_by_tile)

    def _seen(self, layer: LayerInfo) -> _Seen:
        if not self._windows:
            return self._causal
        B, n, W, *_ = self._sizes
        window = jnp.broadcast_to(layer.window_at(self._queries.positions), (B, n, W, 1))
        return self._causal._replace(window=window)

    def _query_tiles(self, x_BNHD, k):
        """[B, n, K, R W, D], so that every product is a plain batch of matrices."""
        B, n, W, *_ = self._sizes
        (H, D), K = x_BNHD.shape[2:], k.shape[2]
        x = x_BNHD.reshape(B, n, W, K, H // K, D).transpose(0, 1, 3, 4, 2, 5)
        return x.reshape(B, n, K, H // K * W, D)

    def _key_tiles(self, x):
        B, _, W, m, _ = self._sizes
        return x.reshape(B, m, W, *x.shape[2:])

    def _in_heads(self, x_BnKQD):
        """[B, N, H, D] from `_query_tiles`."""
        B, n, W, *_ = self._sizes
        K, D = x_BnKQD.shape[2], x_BnKQD.shape[-1]
        x = x_BnKQD.reshape(B, n, K, -1, W, D).transpose(0, 1, 4, 2, 3, 5)
        return x.reshape(B, n * W, -1, D)


def _even_chunk(n: int, at_most: int) -> int:
    """How many of n tiles to run at once, so that the last chunk needs little padding."""
    if at_most >= n:
        return n
    at_most = max(at_most, 1)
    return min(range(at_most // 2 + 1, at_most + 1), key=lambda chunk: (-n % chunk, -chunk))


def _gather(x_BmZ, tiles_BcJ):
    """[B, m, ...] -> [B, c, J, ...], the listed tiles."""
    return jax.vmap(lambda x, tiles: jnp.take(x, tiles, axis=0))(x_BmZ, tiles_BcJ)


def _listed(x_BmWKD, tiles_BcJ):
    """The keys or values that tiles of queries see, [B, c, K, S, D]."""
    x = _gather(x_BmWKD, tiles_BcJ)
    B, c, J, W, K, D = x.shape
    return x.reshape(B, c, J * W, K, D).swapaxes(2, 3)


def _with_unlisted(sums_BmWKD, g_BcKSD, tiles_BcJ, tile_by_tile: bool):
    """Sums in float32, and the gradient of `_listed` added to them."""
    m = sums_BmWKD.shape[1]
    B, c, J = tiles_BcJ.shape
    K, S, D = g_BcKSD.shape[2:]
    if tile_by_tile:
        listed = g_BcKSD.swapaxes(2, 3).reshape(B * c * J, -1).astype(jnp.float32)
        tiles = (tiles_BcJ + m * jnp.arange(B)[:, None, None]).reshape(-1)

        def add(i, sums):
            own = jax.lax.dynamic_slice_in_dim(sums, tiles[i], 1) + listed[i]
            return jax.lax.dynamic_update_slice_in_dim(sums, own, tiles[i], 0)

        sums = jax.lax.fori_loop(0, len(tiles), add, sums_BmWKD.reshape(B * m, -1))
        return sums.reshape(sums_BmWKD.shape)
    used = jax.nn.one_hot(tiles_BcJ.reshape(B, c * J), m, axis=1, dtype=g_BcKSD.dtype)
    flat = g_BcKSD.swapaxes(2, 3).reshape(B, c * J, S // J * K * D)
    summed = jnp.einsum(
        "bmj,bjz->bmz",
        used,
        flat,
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    return sums_BmWKD + summed.reshape(sums_BmWKD.shape)


def _scores(shape: _Shape, q_BcKQD, k_BcKSD, mask_BcWS):
    """Masked scores [B, c, K, R W, S] float32, and the derivative of the soft cap (or 1)."""
    B, c, _, Q, _ = q_BcKQD.shape
    W, S = mask_BcWS.shape[2:]
    scores = jnp.einsum("bckqd,bcksd->bckqs", q_BcKQD, k_BcKSD, preferred_element_type=jnp.float32)
    slope = 1.0
    if shape.soft_cap is not None:
        capped = jnp.tanh(scores / shape.soft_cap)
        scores, slope = shape.soft_cap * capped, 1.0 - jnp.square(capped)
    # The mask is added: for a choice a CPU would write the constant out once for each score.
    bias = jnp.where(mask_BcWS, 0.0, MASKED)[:, :, None]
    bias = jnp.broadcast_to(bias, (B, c, Q // W, W, S)).reshape(B, c, 1, Q, S)
    return scores + bias, slope


def _in_chunks(shape: _Shape, function, carry, *tiles):
    """Runs `function(carry, *chunk) -> (carry, results)` over chunks of the second axis.

    Args:
      tiles: pytrees of arrays [B, n, ...].
    """
    n = tiles[0].shape[1]
    if shape.chunk >= n:
        return function(carry, *tiles)
    chunks = -(-n // shape.chunk)
    pad = chunks * shape.chunk - n

    def split(x):
        x = jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(len(x), chunks, shape.chunk, *x.shape[2:]), 1, 0)

    def join(x):
        x = jnp.moveaxis(x, 0, 1)
        return x.reshape(len(x), -1, *x.shape[3:])[:, :n]

    split_up = jax.tree.map(split, tiles)
    carry, out = jax.lax.scan(lambda c, chunk: function(c, *chunk), carry, split_up)
    return carry, jax.tree.map(join, out)


def _sum_over_queries(x_BcKQD, weights_BcKQS):
    """The sum over queries, [B, c, K, S, D]; of both operands a CPU turns the narrow x."""
    x_BcKDQ = made(x_BcKQD.swapaxes(3, 4))
    return jnp.einsum("bckdq,bckqs->bckds", x_BcKDQ, weights_BcKQS).swapaxes(3, 4)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(shape: _Shape, q_BnKQD, k_BmWKD, v_BmWKD, seen: _Seen, keys: Places, sinks_KQ):
    return _forward(shape, q_BnKQD, k_BmWKD, v_BmWKD, seen, keys, sinks_KQ)[0]


def _forward(shape: _Shape, q_BnKQD, k_BmWKD, v_BmWKD, seen: _Seen, keys: Places, sinks_KQ):
    def forward(_, q, seen):
        if seen.mask is None:
            # Else the masks of all tiles, which are the same in all layers, are made before the
            # layers and kept.
            q, seen = jax.lax.optimization_barrier((q, seen))
        k, v = _listed(k_BmWKD, seen.listed), _listed(v_BmWKD, seen.listed)
        scores, _ = _scores(shape, q * jnp.asarray(shape.scale, q.dtype), k, seen.masked(keys))
        top = jnp.max(scores, axis=-1, keepdims=True)
        if sinks_KQ is not None:
            top = jnp.maximum(top, sinks_KQ[..., None])
        weights = jnp.exp(scores - top)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        if sinks_KQ is not None:
            total = total + jnp.exp(sinks_KQ[..., None] - top)
        out = jnp.einsum("bckqs,bcksd->bckqd", weights.astype(v.dtype), v)
        return None, ((out / total).astype(q.dtype), top + jnp.log(total))

    _, found = _in_chunks(shape, forward, None, q_BnKQD, seen)
    out, log_z = checkpoint_name(found, SAVED)
    return out, (q_BnKQD, k_BmWKD, v_BmWKD, seen, keys, sinks_KQ, out, log_z)


def _backward(shape: _Shape, residuals, d_out_BnKQD):
    q_BnKQD, k_BmWKD, v_BmWKD, seen, keys, sinks_KQ, out_BnKQD, log_z_BnKQ1 = residuals

    def backward(sums, q, seen, out, log_z, d_out):
        tiles = seen.listed
        k, v = _listed(k_BmWKD, tiles), _listed(v_BmWKD, tiles)
        q = q * jnp.asarray(shape.scale, q.dtype)
        scores, slope = _scores(shape, q, k, seen.masked(keys))
        weights = jnp.exp(scores - log_z)
        product = made((d_out * out).astype(jnp.float32))
        mean = sum_of_columns(product, jnp.ones(q.shape[-1], jnp.float32))[..., None]
        d_weights = jnp.einsum("bckqd,bcksd->bckqs", d_out, v, preferred_element_type=jnp.float32)
        d_scores = (weights * (d_weights - mean) * slope).astype(q.dtype)
        d_v = _sum_over_queries(d_out, weights.astype(v.dtype))
        d_k = _sum_over_queries(q, d_scores)
        d_q = jnp.einsum("bckqs,bcksd->bckqd", d_scores, k) * jnp.asarray(shape.scale, q.dtype)
        d_sinks = None
        if sinks_KQ is not None:
            # The value of a sink is 0.
            sink_terms = jnp.exp(sinks_KQ - log_z[..., 0]) * mean[..., 0]
            d_sinks = sums[2] - jnp.sum(sink_terms, axis=(0, 1))
        d_k, d_v = (
            _with_unlisted(total, grad, tiles, shape.tile_by_tile)
            for total, grad in zip(sums, (d_k, d_v))
        )
        return (d_k, d_v, d_sinks), d_q

    zeros = jnp.zeros(k_BmWKD.shape, jnp.float32)
    first = (zeros, zeros, None if sinks_KQ is None else jnp.zeros_like(sinks_KQ))
    tiled = (q_BnKQD, seen, out_BnKQD, log_z_BnKQ1, d_out_BnKQD)
    (d_k, d_v, d_sinks), d_q = _in_chunks(shape, backward, first, *tiled)
    return d_q, d_k.astype(k_BmWKD.dtype), d_v.astype(v_BmWKD.dtype), None, None, d_sinks


_attention.defvjp(_forward, _backward)
