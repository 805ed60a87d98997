"""Attention over packed streams and rows for GPUs in Triton, with gradients: no scores in memory.

A program is a block of queries of one head (forward, their gradient), or a block of keys of one
key/value head with all of its query heads (their gradient). It walks the list of tiles that see
each other with a running softmax (Dao et al. 2022, arXiv 2205.14135). Tiles wider than a block are
walked block by block. The plain version is `tile_attention.stream_attention`.

Letters: B streams, N tokens of one, n tiles, W tokens of a tile, J listed key tiles, H heads, K
key/value heads, R = H / K, D head dim, S tokens of a block.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from adpo_jax.model.attention import MASKED, LayerInfo, Tokens, visible
from adpo_jax.model.attention_kernels.stream_tpu import query_lists
from adpo_jax.model.tile_attention import Stream

try:  # jax 0.12 calls it deprecated; a later one has it no more
    from jax.experimental.pallas import triton as plt
except ImportError:
    plt = None

# Tokens of a block: 64 rows of 128 numbers in float32 are 64 registers of each of 128 threads.
BLOCK = 64
# The smallest side of a matrix product on tensor cores.
LEAST_BLOCK = 16
# Above it a block of keys, values and their gradients does not fit the registers.
MAX_HEAD_DIM = 128


@dataclasses.dataclass(frozen=True)
class _Static:
    scale: float
    soft_cap: float | None
    block: int  # S
    blocks: int  # W / S
    interpret: bool


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
    if tile % LEAST_BLOCK or math.gcd(tile, BLOCK) < LEAST_BLOCK:
        return f"needs tiles of a multiple of {LEAST_BLOCK} tokens; given {tile}"
    return ""


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    layer: LayerInfo,
    stream: Stream,
    *,
    scale: float,
    soft_cap: float | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Attention of the tokens of a stream to themselves, 0 at padding.

    Args:
      q: [B, N, H, D], not scaled; k, v: [B, N, K, D].
      stream: a `Stream`, or its arrays in a tuple.

    Returns:
      [B, N, H, D] in the dtype of q.
    """
    stream = Stream(*stream)
    tile = q.shape[1] // stream.key_tiles.shape[1]
    block = math.gcd(tile, BLOCK)
    static = _Static(scale, soft_cap, block, tile // block, interpret)
    window = jnp.reshape(jnp.asarray(layer.window, jnp.int32), (1,))
    return _attention(static, q, k, v, stream, window)


def attend_rows(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    layer: LayerInfo,
    places: tuple[jax.Array, jax.Array],
    **settings,
) -> jax.Array:
    """Causal attention of rows to themselves: streams of which each tile sees those before it.

    Args:
      q: [B, T, H, D], not scaled; k, v: [B, T, K, D].
      places: positions and segments, [B, T] int32 each.
      settings: as of `attend`.
    """
    B, T = q.shape[:2]
    pad = -T % BLOCK

    def padded(x):
        return jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2))

    positions, segments = map(padded, places)
    tiles = np.arange((T + pad) // BLOCK, dtype=np.int32)
    lists = np.where(tiles <= tiles[:, None], tiles, -1)
    lists = jnp.broadcast_to(lists, (B, *lists.shape))
    stream = Stream(positions, segments, segments, lists)
    return attend(*map(padded, (q, k, v)), layer, stream, **settings)[:, :T]


def _tokens(refs, b, first, size: int, axis: int) -> Tokens:
    """The places of `size` tokens from `first` on, along an axis of two."""
    shape = (size, 1) if axis == 0 else (1, size)
    found = (plt.load(ref.at[b, pl.ds(first, size)]) for ref in refs)
    return Tokens(*(x.reshape(shape) for x in found))


def _capped(static: _Static, scores):
    """Scores under the soft cap, and its derivative."""
    if static.soft_cap is None:
        return scores, 1.0
    tanh = 2 / (1 + jnp.exp(-2 * scores / static.soft_cap)) - 1
    return static.soft_cap * tanh, 1.0 - tanh * tanh


def _listed(static: _Static, tiles_ref, b, tile, j):
    """The first token of the j-th block among the tiles that a tile lists."""
    t = tiles_ref[b, tile, jax.lax.div(j, static.blocks)]
    return (t * static.blocks + jax.lax.rem(j, static.blocks)) * static.block


def _rows(ref, b, first, size, head):
    return plt.load(ref.at[b, pl.ds(first, size), head, slice(None)])


def _forward_kernel(static, R, *refs):
    tiles, counts, window, *places, q, k, v, out, log_z = refs
    b, h, i = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    S, first, tile = static.block, i * static.block, jax.lax.div(i, static.blocks)
    query = _rows(q, b, first, S, h) * jnp.asarray(static.scale, q.dtype)
    queries = _tokens(places, b, first, S, 0)
    head, reach = jax.lax.div(h, R), window[0]

    def visit(j, carry):
        total_out, top, total = carry
        at = _listed(static, tiles, b, tile, j)
        scores = plt.dot(query, _rows(k, b, at, S, head), trans_b=True)
        scores, _ = _capped(static, scores)
        seen = visible(queries, _tokens(places, b, at, S, 1), reach)
        scores = jnp.where(seen, scores, MASKED)
        new_top = jnp.maximum(top, jnp.max(scores, axis=1))
        weights = jnp.where(seen, jnp.exp(scores - new_top[:, None]), 0.0)
        shrink = jnp.exp(top - new_top)
        added = plt.dot(weights.astype(v.dtype), _rows(v, b, at, S, head))
        total = total * shrink + jnp.sum(weights, axis=1)
        return total_out * shrink[:, None] + added, new_top, total

    start = (
        jnp.zeros(query.shape, jnp.float32),
        jnp.full((S,), MASKED, jnp.float32),
        jnp.zeros((S,), jnp.float32),
    )
    turns = counts[b, tile] * static.blocks
    total_out, top, total = jax.lax.fori_loop(0, turns, visit, start)
    total = jnp.where(total > 0, total, 1.0)  # padding sees nothing
    here = (b, pl.ds(first, S), h)
    plt.store(out.at[*here, slice(None)], (total_out / total[:, None]).astype(out.dtype))
    plt.store(log_z.at[b, h, pl.ds(first, S)], top + jnp.log(total))


def _query_kernel(static, R, *refs):
    tiles, counts, window, *places, q, k, v, d_out, log_z, mean, d_q = refs
    b, h, i = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    S, first, tile = static.block, i * static.block, jax.lax.div(i, static.blocks)
    query = _rows(q, b, first, S, h) * jnp.asarray(static.scale, q.dtype)
    queries, d_rows = _tokens(places, b, first, S, 0), _rows(d_out, b, first, S, h)
    of_query = (b, h, pl.ds(first, S))
    z, m = plt.load(log_z.at[of_query])[:, None], plt.load(mean.at[of_query])[:, None]
    head, reach = jax.lax.div(h, R), window[0]

    def visit(j, grad):
        at = _listed(static, tiles, b, tile, j)
        key = _rows(k, b, at, S, head)
        scores, slope = _capped(static, plt.dot(query, key, trans_b=True))
        seen = visible(queries, _tokens(places, b, at, S, 1), reach)
        weights = jnp.where(seen, jnp.exp(scores - z), 0.0)
        d_weights = plt.dot(d_rows, _rows(v, b, at, S, head), trans_b=True)
        d_scores = weights * (d_weights - m) * slope
        return grad + plt.dot(d_scores.astype(key.dtype), key)

    turns = counts[b, tile] * static.blocks
    grad = jax.lax.fori_loop(0, turns, visit, jnp.zeros(query.shape, jnp.float32))
    here = (b, pl.ds(first, S), h, slice(None))
    plt.store(d_q.at[here], (grad * static.scale).astype(d_q.dtype))


def _key_kernel(static, R, *refs):
    tiles, counts, window, *places, q, k, v, d_out, log_z, mean, d_k, d_v = refs
    b, head, i = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    S, first, tile = static.block, i * static.block, jax.lax.div(i, static.blocks)
    key, value = _rows(k, b, first, S, head), _rows(v, b, first, S, head)
    keys, reach = _tokens(places, b, first, S, 0), window[0]
    scale = jnp.asarray(static.scale, q.dtype)
    turns = counts[b, tile] * static.blocks

    def visit(j, grads):
        """A block of queries of one of the R heads; keys down the rows, queries along."""
        grad_k, grad_v = grads
        h = head * R + jax.lax.div(j, turns)
        at = _listed(static, tiles, b, tile, jax.lax.rem(j, turns))
        query, d_rows = _rows(q, b, at, S, h) * scale, _rows(d_out, b, at, S, h)
        scores, slope = _capped(static, plt.dot(key, query, trans_b=True))
        seen = visible(_tokens(places, b, at, S, 1), keys, reach)
        of_query = (b, h, pl.ds(at, S))
        z, m = plt.load(log_z.at[of_query])[None, :], plt.load(mean.at[of_query])[None, :]
        weights = jnp.where(seen, jnp.exp(scores - z), 0.0)
        grad_v = grad_v + plt.dot(weights.astype(d_rows.dtype), d_rows)
        d_weights = plt.dot(value, d_rows, trans_b=True)
        d_scores = weights * (d_weights - m) * slope
        return grad_k + plt.dot(d_scores.astype(query.dtype), query), grad_v

    zeros = jnp.zeros(key.shape, jnp.float32)
    grad_k, grad_v = jax.lax.fori_loop(0, turns * R, visit, (zeros, zeros))
    here = (b, pl.ds(first, S), head, slice(None))
    plt.store(d_k.at[here], grad_k.astype(d_k.dtype))
    plt.store(d_v.at[here], grad_v.astype(d_v.dtype))


def _call(static, kernel, grid, inputs, out_shape, name):
    whole = pl.BlockSpec(memory_space=pl.ANY)
    return pl.pallas_call(
        kernel,
        grid=grid,
        in_specs=[whole] * len(inputs),
        out_specs=[whole] * len(out_shape),
        out_shape=out_shape,
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=2),
        interpret=static.interpret,
        name=name,
    )(*inputs)


def _like(x):
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _key_lists(stream: Stream) -> tuple[jax.Array, jax.Array]:
    """The key tiles [B, n, J] of each query tile, those listed first, and how many [B, n]."""
    order = jnp.argsort(stream.key_tiles < 0, axis=-1, stable=True)
    counts = jnp.sum(stream.key_tiles >= 0, axis=-1, dtype=jnp.int32)
    return jnp.take_along_axis(stream.key_tiles, order, axis=-1), counts


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(static: _Static, q_BNHD, k_BNKD, v_BNKD, stream: Stream, window):
    return _forward(static, q_BNHD, k_BNKD, v_BNKD, stream, window)[0]


def _forward(static: _Static, q_BNHD, k_BNKD, v_BNKD, stream: Stream, window):
    B, N, H, _ = q_BNHD.shape
    R = H // k_BNKD.shape[2]
    out, log_z = _call(
        static,
        functools.partial(_forward_kernel, static, R),
        (B, H, N // static.block),
        [*_key_lists(stream), window, *stream.tokens, q_BNHD, k_BNKD, v_BNKD],
        [_like(q_BNHD), jax.ShapeDtypeStruct((B, H, N), jnp.float32)],
        "stream_attention",
    )
    return out, (q_BNHD, k_BNKD, v_BNKD, stream, window, out, log_z)


def _backward(static: _Static, residuals, d_out_BNHD):
    q_BNHD, k_BNKD, v_BNKD, stream, window, out_BNHD, log_z = residuals
    B, N, H, _ = q_BNHD.shape
    K = k_BNKD.shape[2]
    product = d_out_BNHD.astype(jnp.float32) * out_BNHD.astype(jnp.float32)
    mean = jnp.swapaxes(jnp.sum(product, axis=-1), 1, 2)
    tensors = [q_BNHD, k_BNKD, v_BNKD, d_out_BNHD.astype(q_BNHD.dtype), log_z, mean]
    (d_q,) = _call(
        static,
        functools.partial(_query_kernel, static, H // K),
        (B, H, N // static.block),
        [*_key_lists(stream), window, *stream.tokens, *tensors],
        [_like(q_BNHD)],
        "stream_attention_d_query",
    )
    d_k, d_v = _call(
        static,
        functools.partial(_key_kernel, static, H // K),
        (B, K, N // static.block),
        [*query_lists(stream.key_tiles), window, *stream.tokens, *tensors],
        [_like(k_BNKD), _like(v_BNKD)],
        "stream_attention_d_key",
    )
    return d_q, d_k, d_v, None, None


_attention.defvjp(_forward, _backward)
