"""Training attention over a packed stream for TPUs: no scores in memory, no tile visited in vain.

A program is one tile of queries (forward, their gradient) or of keys (their gradient) of one head.
The other side of the head lies whole in VMEM and is walked tile by tile along the list of tiles
that see each other, with a running softmax (Dao et al. 2022, arXiv 2205.14135). The plain version
is `tile_attention.stream_attention`.

Letters: B streams, N tokens of one, n tiles, L keys, m tiles of them, W tokens of a tile, J listed
key tiles, H heads, K key/value heads, D head dim.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from adpo_jax.model.attention import MASKED, LayerInfo, Tokens, visible
from adpo_jax.model.tile_attention import Stream

# Bytes of VMEM for two whole sides of a head, each with room to fetch the next one ahead.
VMEM_BYTES = 12 * 2**20
# The lists of tiles lie in scalar memory.
MAX_TILES = 256


@dataclasses.dataclass(frozen=True)
class _Static:
    scale: float
    soft_cap: float | None
    interpret: bool


def limit(num_tokens: int, num_tiles: int, head_dim: int, itemsize: int) -> str:
    """Why a stream of these sizes, in numbers of `itemsize` bytes, is too long; empty if it is not.

    Needs a head_dim that is a multiple of 128.
    """
    most = VMEM_BYTES // (4 * head_dim * itemsize)
    if num_tokens <= most and num_tiles <= MAX_TILES:
        return ""
    return (
        f"holds streams of at most {most} tokens in {MAX_TILES} tiles in a core's fast memory; "
        f"given {num_tokens} in {num_tiles}"
    )


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
    """Attention of the tokens of a stream to its keys, 0 at padding.

    Args:
      q: [B, N, H, D], not scaled; k, v: [B, L, K, D].

    Returns:
      [B, N, H, D] in the dtype of q.
    """
    static = _Static(scale, soft_cap, interpret)
    heads_first = [jnp.swapaxes(x, 1, 2) for x in (q, k, v)]
    window = jnp.asarray(layer.window, jnp.int32)
    return jnp.swapaxes(_attention(static, *heads_first, stream, window), 1, 2)


def query_lists(key_tiles: jax.Array, num_key_tiles: int) -> tuple[jax.Array, jax.Array]:
    """Which query tiles see each key tile, from which key tiles each query tile sees.

    Args:
      key_tiles: [B, n, J] int32, -1 for none.
      num_key_tiles: m.

    Returns:
      tiles [B, m, n] int32, those that see it first, and counts [B, m] int32.
    """
    seen_Bqk = jnp.any(key_tiles[..., None] == jnp.arange(num_key_tiles), axis=2)
    sees_Bkq = jnp.swapaxes(seen_Bqk, 1, 2)
    order = jnp.argsort(~sees_Bkq, axis=-1, stable=True).astype(jnp.int32)
    return order, jnp.sum(sees_Bkq, axis=-1, dtype=jnp.int32)


class _Side:
    """The queries or the keys of a stream, in tiles.

    Attributes:
      n: its tiles.
      down, along: the integers of its tokens down the rows, and along the lanes.
    """

    def __init__(self, tokens: Tokens, tile: int):
        B, N = tokens.positions.shape
        self.W, self.n = tile, N // tile
        prompts = tokens.segments if tokens.prompts is None else tokens.prompts
        columns = jnp.stack([tokens.positions, tokens.segments, prompts], axis=-1)
        self.down = columns.reshape(B, self.n, tile, 3)
        self.along = jnp.swapaxes(self.down, 2, 3)

    def in_tiles(self, *arrays):
        return [x.reshape(*x.shape[:2], self.n, self.W, *x.shape[3:]) for x in arrays]


def _sides(stream: Stream) -> tuple[_Side, _Side]:
    """Queries and keys."""
    queries = _Side(stream.tokens, stream.tile)
    return queries, queries if stream.keys is None else _Side(stream.keys, stream.tile)


def _down(x_W3) -> Tokens:
    return Tokens(x_W3[:, 0:1], x_W3[:, 1:2], x_W3[:, 2:3])


def _along(x_3W) -> Tokens:
    return Tokens(x_3W[0:1], x_3W[1:2], x_3W[2:3])


def _dot(a, b, contract: tuple[int, int]):
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)


def _capped(static: _Static, scores):
    """Scores under the soft cap, and its derivative."""
    if static.soft_cap is None:
        return scores, 1.0
    tanh = jnp.tanh(scores / static.soft_cap)
    return static.soft_cap * tanh, 1.0 - tanh * tanh


def _forward_kernel(static, n, J, tiles, counts, window, q, k, v, mine, theirs, out, log_z):
    b, i = pl.program_id(0), pl.program_id(2)
    query = q[0, 0, 0] * jnp.asarray(static.scale, q.dtype)
    queries = _down(mine[0, 0])

    def visit(j, carry):
        total_out, top, total = carry
        t = tiles[(b * n + i) * J + j]
        scores, _ = _capped(static, _dot(query, k[0, 0, t], (1, 1)))
        seen = visible(queries, _along(theirs[0, t]), window[0])
        scores = jnp.where(seen, scores, MASKED)
        new_top = jnp.maximum(top, jnp.max(scores, axis=-1, keepdims=True))
        weights = jnp.where(seen, jnp.exp(scores - new_top), 0.0)
        shrink = jnp.exp(top - new_top)
        added = _dot(weights.astype(v.dtype), v[0, 0, t], (1, 0))
        total = total * shrink + jnp.sum(weights, axis=-1, keepdims=True)
        return total_out * shrink + added, new_top, total

    W, D = query.shape
    zeros = jnp.zeros((W, 1), jnp.float32)
    first = (jnp.zeros((W, D), jnp.float32), zeros + MASKED, zeros)
    total_out, top, total = jax.lax.fori_loop(0, counts[b * n + i], visit, first)
    # Padding sees nothing.
    total = jnp.where(total > 0, total, 1.0)
    out[0, 0, 0] = (total_out / total).astype(out.dtype)
    log_z[0, 0, 0] = top + jnp.log(total)


def _query_kernel(
    static, n, J, tiles, counts, window, q, k, v, mine, theirs, d_out, log_z, mean, d_q
):
    b, i = pl.program_id(0), pl.program_id(2)
    scale = jnp.asarray(static.scale, q.dtype)
    query, queries = q[0, 0, 0] * scale, _down(mine[0, 0])

    def visit(j, grad):
        t = tiles[(b * n + i) * J + j]
        scores, slope = _capped(static, _dot(query, k[0, 0, t], (1, 1)))
        seen = visible(queries, _along(theirs[0, t]), window[0])
        weights = jnp.where(seen, jnp.exp(scores - log_z[0, 0, 0]), 0.0)
        d_weights = _dot(d_out[0, 0, 0], v[0, 0, t], (1, 1))
        d_scores = weights * (d_weights - mean[0, 0, 0]) * slope
        return grad + _dot(d_scores.astype(k.dtype), k[0, 0, t], (1, 0))

    zeros = jnp.zeros(query.shape, jnp.float32)
    grad = jax.lax.fori_loop(0, counts[b * n + i], visit, zeros)
    d_q[0, 0, 0] = (grad * static.scale).astype(d_q.dtype)


def _key_kernel(
    static, n, tiles, counts, window, q, k, v, mine, theirs, d_out, log_z, mean, d_k, d_v
):
    """A tile of keys; n is that of queries."""
    b, i = pl.program_id(0), pl.program_id(2)
    key, value, keys = k[0, 0, 0], v[0, 0, 0], _down(mine[0, 0])
    scale = jnp.asarray(static.scale, q.dtype)

    def visit(j, grads):
        grad_k, grad_v = grads
        t = tiles[(b * n + i) * n + j]
        query = q[0, 0, t] * scale
        # Keys down the rows, queries along the lanes.
        scores, slope = _capped(static, _dot(key, query, (1, 1)))
        seen = visible(_along(theirs[0, t]), keys, window[0])
        weights = jnp.where(seen, jnp.exp(scores - log_z[0, 0, t]), 0.0)
        grad_v = grad_v + _dot(weights.astype(q.dtype), d_out[0, 0, t], (1, 0))
        d_weights = _dot(value, d_out[0, 0, t], (1, 1))
        d_scores = weights * (d_weights - mean[0, 0, t]) * slope
        return grad_k + _dot(d_scores.astype(q.dtype), query, (1, 0)), grad_v

    zeros = jnp.zeros(key.shape, jnp.float32)
    d_k[0, 0, 0], d_v[0, 0, 0] = jax.lax.fori_loop(0, counts[b * n + i], visit, (zeros, zeros))


def _kv_head(h, queries_of_one: int | None):
    return h if queries_of_one is None else jax.lax.div(h, queries_of_one)


def _of_tile(*shape, queries_of_one=None):
    """A block of one tile of a head."""

    def index(b, h, i, *scalars):
        return (b, _kv_head(h, queries_of_one), i, *(0,) * len(shape))

    return pl.BlockSpec((1, 1, 1, *shape), index)


def _whole(n, *shape, queries_of_one=None):
    """A block of all tiles of a head."""

    def index(b, h, i, *scalars):
        return (b, _kv_head(h, queries_of_one), *(0,) * (1 + len(shape)))

    return pl.BlockSpec((1, 1, n, *shape), index)


def _call(static, kernel, grid, inputs, specs, out_specs, out_shape, scalars, name):
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars), grid=grid, in_specs=specs, out_specs=out_specs
        ),
        out_shape=out_shape,
        # A chip with two cores gives each of them half of the programs.
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",) * 3),
        interpret=static.interpret,
        name=name,
    )(*scalars, *inputs)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(static: _Static, q_BHND, k_BKLD, v_BKLD, stream: Stream, window):
    return _forward(static, q_BHND, k_BKLD, v_BKLD, stream, window)[0]


def _int_specs(others: _Side):
    """Of the tile at hand, and of all tiles of the other side."""

    def mine(b, h, i, *scalars):
        return (b, i, 0, 0)

    def theirs(b, h, i, *scalars):
        return (b, 0, 0, 0)

    n, W = others.n, others.W
    return [pl.BlockSpec((1, 1, W, 3), mine), pl.BlockSpec((1, n, 3, W), theirs)]


def _key_scalars(stream: Stream, window):
    counts = jnp.sum(stream.key_tiles >= 0, axis=-1, dtype=jnp.int32)
    # Those listed come first, and are as many as counted.
    order = jnp.argsort(stream.key_tiles < 0, axis=-1, stable=True)
    tiles = jnp.take_along_axis(stream.key_tiles, order, axis=-1)
    return tiles.reshape(-1), counts.reshape(-1), window.reshape(1)


def _forward(static: _Static, q_BHND, k_BKLD, v_BKLD, stream: Stream, window):
    mine, keys = _sides(stream)
    B, H, N, D = q_BHND.shape
    n, W, J, R = mine.n, mine.W, stream.key_tiles.shape[-1], H // k_BKLD.shape[1]
    (q,), (k, v) = mine.in_tiles(q_BHND), keys.in_tiles(k_BKLD, v_BKLD)
    out, log_z = _call(
        static,
        functools.partial(_forward_kernel, static, n, J),
        (B, H, n),
        [q, k, v, mine.down, keys.along],
        [_of_tile(W, D), *[_whole(keys.n, W, D, queries_of_one=R)] * 2, *_int_specs(keys)],
        [_of_tile(W, D), _of_tile(W, 1)],
        [
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((B, H, n, W, 1), jnp.float32),
        ],
        _key_scalars(stream, window),
        "stream_attention",
    )
    out, log_z = checkpoint_name((out.reshape(B, H, N, D), log_z), "attention")
    return out, (q_BHND, k_BKLD, v_BKLD, stream, window, out, log_z)


def _backward(static: _Static, residuals, d_out_BHND):
    q_BHND, k_BKLD, v_BKLD, stream, window, out_BHND, log_z = residuals
    mine, keys = _sides(stream)
    B, H, N, D = q_BHND.shape
    K = k_BKLD.shape[1]
    n, W, J, R = mine.n, mine.W, stream.key_tiles.shape[-1], H // K
    mean_BHN = jnp.sum((d_out_BHND * out_BHND).astype(jnp.float32), axis=-1)
    (q, d_out), (k, v) = (
        mine.in_tiles(q_BHND, d_out_BHND.astype(q_BHND.dtype)),
        keys.in_tiles(k_BKLD, v_BKLD),
    )
    mean = mean_BHN.reshape(B, H, n, W, 1)
    all_keys = [_whole(keys.n, W, D, queries_of_one=R)] * 2
    d_q = _call(
        static,
        functools.partial(_query_kernel, static, n, J),
        (B, H, n),
        [q, k, v, mine.down, keys.along, d_out, log_z, mean],
        [_of_tile(W, D), *all_keys, *_int_specs(keys), _of_tile(W, D), *[_of_tile(W, 1)] * 2],
        _of_tile(W, D),
        jax.ShapeDtypeStruct(q.shape, q.dtype),
        _key_scalars(stream, window),
        "stream_attention_d_query",
    )
    tiles, counts = query_lists(stream.key_tiles, keys.n)
    along = [jnp.swapaxes(x, 3, 4) for x in (log_z, mean)]
    tile_of_keys = _of_tile(W, D, queries_of_one=R)
    d_kv = jax.ShapeDtypeStruct((B, H, keys.n, W, D), jnp.float32)
    d_k, d_v = _call(
        static,
        functools.partial(_key_kernel, static, n),
        (B, H, keys.n),
        [q, k, v, keys.down, mine.along, d_out, *along],
        [
            *[_whole(n, W, D), tile_of_keys, tile_of_keys, *_int_specs(mine)],
            *[_whole(n, W, D), *[_whole(n, 1, W)] * 2],
        ],
        [_of_tile(W, D)] * 2,
        [d_kv, d_kv],
        (tiles.reshape(-1), counts.reshape(-1), window.reshape(1)),
        "stream_attention_d_key",
    )

    def of_kv_heads(x):
        return x.reshape(B, K, R, -1, D).sum(axis=2).astype(k_BKLD.dtype)

    return d_q.reshape(B, H, N, D), of_kv_heads(d_k), of_kv_heads(d_v), None, None


_attention.defvjp(_forward, _backward)
