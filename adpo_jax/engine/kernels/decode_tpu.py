"""Decode attention for TPUs: a few queries a row, which read only the columns that they see.

The stacked cache stays in the device's memory. A program has some rows, and for each fetches blocks
of columns from the newest back to the oldest that the row sees, two at a time. While these are at
work the next ones are on their way, as many as fast memory has room for, those of the next rows and
programs too. So what is read does not depend on how long the store is. With a table, it says in
which row of the store, a page, a block lies. The queries of all heads are worked on together, since
few of them fill no vector register. The plain version is `kv_cache.attend_part`.

Letters: K key/value heads, Q queries of a row and head, N queries of a row, D head dim, S columns
of a block, T blocks at a time, A buffers for so many, G rows of a program.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from adpo_jax.engine.kv_cache import LayerKV, Part, Reach, block_range
from adpo_jax.model.attention import MASKED

# Columns of a block, and blocks that are worked on at a time.
BLOCK, TOGETHER = 128, 2
# The most buffers. At 1.4 TB/s and a microsecond of waiting for memory 1.4 MB are on their way.
AHEAD = 8
LANES, SUBLANES = 128, 8
# Columns that a block starts at a multiple of: rows of a tile of int8.
ALIGNED = 32
# Rows of a program.
ROWS = 8
# Bytes of fast memory for keys and values, and as many for queries and results.
BUFFER_BYTES = 6 * 2**20


class _Static(NamedTuple):
    """Static settings of the kernel.

    Attributes:
      columns: those of a row of the store, or of all pages of a row together.
      blocks: blocks of a row, over all its pages.
      of_page: blocks of a page; 0 where there is no table.
    """

    K: int
    Q: int
    G: int
    T: int
    A: int
    block: int
    blocks: int
    columns: int
    of_page: int
    ring: bool
    soft_cap: float | None

    @property
    def alone(self) -> bool:
        """Whether the queries of a head fill vector registers."""
        return self.Q % SUBLANES == 0

    @property
    def work(self) -> list[tuple[range, slice]]:
        """The heads that are worked on together, and their rows among the queries.

        Heads whose queries fill registers are worked on one by one. Of others all queries meet the
        keys of every head, since a matrix unit takes eight rows as fast as one.
        """
        if not self.alone:
            return [(range(self.K), slice(None))]
        return [(range(h, h + 1), slice(h * self.Q, (h + 1) * self.Q)) for h in range(self.K)]


def block_of(columns: int, most: int, *, is_quantized: bool) -> int:
    """Columns of a block: `most`, or fewer, or all where they cannot be cut at whole tiles."""
    size = math.gcd(columns, most)
    return columns if size % ALIGNED or (is_quantized and size % LANES) else size


class _At(NamedTuple):
    """Which blocks, and their buffer."""

    row: jax.Array
    chunk: jax.Array  # the T blocks from the chunk T-th on
    buffer: jax.Array


class _Fetch:
    """Copies the blocks that rows see into buffers.

    Args:
      layer, start, count, tables: of all rows, in scalar memory.
      stored: keys, values and perhaps their scales, in the device's memory.
      buffers: [A, T, ...] of each.
      arrived: semaphores [A, T, arrays].
    """

    def __init__(self, static: _Static, layer, start, count, tables, stored, buffers, arrived):
        self._static, self._layer = static, layer[0]
        self._start, self._count, self._tables = start, count, tables
        self._stored, self._buffers, self._arrived = stored, buffers, arrived

    def number(self, row, at):
        """The number of the block that is visited `at`-th, from 0."""
        blocks = self._static.blocks
        behind = jax.lax.rem(at, blocks)
        this = self._start[row] - behind
        return jnp.where(this < 0, this + blocks, this)

    def chunks(self, row):
        """How many chunks a row has, at least one."""
        return jnp.maximum(jax.lax.div(self._count[row] + self._static.T - 1, self._static.T), 1)

    def start(self, at: _At, end) -> _At:
        """Begins to copy, unless the row is `end`; returns what comes next."""

        @pl.when(at.row < end)
        def _():
            self._each(at, lambda copy: copy.start())

        row, chunk = jnp.minimum(at.row, end - 1), at.chunk + 1
        is_last = chunk >= self.chunks(row)
        buffer = jnp.where(at.buffer + 1 < self._static.A, at.buffer + 1, 0)
        return _At(jnp.where(is_last, at.row + 1, at.row), jnp.where(is_last, 0, chunk), buffer)

    def wait(self, at: _At) -> None:
        self._each(at, lambda copy: copy.wait())

    def _each(self, at: _At, do) -> None:
        for t in range(self._static.T):
            nth = at.chunk * self._static.T + t

            @pl.when(nth < self._count[at.row])
            def _(nth=nth, t=t):
                for copy in self._copies(at.row, nth, at.buffer, t):
                    do(copy)

    def _copies(self, row, at, into, t):
        static, this = self._static, self.number(row, at)
        if static.of_page:
            pages = static.blocks // static.of_page
            page = self._tables[0][row * pages + jax.lax.div(this, static.of_page)]
            row, this = page, jax.lax.rem(this, static.of_page)
        cut = pl.ds(pl.multiple_of(this * static.block, static.block), static.block)
        for nth, (stored, buffer) in enumerate(zip(self._stored, self._buffers)):
            if stored.shape[3] == static.block:
                cut = slice(None)
            yield pltpu.make_async_copy(
                stored.at[self._layer, row, :, cut],
                buffer.at[into, t],
                self._arrived.at[into, t, nth],
            )


def _kernel(static: _Static, layer, start, count, length, *refs):
    tables, refs = refs[: bool(static.of_page)], refs[bool(static.of_page) :]
    q_ref, origin_ref, reach_ref, *refs = refs
    arrays = (len(refs) - 5) // 2  # two of keys and values, or four with their scales
    stored, refs = refs[:arrays], refs[arrays:]
    out_ref, top_ref, total_ref, *buffers, arrived, next_ref = refs
    core, i, programs = pl.program_id(0), pl.program_id(1), pl.num_programs(1)
    first_row = (core * programs + i) * static.G
    end = (core + 1) * programs * static.G
    fetch = _Fetch(static, layer, start, count, tables, stored, buffers, arrived)
    out_ref[...] = jnp.zeros_like(out_ref)
    top_ref[...] = jnp.full_like(top_ref, MASKED)
    # The first key that a row sees makes this nothing. A row that sees none keeps it, and what
    # is divided by it is 0 and not NaN, which would spoil the slot for the next sample.
    total_ref[...] = jnp.ones_like(total_ref)

    @pl.when(i == 0)
    def _():
        # Scores of what is not fetched are masked, but a value that is NaN would stay in the sum.
        for buffer in buffers[1::2]:
            buffer[...] = jnp.zeros_like(buffer)
        zero = jnp.int32(0)
        coming = _At(first_row, zero, zero)
        coming = jax.lax.fori_loop(0, static.A - 1, lambda _, at: fetch.start(at, end), coming)
        for nth, x in enumerate((*coming, zero)):
            next_ref[nth] = x

    def of_row(g, carry):
        row = first_row + g

        def visit(chunk, carry):
            coming, buffer = carry
            here = _At(row, chunk, buffer)
            coming = fetch.start(coming, end)
            fetch.wait(here)
            seen = []
            for t in range(static.T):
                nth = chunk * static.T + t
                # A block that is not there has no columns.
                below = jnp.where(nth < count[row], jnp.minimum(length[row], static.columns), 0)
                first = fetch.number(row, nth) * static.block
                seen.append(_seen(static, origin_ref[g], reach_ref[g], first, below))
            seen = jnp.concatenate(seen, axis=1)
            arrived_here = [x.at[buffer] for x in buffers]
            for heads, rows in static.work:
                results = (ref.at[g, rows] for ref in (out_ref, top_ref, total_ref))
                _add(static, q_ref[g, rows], heads, arrived_here, seen, *results)
            return coming, jnp.where(buffer + 1 < static.A, buffer + 1, 0)

        return jax.lax.fori_loop(0, fetch.chunks(row), visit, carry)

    carry = _At(*(next_ref[nth] for nth in range(3))), next_ref[3]
    coming, buffer = jax.lax.fori_loop(0, static.G, of_row, carry)
    for nth, x in enumerate((*coming, buffer)):
        next_ref[nth] = x


def _seen(static: _Static, origin, reach, first, below):
    """Which columns of a block each query sees, [N, S] bool."""
    at = first + jax.lax.broadcasted_iota(jnp.int32, (origin.shape[0], static.block), 1)
    back = origin[:, :1] - at
    if static.ring:
        back = jnp.where(back < 0, back + static.columns, back)
    return (back <= reach[:, :1]) & (at < below)


def _add(static: _Static, q, heads: range, buffers, seen, out_ref, top_ref, total_ref) -> None:
    """Adds the attention of some heads to some blocks to that of a row.

    Args:
      q: [N, D], the queries of these heads, and perhaps padding.
      buffers: of keys and values, [T, K, S, D], and perhaps of their scales, [T, K, S].
      seen: [N, T S] bool.
      out_ref: [N, D]; top_ref, total_ref: [N, LANES].
    """
    keys, values, *scales = buffers
    of_head = heads.start + jax.lax.div(
        jax.lax.broadcasted_iota(jnp.int32, (q.shape[0], 1), 0), static.Q
    )

    def columns_of(ref, h):
        return ref[:, h].reshape(-1, ref.shape[-1]).astype(q.dtype)

    def scale_of(ref, h):
        return jnp.concatenate([ref[t, h][None, :] for t in range(static.T)], axis=1)

    def of_own_head(product):
        """Rows [N, ...] of `product(head)`, each of its own head; all meet the keys of each."""
        found = product(heads.start)
        for h in heads[1:]:
            found = jnp.where(of_head == h, product(h), found)
        return found

    def scores_of(h):
        dimensions = (((1,), (1,)), ((), ()))
        scores = jax.lax.dot_general(
            q, columns_of(keys, h), dimensions, preferred_element_type=jnp.float32
        )
        return scores * scale_of(scales[0], h) if scales else scores

    scores = of_own_head(scores_of)
    if static.soft_cap is not None:
        scores = static.soft_cap * jnp.tanh(scores / static.soft_cap)
    scores = jnp.where(seen, scores, MASKED)
    old_top = top_ref[...]
    top = jnp.maximum(old_top, jnp.max(scores, axis=-1, keepdims=True))
    # Where the row has seen no key yet, the top is still MASKED.
    weights = jnp.where(seen, jnp.exp(scores - top[:, :1]), 0.0)
    shrink = jnp.exp(old_top - top)
    total_ref[...] = total_ref[...] * shrink + jnp.sum(weights, axis=-1, keepdims=True)
    top_ref[...] = top

    def added(h):
        of_values = weights * scale_of(scales[1], h) if scales else weights
        return jnp.dot(
            of_values.astype(q.dtype), columns_of(values, h), preferred_element_type=jnp.float32
        )

    out_ref[...] = out_ref[...] * shrink[:, :1] + of_own_head(added)


def attend_part(
    q: jax.Array,
    kv: LayerKV,
    index,
    reach: Reach,
    table: jax.Array | None = None,
    *,
    soft_cap: float | None = None,
    interpret: bool = False,
    block: int = BLOCK,
) -> Part:
    """As `kv_cache.attend_part`, on a stacked cache with keys [L, rows, K, columns, D]."""
    rows, K, Q, D = q.shape
    page, tables = kv.v.shape[-2], ()
    columns = page
    is_quantized = kv.k_scale is not None
    block = block_of(page, block, is_quantized=is_quantized)
    if table is not None:
        columns = page * table.shape[1]
        tables = (table.reshape(-1).astype(jnp.int32),)
    start, last = block_range(reach, columns, block)
    sees = jnp.any(reach.reach >= 0, axis=1) & (reach.length > 0)
    count = jnp.where(sees, last + 1, 0)
    block_bytes = 2 * K * block * D * kv.k.dtype.itemsize
    T = BUFFER_BYTES // (2 * block_bytes)
    T = max(1, min(T, -(-TOGETHER * BLOCK // block), columns // block))
    A = max(2, min(AHEAD, BUFFER_BYTES // (T * block_bytes)))
    N = -(-K * Q // SUBLANES) * SUBLANES
    row_bytes = 2 * N * (D * (q.dtype.itemsize + 4) + 4 * 4 * LANES)
    # A chip with two cores gives each of them half of the programs.
    G = max(1, min(ROWS, -(-rows // 2), BUFFER_BYTES // row_bytes))
    programs = -(-rows // (2 * G))
    padded = 2 * G * programs

    def of_rows(x, *more):
        return jnp.pad(x, [(0, padded - rows), *more])

    def of_queries(x):  # [rows, Q] -> [padded, Q or N, LANES]
        if not static.alone:
            x = jnp.broadcast_to(x[:, None], (rows, K, Q)).reshape(rows, K * Q)
            x = jnp.pad(x, [(0, 0), (0, N - K * Q)])
        x = of_rows(x, (0, 0))
        return jnp.broadcast_to(x[..., None], (*x.shape, LANES))

    static = _Static(
        K=K,
        Q=Q,
        G=G,
        T=T,
        A=A,
        block=block,
        blocks=columns // block,
        columns=columns,
        of_page=page // block if tables else 0,
        ring=reach.ring,
        soft_cap=soft_cap,
    )

    def per_query(queries, size):
        return pl.BlockSpec(
            (G, queries, size), lambda core, i, *scalars: (core * programs + i, 0, 0)
        )

    places = [per_query(Q if static.alone else N, LANES)] * 2
    stored = [x for x in kv if x is not None]
    whole = pl.BlockSpec(memory_space=pl.ANY)
    buffers = [(K, block, D)] * 2 + [(K, block)] * (len(stored) - 2)
    out, top, total = pl.pallas_call(
        functools.partial(_kernel, static),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4 + len(tables),
            grid=(2, programs),
            in_specs=[per_query(N, D), *places, *[whole] * len(stored)],
            out_specs=[per_query(N, size) for size in (D, LANES, LANES)],
            scratch_shapes=[
                *(pltpu.VMEM((A, T, *size), x.dtype) for size, x in zip(buffers, stored)),
                pltpu.SemaphoreType.DMA((A, T, len(stored))),
                pltpu.SMEM((4,), jnp.int32),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((padded, N, size), jnp.float32) for size in (D, LANES, LANES)
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=interpret,
        name="decode_pages" if tables else "decode_ring" if reach.ring else "decode_prompts",
    )(
        jnp.reshape(index, (1,)).astype(jnp.int32),
        *(of_rows(x) for x in (start, count, reach.length)),
        *tables,
        of_rows(q.reshape(rows, K * Q, D), (0, N - K * Q), (0, 0)),
        of_queries(reach.origin),
        of_queries(reach.reach),
        *stored,
    )

    def of_heads(x):
        return x[:rows, : K * Q].reshape(rows, K, Q, -1)

    return Part(of_heads(out), of_heads(top)[..., 0], of_heads(total)[..., 0])
