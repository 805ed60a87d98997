"""Attention of shares of a stream, to which the keys and values of all others come one by one.

Each device has the queries, keys and values of its share. Keys and values go round: in every turn
a device hands those that it has on to the next one, so that however many devices there are, it
holds three shares of them: its own, those at hand and those that arrive. What queries found in each
share is added up by the logs of its normaliser (Liu et al. 2023, arXiv 2310.01889). In the backward
pass the gradients of keys and values go round with them and come home last. The plain version is
the all-gather of `per_device`.

Letters: B streams, N tokens of a share, n tiles, J listed key tiles, S shares, H heads, K key/value
heads, D head dim.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from adpo_jax.model.attention import MASKED, LayerInfo, Places
from adpo_jax.model.tile_attention import Saved, Stream


class Passes(NamedTuple):
    """Attention to some keys, its two passes each alone.

    Attributes:
      forward: (q, k, v, layer, stream, lists) -> `Saved`, without sinks. Of a query that sees none
        of the keys `log_z` is about `MASKED`.
      gradients: (q, k, v, layer, stream, lists, saved, d_out) -> d_q, d_k, d_v, where `saved` is
        that of all keys.
    """

    forward: Callable
    gradients: Callable


class Parts(NamedTuple):
    """The queries of a share, and what they see of each share of the keys.

    Attributes:
      stream: of the queries; its `key_tiles` and `keys` are those of all shares.
      key_tiles: [B, S, n, J] int32, numbered within each share.
      lists: what a kernel makes of them, arrays [B, S, ...].
    """

    stream: Stream
    key_tiles: jax.Array
    lists: Any

    def of(self, share) -> tuple[Stream, Any]:
        """Stream and lists of one share of the keys; `share` may be traced."""
        S = self.key_tiles.shape[1]

        def one(x):
            return jax.lax.dynamic_index_in_dim(x, share, axis=1, keepdims=False)

        keys = jax.tree.map(lambda x: one(x.reshape(len(x), S, -1)), self.stream.keys)
        stream = self.stream._replace(key_tiles=one(self.key_tiles), keys=keys)
        return stream, jax.tree.map(one, self.lists)


class _Ring(NamedTuple):
    """Static settings: the passes, the mesh axis along which shares lie, and their number."""

    passes: Passes
    axis: str | tuple[str, ...]
    shares: int


def parts_of(stream: Stream, shares: int, lists_of: Callable | None) -> tuple[jax.Array, Any]:
    """`key_tiles` and `lists` of `Parts`, which are the same for all layers.

    Args:
      stream: of the queries of one share, with all keys.
      lists_of: makes the arrays [B, ...] of a stream that a kernel needs; None for none.
    """
    m = stream.num_key_tiles // shares
    N = m * stream.tile

    def tiles_and_lists(share):
        within = stream.key_tiles - share * m
        is_here = (within >= 0) & (within < m)
        order = jnp.argsort(~is_here, axis=-1, stable=True)[..., : min(m, within.shape[-1])]
        tiles = jnp.take_along_axis(jnp.where(is_here, within, -1), order, axis=-1)
        keys = (jax.lax.dynamic_slice_in_dim(x, share * N, N, axis=1) for x in stream.keys[:2])
        part = stream._replace(key_tiles=tiles, keys=Places(*keys))
        return tiles, None if lists_of is None else lists_of(part)

    # One after the other: there may be many shares.
    every = jax.lax.map(tiles_and_lists, jnp.arange(shares, dtype=jnp.int32))
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), every)


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    layer: LayerInfo,
    parts: Parts,
    *,
    passes: Passes,
    axis: str | tuple[str, ...],
) -> jax.Array:
    """Attention of the queries of a share to the keys of all, inside of a `shard_map`.

    Args:
      q: [B, N, H, D], not scaled; k, v: [B, N, K, D], those of this device's share.
      axis: the mesh axis along which the shares lie.

    Returns:
      [B, N, H, D] in the dtype of q.
    """
    ring = _Ring(passes, axis, parts.key_tiles.shape[1])
    return _attention(ring, q, k, v, layer._replace(sinks=None), parts, layer.sinks)


def _passed_on(ring: _Ring, tree):
    """What the device before had; this one's own goes to the next."""
    to_next = [(i, (i + 1) % ring.shares) for i in range(ring.shares)]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, ring.axis, to_next), tree)


def _added(total: Saved, found: Saved) -> Saved:
    """Results over the keys of both."""
    log_z = jnp.logaddexp(total.log_z, found.log_z)

    def share(one: Saved):
        weight = jnp.swapaxes(jnp.exp(one.log_z - log_z), 1, 2)[..., None]
        return weight * one.out.astype(jnp.float32)

    return Saved(share(total) + share(found), log_z)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(ring: _Ring, q, k, v, layer: LayerInfo, parts: Parts, sinks_H):
    return _forward(ring, q, k, v, layer, parts, sinks_H)[0]


def _forward(ring: _Ring, q, k, v, layer: LayerInfo, parts: Parts, sinks_H):
    B, N, H, _ = q.shape
    here = jax.lax.axis_index(ring.axis)

    def turn(i, kv, total: Saved) -> Saved:
        found = ring.passes.forward(q, *kv, layer, *parts.of((here - i) % ring.shares))
        return _added(total, found)

    def step(carry, i):
        kv, total = carry
        return (_passed_on(ring, kv), turn(i, kv, total)), None

    nothing = Saved(jnp.zeros(q.shape, jnp.float32), jnp.full((B, H, N), MASKED, jnp.float32))
    last = ring.shares - 1
    (kv, total), _ = jax.lax.scan(step, ((k, v), nothing), jnp.arange(last))
    total = turn(last, kv, total)
    if sinks_H is not None:
        sink = Saved(jnp.zeros_like(total.out), jnp.zeros_like(total.log_z) + _column(sinks_H))
        total = _added(total, sink)
    found = Saved(total.out.astype(q.dtype), total.log_z)
    found = checkpoint_name(found, "attention")
    return found.out, (q, k, v, layer, parts, sinks_H, found)


def _column(sinks_H):
    return sinks_H.astype(jnp.float32)[:, None]


def _backward(ring: _Ring, residuals, d_out):
    q, k, v, layer, parts, sinks_H, saved = residuals
    here = jax.lax.axis_index(ring.axis)

    def turn(i, kv, d_q, d_kv):
        """The sums after a turn; those of keys and values are handed on."""
        stream, lists = parts.of((here - i) % ring.shares)
        found = ring.passes.gradients(q, *kv, layer, stream, lists, saved, d_out)
        d_q, *d_kv = (a + b.astype(jnp.float32) for a, b in zip((d_q, *d_kv), found))
        return d_q, _passed_on(ring, tuple(d_kv))

    def step(carry, i):
        kv, *sums = carry
        return (_passed_on(ring, kv), *turn(i, kv, *sums)), None

    d_q, d_k, d_v = (jnp.zeros(x.shape, jnp.float32) for x in (q, k, v))
    last = ring.shares - 1
    (kv, *sums), _ = jax.lax.scan(step, ((k, v), d_q, (d_k, d_v)), jnp.arange(last))
    d_q, (d_k, d_v) = turn(last, kv, *sums)
    d_sinks = None
    if sinks_H is not None:
        product = d_out.astype(jnp.float32) * saved.out.astype(jnp.float32)
        mean_BHN = jnp.swapaxes(jnp.sum(product, axis=-1), 1, 2)
        shares = jnp.exp(_column(sinks_H) - saved.log_z)
        d_sinks = -jnp.sum(shares * mean_BHN, axis=(0, 2)).astype(sinks_H.dtype)
    grads = (d.astype(x.dtype) for d, x in zip((d_q, d_k, d_v), (q, k, v)))
    return *grads, None, None, d_sinks


_attention.defvjp(_forward, _backward)
