"""Attention as an argument of the decoder: which keys a query sees, and where keys are kept.

The decoder calls `attend(q, k, v, layer, cache) -> (out, cache)` in every layer, with q already
rotated and not yet scaled. What differs between a plain forward, a cached decode and a packed batch
is only the `attend` they pass in.

Letters: B batch, T query tokens, S key tokens, H heads, K key/value heads, R = H / K, D head dim.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# No window: larger than any position.
GLOBAL_WINDOW = np.iinfo(np.int32).max
MASKED = -1e30


class LayerInfo(NamedTuple):
    """What tells one layer of the stack from another; leaves have a leading layer axis outside."""

    index: jax.Array  # int32, 0 .. L-1
    window: jax.Array  # int32, how many tokens back a query sees, itself included
    rope: jax.Array  # int32, which of the model's ropes it uses


Attend = Callable[[jax.Array, jax.Array, jax.Array, LayerInfo, Any], tuple[jax.Array, Any]]


def dot_product_attention(
    q_BTHD: jax.Array,
    k_BSKD: jax.Array,
    v_BSKD: jax.Array,
    visible_BTS: jax.Array,
    *,
    scale: float,
    soft_cap: float | None = None,
) -> jax.Array:
    """Grouped-query attention, softmax in float32; the plain version every kernel is tested on.

    Args:
      visible_BTS: bool; a query that sees nothing gets a finite, meaningless mean of the values.

    Returns:
      [B, T, H, D] in the dtype of q.
    """
    B, T, H, D = q_BTHD.shape
    K = k_BSKD.shape[2]
    q_BTKRD = q_BTHD.reshape(B, T, K, H // K, D) * jnp.asarray(scale, q_BTHD.dtype)
    scores = jnp.einsum("btkrd,bskd->bkrts", q_BTKRD, k_BSKD, preferred_element_type=jnp.float32)
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    scores = jnp.where(visible_BTS[:, None, None], scores, MASKED)
    weights = jax.nn.softmax(scores, axis=-1).astype(v_BSKD.dtype)
    return jnp.einsum("bkrts,bskd->btkrd", weights, v_BSKD).reshape(B, T, H, D)


class Tokens(NamedTuple):
    """Where tokens belong, which decides who sees whom; arrays of shapes that broadcast."""

    positions: jax.Array  # int32, in their sequence
    segments: jax.Array  # int32, the sequence that they are part of; 0 is padding
    prompts: jax.Array | None = None  # int32, the segment that they see besides; None for none

    def pairs(self) -> tuple["Tokens", "Tokens"]:
        """Arrays [..., T] as queries [..., T, 1] and keys [..., 1, T] of `visible`."""
        queries = jax.tree.map(lambda x: x[..., :, None], self)
        return queries, Tokens(self.positions[..., None, :], self.segments[..., None, :])


def visible(queries: Tokens, keys: Tokens, window=None) -> jax.Array:
    """Which queries see which keys: the one rule of attention of sequences to themselves.

    A query sees the tokens of its segment, and of its prompt, up to itself; padding is never seen.

    Args:
      queries, keys: of shapes that broadcast, such as [B, T, 1] and [B, 1, S].
      window: int32 scalar; a query sees itself and the window - 1 tokens before it. None for no
        window.

    Returns:
      bool, of the broadcast shape.
    """
    distance = queries.positions - keys.positions
    same = keys.segments == queries.segments
    if queries.prompts is not None:
        same = same | (keys.segments == queries.prompts)
    seen = same & (keys.segments > 0) & (distance >= 0)
    return seen if window is None else seen & (distance < window)


def self_attention(
    positions: jax.Array, segments: jax.Array, *, scale: float, soft_cap: float | None = None
) -> Attend:
    """Attention of a batch to itself, nothing kept: the training forward.

    Args:
      positions, segments: [B, T] int32, as of `Tokens`. Several sequences of a row are told apart
        by their segment numbers.
    """
    queries, keys = Tokens(positions, segments).pairs()

    def attend(q, k, v, layer: LayerInfo, cache):
        mask = visible(queries, keys, layer.window)
        return dot_product_attention(q, k, v, mask, scale=scale, soft_cap=soft_cap), cache

    return attend


class KVCache(NamedTuple):
    """Keys and values of the tokens seen so far; the columns of all rows fill together.

    Rows of different length are padded on the left, so that their next token shares a column.
    """

    k: jax.Array  # [L, B, S, K, D]
    v: jax.Array  # [L, B, S, K, D]
    positions: jax.Array  # [B, S] int32
    segments: jax.Array  # [B, S] int32, 0 where nothing is kept
    length: jax.Array  # int32 scalar, columns filled

    @classmethod
    def zeros(cls, num_layers, batch, length, num_kv_heads, head_dim, dtype) -> "KVCache":
        kv = jnp.zeros((num_layers, batch, length, num_kv_heads, head_dim), dtype)
        columns = jnp.zeros((batch, length), jnp.int32)
        return cls(kv, kv, columns, columns, jnp.zeros((), jnp.int32))

    def append(self, positions: jax.Array, segments: jax.Array) -> "KVCache":
        """Makes room for [B, T] more tokens; `cached_attention` then writes their keys."""
        at = (0, self.length)
        return self._replace(
            positions=jax.lax.dynamic_update_slice(self.positions, positions, at),
            segments=jax.lax.dynamic_update_slice(self.segments, segments, at),
            length=self.length + positions.shape[1],
        )


def cached_attention(
    cache: KVCache, num_new: int, *, scale: float, soft_cap: float | None = None
) -> Attend:
    """Attention of the last `num_new` columns of `cache` (already appended) to all before them."""
    start = cache.length - num_new
    q_positions = jax.lax.dynamic_slice_in_dim(cache.positions, start, num_new, axis=1)
    q_segments = jax.lax.dynamic_slice_in_dim(cache.segments, start, num_new, axis=1)

    def attend(q, k, v, layer: LayerInfo, cache: KVCache):
        at = (layer.index, 0, start, 0, 0)
        cache = cache._replace(
            k=jax.lax.dynamic_update_slice(cache.k, k[None].astype(cache.k.dtype), at),
            v=jax.lax.dynamic_update_slice(cache.v, v[None].astype(cache.v.dtype), at),
        )
        layer_k = jax.lax.dynamic_index_in_dim(cache.k, layer.index, keepdims=False)
        layer_v = jax.lax.dynamic_index_in_dim(cache.v, layer.index, keepdims=False)
        mask = visible(
            Tokens(q_positions[..., None], q_segments[..., None]),
            Tokens(cache.positions[:, None], cache.segments[:, None]),
            layer.window,
        )
        out = dot_product_attention(
            q,
            layer_k.astype(q.dtype),
            layer_v.astype(q.dtype),
            mask,
            scale=scale,
            soft_cap=soft_cap,
        )
        return out, cache

    return attend
