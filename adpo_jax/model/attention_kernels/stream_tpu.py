"""Training attention over a packed stream for TPUs: no scores in memory, no tile visited in vain.

A program is one tile of queries (forward, their gradient) or of keys (their gradient) of one head.
It walks the list of tiles that see each other with a running softmax (Dao et al. 2022, arXiv
2205.14135). A side of a head that is short enough lies whole in VMEM; of a longer one each tile is
fetched while the one before is at work. The plain version is `tile_attention.stream_attention`.

Letters: B streams, N tokens of one, n tiles, L keys, m tiles of them, W tokens of a tile, J listed
key tiles, H heads, K key/value heads, D head dim.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from adpo_jax.model.attention import MASKED, LayerInfo, Places, visible
from adpo_jax.model.tile_attention import Saved, Stream

# Bytes of VMEM for two whole sides of a head, each with room to fetch the next one ahead.
VMEM_BYTES = 12 * 2**20
# The lists of tiles lie in scalar memory: so many numbers of each.
MAX_LISTED = 2**17


@dataclasses.dataclass(frozen=True)
class _Static:
    scale: float
    soft_cap: float | None
    interpret: bool

    @classmethod
    def of(cls, *, scale, soft_cap=None, interpret=False) -> "_Static":
        return cls(scale, soft_cap, interpret)


def limit(num_tiles: int, num_key_tiles: int) -> str:
    """Why a stream of so many tiles is too long; empty if it is not.

    The head_dim is a multiple of 128.
    """
    if num_tiles * num_key_tiles <= MAX_LISTED:
        return ""
    return (
        f"holds lists of {MAX_LISTED} tiles in a core's scalar memory; given {num_tiles} tiles of "
        f"queries that may see {num_key_tiles} tiles of keys"
    )


def is_near(num_tokens: int, head_dim: int, itemsize: int) -> bool:
    """Whether a side of so many tokens lies whole in a core's fast memory."""
    return num_tokens <= VMEM_BYTES // (4 * head_dim * itemsize)


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
    window = jnp.asarray(layer.window, jnp.int32)
    return _turned(_attention(static, *_turned(q, k, v), stream, window))


def forward(q, k, v, layer: LayerInfo, stream: Stream, **settings) -> Saved:
    """What `attend` gives, and what it keeps; `settings` as there."""
    window = jnp.asarray(layer.window, jnp.int32)
    out, log_z = _run_forward(_Static.of(**settings), *_turned(q, k, v), stream, window)
    return Saved(_turned(out), log_z.reshape(log_z.shape[0], log_z.shape[1], -1))


def gradients(q, k, v, layer: LayerInfo, stream: Stream, saved: Saved, d_out, **settings):
    """Those of q, k and v, where `saved` may be of more keys than these; `settings` as `attend`."""
    window = jnp.asarray(layer.window, jnp.int32)
    log_z_BHnW1 = saved.log_z.reshape(*saved.log_z.shape[:2], -1, stream.tile, 1)
    residuals = *_turned(q, k, v), stream, window, _turned(saved.out), log_z_BHnW1
    d_q, d_k, d_v, *_ = _backward(_Static.of(**settings), residuals, _turned(d_out))
    return _turned(d_q, d_k, d_v)


def _turned(*arrays):
    """[B, H, N, D] of [B, N, H, D], or the other way round; of one array alone that one."""
    turned = tuple(jnp.swapaxes(x, 1, 2) for x in arrays)
    return turned if len(turned) > 1 else turned[0]


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

    def __init__(self, tokens: Places, tile: int):
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


def _down(x_W3) -> Places:
    return Places(x_W3[:, 0:1], x_W3[:, 1:2], x_W3[:, 2:3])


def _along(x_3W) -> Places:
    return Places(x_3W[0:1], x_3W[1:2], x_3W[2:3])


def _dot(a, b, contract: tuple[int, int]):
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)


def _capped(static: _Static, scores):
    """Scores under the soft cap, and its derivative."""
    if static.soft_cap is None:
        return scores, 1.0
    tanh = jnp.tanh(scores / static.soft_cap)
    return static.soft_cap * tanh, 1.0 - tanh * tanh


class _Other(NamedTuple):
    """An array of the side that a program walks, in tiles.

    Attributes:
      tiles: [B, heads, tiles, ...], or [B, tiles, ...] of integers that all heads share.
      heads_of_one: query heads that share one of its heads; 0 where all do.
    """

    tiles: jax.Array
    heads_of_one: int

    @property
    def tile_shape(self) -> tuple[int, ...]:
        return self.tiles.shape[3 if self.heads_of_one else 2 :]

    def row(self, b, h) -> tuple:
        """The index of its tiles for a stream and a query head."""
        if not self.heads_of_one:
            return (b,)
        return b, h if self.heads_of_one == 1 else jax.lax.div(h, self.heads_of_one)

    @property
    def near_spec(self) -> pl.BlockSpec:
        """A block of all tiles of a head."""

        def index(b, h, i, *scalars):
            return *self.row(b, h), *(0,) * (1 + len(self.tile_shape))

        lead = (1, 1) if self.heads_of_one else (1,)
        return pl.BlockSpec((*lead, *self.tiles.shape[len(lead) :]), index)


class _Walk:
    """The tiles of the other side that the tile at hand sees, one after the other.

    Args:
      others: the arrays, whose refs are `refs`.
      listed: how many tiles a list has room for.
      near: whether the refs are those of `near_spec`, or of whole arrays in the device's memory.
      scratch: where far tiles go: buffers for two tiles of each array, and their semaphores.

    Attributes:
      window: that of the layer.
    """

    def __init__(self, others, listed: int, near: bool, tiles, counts, window, refs, scratch):
        b, h, i = (pl.program_id(axis) for axis in range(3))
        at, self._rows = b * pl.num_programs(2) + i, [one.row(b, h) for one in others]
        self._others, self._near, self._tiles = others, near, tiles
        self._first, self._count = at * listed, counts[at]
        self._refs, self._scratch, self.window = refs, scratch, window[0]

    def __call__(self, visit: Callable, carry):
        """Runs `visit(carry, *tiles of the arrays) -> carry`."""
        if self._near:

            def at_hand(j, carry):
                t = self._tiles[self._first + j]
                places = ((0, 0, t) if one.heads_of_one else (0, t) for one in self._others)
                return visit(carry, *(ref[at] for ref, at in zip(self._refs, places)))

            return jax.lax.fori_loop(0, self._count, at_hand, carry)

        @pl.when(self._count > 0)
        def _():
            self._fetch(0)

        def fetched(j, carry):
            @pl.when(j + 1 < self._count)
            def _():
                self._fetch(j + 1)

            for copy in self._copies(j):
                copy.wait()
            *buffers, _ = self._scratch
            return visit(carry, *(buffer[jax.lax.rem(j, 2)] for buffer in buffers))

        return jax.lax.fori_loop(0, self._count, fetched, carry)

    def _fetch(self, j) -> None:
        for copy in self._copies(j):
            copy.start()

    def _copies(self, j) -> list:
        """The copies of the j-th listed tile of each array into one of its two buffers."""
        t, slot = self._tiles[self._first + j], jax.lax.rem(j, 2)
        *buffers, arrived = self._scratch
        return [
            pltpu.make_async_copy(ref.at[(*row, t)], buffer.at[slot], arrived.at[slot, nth])
            for nth, (row, ref, buffer) in enumerate(zip(self._rows, self._refs, buffers))
        ]


def _forward_kernel(static, walk, q, mine, out, log_z):
    query = q[0, 0, 0] * jnp.asarray(static.scale, q.dtype)
    queries = _down(mine[0, 0])

    def visit(carry, k, v, theirs):
        total_out, top, total = carry
        scores, _ = _capped(static, _dot(query, k, (1, 1)))
        seen = visible(queries, _along(theirs), walk.window)
        scores = jnp.where(seen, scores, MASKED)
        new_top = jnp.maximum(top, jnp.max(scores, axis=-1, keepdims=True))
        weights = jnp.where(seen, jnp.exp(scores - new_top), 0.0)
        shrink = jnp.exp(top - new_top)
        added = _dot(weights.astype(v.dtype), v, (1, 0))
        total = total * shrink + jnp.sum(weights, axis=-1, keepdims=True)
        return total_out * shrink + added, new_top, total

    W, D = query.shape
    zeros = jnp.zeros((W, 1), jnp.float32)
    first = (jnp.zeros((W, D), jnp.float32), zeros + MASKED, zeros)
    total_out, top, total = walk(visit, first)
    # Padding sees nothing.
    total = jnp.where(total > 0, total, 1.0)
    out[0, 0, 0] = (total_out / total).astype(out.dtype)
    log_z[0, 0, 0] = top + jnp.log(total)


def _query_kernel(static, walk, q, mine, d_out, log_z, mean, d_q):
    scale = jnp.asarray(static.scale, q.dtype)
    query, queries = q[0, 0, 0] * scale, _down(mine[0, 0])

    def visit(grad, k, v, theirs):
        scores, slope = _capped(static, _dot(query, k, (1, 1)))
        seen = visible(queries, _along(theirs), walk.window)
        weights = jnp.where(seen, jnp.exp(scores - log_z[0, 0, 0]), 0.0)
        d_weights = _dot(d_out[0, 0, 0], v, (1, 1))
        d_scores = weights * (d_weights - mean[0, 0, 0]) * slope
        return grad + _dot(d_scores.astype(k.dtype), k, (1, 0))

    grad = walk(visit, jnp.zeros(query.shape, jnp.float32))
    d_q[0, 0, 0] = (grad * static.scale).astype(d_q.dtype)


def _key_kernel(static, walk, k, v, mine, d_k, d_v):
    """Keys down the rows, queries along the lanes."""
    key, value, keys = k[0, 0, 0], v[0, 0, 0], _down(mine[0, 0])
    scale = jnp.asarray(static.scale, k.dtype)

    def visit(grads, query, d_out, theirs, log_z, mean):
        grad_k, grad_v = grads
        query = query * scale
        scores, slope = _capped(static, _dot(key, query, (1, 1)))
        seen = visible(_along(theirs), keys, walk.window)
        weights = jnp.where(seen, jnp.exp(scores - log_z), 0.0)
        grad_v = grad_v + _dot(weights.astype(query.dtype), d_out, (1, 0))
        d_weights = _dot(value, d_out, (1, 1))
        d_scores = weights * (d_weights - mean) * slope
        return grad_k + _dot(d_scores.astype(query.dtype), query, (1, 0)), grad_v

    zeros = jnp.zeros(key.shape, jnp.float32)
    d_k[0, 0, 0], d_v[0, 0, 0] = walk(visit, (zeros, zeros))


def _tile_spec(*shape, heads_of_one: int = 1) -> pl.BlockSpec:
    """A block of one tile of a head."""

    def index(b, h, i, *scalars):
        head = h if heads_of_one == 1 else jax.lax.div(h, heads_of_one)
        return (b, head, i, *(0,) * len(shape))

    return pl.BlockSpec((1, 1, 1, *shape), index)


def _tile_ints_spec(tile: int) -> pl.BlockSpec:
    return pl.BlockSpec((1, 1, tile, 3), lambda b, h, i, *scalars: (b, i, 0, 0))


def _call(static, kernel, grid, mine, others: list[_Other], lists, window, outs, name):
    """Runs a kernel for every tile of one side.

    Args:
      kernel: (static, walk, *refs of mine, *refs of outs).
      mine: (array, block) for each array of this side.
      lists: (tiles, counts), which tiles of the other side each tile of this side sees.
      outs: (shape, block) for each result.
    """
    D, itemsize = others[0].tile_shape[-1], others[0].tiles.dtype.itemsize
    num_tokens = others[0].tiles.shape[2] * others[0].tile_shape[0]
    near, (tiles, counts) = is_near(num_tokens, D, itemsize), lists
    scratch = []
    if not near:
        scratch = [pltpu.VMEM((2, *one.tile_shape), one.tiles.dtype) for one in others]
        scratch.append(pltpu.SemaphoreType.DMA((2, len(others))))
    whole = pl.BlockSpec(memory_space=pl.ANY)
    arrays, specs = zip(*mine)
    shapes, out_specs = zip(*outs)

    def run(tiles, counts, window, *refs):
        own, refs = refs[: len(mine)], refs[len(mine) :]
        theirs, refs = refs[: len(others)], refs[len(others) :]
        results, buffers = refs[: len(outs)], refs[len(outs) :]
        walk = _Walk(others, lists[0].shape[-1], near, tiles, counts, window, theirs, buffers)
        kernel(static, walk, *own, *results)

    return pl.pallas_call(
        run,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=grid,
            in_specs=[*specs, *(one.near_spec if near else whole for one in others)],
            out_specs=list(out_specs),
            scratch_shapes=scratch,
        ),
        out_shape=list(shapes),
        # A chip with two cores gives each of them half of the programs.
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",) * 3),
        interpret=static.interpret,
        name=name,
    )(
        tiles.reshape(-1),
        counts.reshape(-1),
        window.reshape(1),
        *arrays,
        *(one.tiles for one in others),
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(static: _Static, q_BHND, k_BKLD, v_BKLD, stream: Stream, window):
    return _forward(static, q_BHND, k_BKLD, v_BKLD, stream, window)[0]


def _key_lists(stream: Stream) -> tuple[jax.Array, jax.Array]:
    """The key tiles of each query tile, those listed first, and their counts."""
    counts = jnp.sum(stream.key_tiles >= 0, axis=-1, dtype=jnp.int32)
    order = jnp.argsort(stream.key_tiles < 0, axis=-1, stable=True)
    return jnp.take_along_axis(stream.key_tiles, order, axis=-1), counts


def _forward(static: _Static, q_BHND, k_BKLD, v_BKLD, stream: Stream, window):
    found = _run_forward(static, q_BHND, k_BKLD, v_BKLD, stream, window)
    out, log_z = checkpoint_name(found, "attention")
    return out, (q_BHND, k_BKLD, v_BKLD, stream, window, out, log_z)


def _run_forward(static: _Static, q_BHND, k_BKLD, v_BKLD, stream: Stream, window):
    mine, keys = _sides(stream)
    B, H, N, D = q_BHND.shape
    n, W, R = mine.n, mine.W, H // k_BKLD.shape[1]
    (q,), (k, v) = mine.in_tiles(q_BHND), keys.in_tiles(k_BKLD, v_BKLD)
    log_z = jax.ShapeDtypeStruct((B, H, n, W, 1), jnp.float32)
    out, log_z = _call(
        static,
        _forward_kernel,
        (B, H, n),
        [(q, _tile_spec(W, D)), (mine.down, _tile_ints_spec(W))],
        [_Other(k, R), _Other(v, R), _Other(keys.along, 0)],
        _key_lists(stream),
        window,
        [(jax.ShapeDtypeStruct(q.shape, q.dtype), _tile_spec(W, D)), (log_z, _tile_spec(W, 1))],
        "stream_attention",
    )
    return out.reshape(B, H, N, D), log_z


def _backward(static: _Static, residuals, d_out_BHND):
    q_BHND, k_BKLD, v_BKLD, stream, window, out_BHND, log_z = residuals
    mine, keys = _sides(stream)
    B, H, N, D = q_BHND.shape
    K = k_BKLD.shape[1]
    n, W, R = mine.n, mine.W, H // K
    mean_BHN = jnp.sum((d_out_BHND * out_BHND).astype(jnp.float32), axis=-1)
    q, d_out = mine.in_tiles(q_BHND, d_out_BHND.astype(q_BHND.dtype))
    k, v = keys.in_tiles(k_BKLD, v_BKLD)
    mean = mean_BHN.reshape(B, H, n, W, 1)
    query_spec = _tile_spec(W, 1)
    (d_q,) = _call(
        static,
        _query_kernel,
        (B, H, n),
        [
            (q, _tile_spec(W, D)),
            (mine.down, _tile_ints_spec(W)),
            (d_out, _tile_spec(W, D)),
            (log_z, query_spec),
            (mean, query_spec),
        ],
        [_Other(k, R), _Other(v, R), _Other(keys.along, 0)],
        _key_lists(stream),
        window,
        [(jax.ShapeDtypeStruct(q.shape, q.dtype), _tile_spec(W, D))],
        "stream_attention_d_query",
    )
    along = [_Other(jnp.swapaxes(x, 3, 4), 1) for x in (log_z, mean)]
    key_spec = _tile_spec(W, D, heads_of_one=R)
    d_kv = jax.ShapeDtypeStruct((B, H, keys.n, W, D), jnp.float32)
    d_k, d_v = _call(
        static,
        _key_kernel,
        (B, H, keys.n),
        [(k, key_spec), (v, key_spec), (keys.down, _tile_ints_spec(W))],
        [_Other(q, 1), _Other(d_out, 1), _Other(mine.along, 0), *along],
        query_lists(stream.key_tiles, keys.n),
        window,
        [(d_kv, _tile_spec(W, D))] * 2,
        "stream_attention_d_key",
    )

    def summed_by_kv_head(x):
        return x.reshape(B, K, R, -1, D).sum(axis=2).astype(k_BKLD.dtype)

    return d_q.reshape(B, H, N, D), summed_by_kv_head(d_k), summed_by_kv_head(d_v), None, None


_attention.defvjp(_forward, _backward)
