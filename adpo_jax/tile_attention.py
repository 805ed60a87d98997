"""Attention over a packed stream in tiles: each tile of queries sees a short list of key tiles.

A stream holds many segments side by side: prompts, and completions that also see the prompt of
their group. A query tile's list names the tiles where the segments of its tokens, and their
prompts, lie. Scores are made for listed tiles alone, and never kept: the backward pass makes them
again from the log of the normaliser (Dao et al. 2022, arXiv 2205.14135).

Letters: B streams, N tokens of one, n tiles, W tokens of a tile, J listed key tiles, S = J W keys,
H heads, K key/value heads, R = H / K, D head dim, X tiles of several streams.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from adpo_jax.attention import MASKED, Attend, LayerInfo

# Scores of so many bytes at once; more tiles run one after the other.
SCORE_BYTES = 256 * 2**20


class Stream(NamedTuple):
    """Where each token of a packed stream belongs.

    Attributes:
      positions: [B, N] int32, in its sequence; a completion counts on from its prompt.
      segments: [B, N] int32, the prompt or completion it is part of; 0 is padding.
      prompts: [B, N] int32, the segment of the prompt that it sees besides its own segment.
      key_tiles: [B, n, J] int32, the key tiles of each query tile, ascending; -1 for none.
    """

    positions: jax.Array
    segments: jax.Array
    prompts: jax.Array
    key_tiles: jax.Array


@dataclasses.dataclass(frozen=True)
class _Shape:
    """Static settings of the kernel."""

    scale: float
    soft_cap: float | None
    chunk: int  # tiles whose scores are alive at once


def stream_attention(
    stream: Stream, *, scale: float, soft_cap: float | None = None, windows: bool = False
) -> Attend:
    """Attention of a packed stream to itself, for the training forward.

    Args:
      windows: whether any layer has a window; without, the mask is made once for all layers.
    """
    B, N = stream.positions.shape
    n, J = stream.key_tiles.shape[1:]
    W = N // n
    listed = jnp.repeat(stream.key_tiles >= 0, W, axis=2)
    tiles = jnp.maximum(stream.key_tiles, 0)

    def of_keys(x_BN):
        return _gather(x_BN.reshape(B, n, W), tiles).reshape(B, n, J * W)

    def tiled(x_BN):
        return x_BN.reshape(B, n, W)[..., None]

    k_segments = of_keys(stream.segments)[:, :, None]
    distance = tiled(stream.positions) - of_keys(stream.positions)[:, :, None]
    same = (k_segments == tiled(stream.segments)) | (k_segments == tiled(stream.prompts))
    causal = same & (k_segments > 0) & (distance >= 0) & listed[:, :, None]

    def attend(q, k, v, layer: LayerInfo, cache):
        H, K, D = q.shape[2], k.shape[2], q.shape[3]
        mask = causal & (distance < layer.window) if windows else causal
        # [B n, K, R W, D]: every product below is then a plain batch of matrices.
        q = q.reshape(B, n, W, K, H // K, D).transpose(0, 1, 3, 4, 2, 5)
        q = q.reshape(B * n, K, H // K * W, D)

        def keys(x):
            x = _tiles_of(x.reshape(B, n, W, K, D), tiles)
            x = x.reshape(B, n, J * W, K, D).transpose(0, 1, 3, 2, 4)
            return x.reshape(B * n, K, J * W, D)

        score_bytes = 4 * H * W * J * W
        shape = _Shape(scale, soft_cap, max(1, SCORE_BYTES // score_bytes))
        out = _attention(shape, q, keys(k), keys(v), mask.reshape(B * n, W, J * W))
        out = out.reshape(B, n, K, H // K, W, D).transpose(0, 1, 4, 2, 3, 5)
        return out.reshape(B, N, H, D), cache

    return attend


def _gather(x_BnZ, tiles_BnJ):
    """[B, n, ...] -> [B, n, J, ...], the listed tiles."""
    return jax.vmap(lambda x, tiles: jnp.take(x, tiles, axis=0))(x_BnZ, tiles_BnJ)


@jax.custom_vjp
def _tiles_of(x_BnWKD, tiles_BnJ):
    """`_gather`, with a 0/1 matrix product for a gradient: a CPU scatters one row at a time."""
    return _gather(x_BnWKD, tiles_BnJ)


def _tiles_forward(x_BnWKD, tiles_BnJ):
    return _gather(x_BnWKD, tiles_BnJ), tiles_BnJ


def _tiles_backward(tiles_BnJ, g_BnJWKD):
    B, n, J = tiles_BnJ.shape
    used = jax.nn.one_hot(tiles_BnJ.reshape(B, n * J), n, axis=1, dtype=g_BnJWKD.dtype)
    flat = g_BnJWKD.reshape(B, n * J, -1)
    summed = jnp.einsum("bnj,bjz->bnz", used, flat, precision=jax.lax.Precision.HIGHEST)
    return summed.reshape(B, n, *g_BnJWKD.shape[3:]), None


_tiles_of.defvjp(_tiles_forward, _tiles_backward)


def _scores(shape: _Shape, q_XKQD, k_XKSD, mask_XWS):
    """Masked scores [X, K, R W, S] float32, and the derivative of the soft cap (or 1)."""
    X, K, Q, _ = q_XKQD.shape
    W, S = mask_XWS.shape[1:]
    scores = jnp.einsum("xkqd,xksd->xkqs", q_XKQD, k_XKSD, preferred_element_type=jnp.float32)
    slope = 1.0
    if shape.soft_cap is not None:
        capped = jnp.tanh(scores / shape.soft_cap)
        scores, slope = shape.soft_cap * capped, 1.0 - jnp.square(capped)
    scores = scores.reshape(X, K, Q // W, W, S)
    return jnp.where(mask_XWS[:, None, None], scores, MASKED).reshape(X, K, Q, S), slope


def _in_chunks(shape: _Shape, function, *tiles):
    """`function` over chunks of the leading axis, one after the other where there are several."""
    X = tiles[0].shape[0]
    if shape.chunk >= X:
        return function(*tiles)
    chunks = -(-X // shape.chunk)
    pad = chunks * shape.chunk - X

    def split(x):
        x = jnp.pad(x, ((0, pad),) + ((0, 0),) * (x.ndim - 1))
        return x.reshape(chunks, shape.chunk, *x.shape[1:])

    out = jax.lax.map(lambda chunk: function(*chunk), tuple(map(split, tiles)))
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:X], out)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(shape: _Shape, q_XKQD, k_XKSD, v_XKSD, mask_XWS):
    return _forward(shape, q_XKQD, k_XKSD, v_XKSD, mask_XWS)[0]


def _forward(shape: _Shape, q_XKQD, k_XKSD, v_XKSD, mask_XWS):
    def forward(q, k, v, mask):
        scores, _ = _scores(shape, q * jnp.asarray(shape.scale, q.dtype), k, mask)
        top = jnp.max(scores, axis=-1, keepdims=True)
        weights = jnp.exp(scores - top)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        out = jnp.einsum("xkqs,xksd->xkqd", weights.astype(v.dtype), v)
        return (out / total).astype(q.dtype), top + jnp.log(total)

    out, log_z = _in_chunks(shape, forward, q_XKQD, k_XKSD, v_XKSD, mask_XWS)
    return out, (q_XKQD, k_XKSD, v_XKSD, mask_XWS, out, log_z)


def _backward(shape: _Shape, residuals, d_out_XKQD):
    def backward(q, k, v, mask, out, log_z, d_out):
        q = q * jnp.asarray(shape.scale, q.dtype)
        scores, slope = _scores(shape, q, k, mask)
        weights = jnp.exp(scores - log_z)
        mean = jnp.sum((d_out * out).astype(jnp.float32), axis=-1, keepdims=True)
        d_weights = jnp.einsum("xkqd,xksd->xkqs", d_out, v, preferred_element_type=jnp.float32)
        d_scores = (weights * (d_weights - mean) * slope).astype(q.dtype)
        d_v = jnp.einsum("xkqs,xkqd->xksd", weights.astype(v.dtype), d_out)
        d_q = jnp.einsum("xkqs,xksd->xkqd", d_scores, k) * jnp.asarray(shape.scale, q.dtype)
        return d_q, jnp.einsum("xkqs,xkqd->xksd", d_scores, q), d_v

    return *_in_chunks(shape, backward, *residuals, d_out_XKQD), None


_attention.defvjp(_forward, _backward)
