"""Decode attention for TPUs: a few queries a row, which read only the columns that they see.

The stacked cache stays in the device's memory. A program has some rows, and for each fetches blocks
of columns from the newest back to the oldest that the row sees. While one is at work the next ones
are on their way, as many as fast memory has room for, those of the next rows and programs too. So
what is read does not depend on how long the store is. With a table, it says in which row of the
store, a page, a block lies. The queries of all heads are worked on together, since few of them fill
no vector register. The plain version is `group_attention.attend_part`.

Letters: K key/value heads, Q queries of a row and head, N queries of a row, D head dim, S columns
of a block, A buffers for blocks, G rows of a program.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from adpo_jax.engine.group_attention import Part, Reach, block_range
from adpo_jax.engine.kv_cache import LayerKV
from adpo_jax.model.attention import MASKED

# Columns of a block.
BLOCK = 128
# The most buffers. At 1.4 TB/s and a microsecond of waiting for memory 1.4 MB are on their way.
AHEAD = 16
LANES, SUBLANES = 128, 8
# Columns that a block begins at a multiple of: rows of a tile of int8.
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
      page: columns of a page; 0 where there is no table.
    """

    K: int
    Q: int
    G: int
    A: int
    block: int
    blocks: int
    columns: int
    page: int
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


def block_of(columns: int, most: int, *, is_quantized: bool, is_page: bool = False) -> int:
    """Columns of a block: `most`, or all where they cannot be cut at whole tiles.

    The last block of a row may reach back into the one before; that of a page may not. Scales of an
    int8 cache lie along the lanes.
    """
    aligned = most if is_page else LANES if is_quantized else ALIGNED
    return columns if columns <= most or columns % aligned else most


class Cut(NamedTuple):
    """How the work is cut.

    Attributes:
      rows: of a program.
      programs: of one core of two, or of one half of the work.
      buffers: blocks that fast memory has room for.
      queries: rows of queries of a row, those of padding included.
    """

    rows: int
    programs: int
    buffers: int
    queries: int


def cut_of(q: jax.ShapeDtypeStruct, block: int, dtype) -> Cut:
    """The cut of queries [rows, K, Q, D] over blocks of keys and values of a dtype."""
    rows, K, Q, D = q.shape
    buffers = BUFFER_BYTES // (2 * K * block * D * jnp.dtype(dtype).itemsize)
    N = -(-K * Q // SUBLANES) * SUBLANES
    row_bytes = 2 * N * (D * (q.dtype.itemsize + 4) + 4 * 4 * LANES)
    most = max(1, min(ROWS, BUFFER_BYTES // row_bytes))
    programs = -(-rows // (2 * most))
    return Cut(-(-rows // (2 * programs)), programs, max(2, min(AHEAD, buffers)), N)


class _At(NamedTuple):
    """Which block, and its buffer."""

    row: jax.Array
    nth: jax.Array  # of the row, from the newest back
    buffer: jax.Array


class _Fetch:
    """Copies the blocks that rows see into buffers.

    Args:
      layer, start, count, tables: of all rows, in scalar memory.
      stored: keys, values and perhaps their scales, in the device's memory.
      buffers: [A, ...] of each.
      arrived: semaphores [A, arrays].
    """

    def __init__(self, static: _Static, layer, start, count, tables, stored, buffers, arrived):
        self._static, self._layer = static, layer[0]
        self._start, self._count, self._tables = start, count, tables
        self._stored, self._buffers, self._arrived = stored, buffers, arrived

    def columns(self, row, nth):
        """The first column that a block has of its own, and the first one that is copied.

        They are counted from the first of the row, over all its pages.
        """
        static = self._static
        this = self._start[row] - nth
        this = jnp.where(this < 0, this + static.blocks, this)
        own = this * static.block
        if static.page or static.columns % static.block == 0:
            return own, own
        return own, jnp.minimum(own, static.columns - static.block)

    def blocks(self, row):
        """How many blocks a row visits, at least one."""
        return jnp.maximum(self._count[row], 1)

    def start(self, at: _At, end) -> _At:
        """Begins to copy, unless the row is `end`; returns what comes next."""

        @pl.when(at.row < end)
        def _():
            self._each(at, lambda copy: copy.start())

        row, nth = jnp.minimum(at.row, end - 1), at.nth + 1
        is_last = nth >= self.blocks(row)
        return _At(
            jnp.where(is_last, at.row + 1, at.row),
            jnp.where(is_last, 0, nth),
            self.after(at.buffer),
        )

    def after(self, buffer):
        """The number of the next buffer."""
        return jnp.where(buffer + 1 < self._static.A, buffer + 1, 0)

    def wait(self, at: _At) -> None:
        self._each(at, lambda copy: copy.wait())

    def _each(self, at: _At, do) -> None:
        @pl.when(at.nth < self._count[at.row])
        def _():
            for copy in self._copies(at):
                do(copy)

    def _copies(self, at: _At):
        static, row = self._static, at.row
        _, first = self.columns(row, at.nth)
        if static.page:
            pages = static.columns // static.page
            row = self._tables[0][row * pages + jax.lax.div(first, static.page)]
            first = jax.lax.rem(first, static.page)
        for nth, (stored, buffer) in enumerate(zip(self._stored, self._buffers)):
            cut = slice(None)
            if stored.shape[3] != static.block:
                aligned = LANES if nth >= 2 else ALIGNED  # scales lie along the lanes
                cut = pl.ds(pl.multiple_of(first, aligned), static.block)
            yield pltpu.make_async_copy(
                stored.at[self._layer, row, :, cut],
                buffer.at[at.buffer],
                self._arrived.at[at.buffer, nth],
            )


def _kernel(static: _Static, layer, start, count, length, *refs):
    tables, refs = refs[: bool(static.page)], refs[bool(static.page) :]
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
        zero = jnp.int32(0)
        coming = _At(first_row, zero, zero)
        coming = jax.lax.fori_loop(0, static.A - 1, lambda _, at: fetch.start(at, end), coming)
        for nth, x in enumerate((*coming, zero)):
            next_ref[nth] = x

    def of_row(g, carry):
        row = first_row + g

        def visit(nth, carry):
            coming, buffer = carry
            coming = fetch.start(coming, end)

            @pl.when(count[row] > 0)
            def _():
                fetch.wait(_At(row, nth, buffer))
                below = jnp.minimum(length[row], static.columns)
                places = origin_ref[g], reach_ref[g], *fetch.columns(row, nth), below
                seen, here = _seen(static, *places), [x.at[buffer] for x in buffers]
                for heads, rows in static.work:
                    results = (ref.at[g, rows] for ref in (out_ref, top_ref, total_ref))
                    _add(static, q_ref[g, rows], heads, here, seen, *results)

            return coming, fetch.after(buffer)

        return jax.lax.fori_loop(0, fetch.blocks(row), visit, carry)

    carry = _At(*(next_ref[nth] for nth in range(3))), next_ref[3]
    coming, buffer = jax.lax.fori_loop(0, static.G, of_row, carry)
    for nth, x in enumerate((*coming, buffer)):
        next_ref[nth] = x


def _seen(static: _Static, origin, reach, own, first, below):
    """Which columns of a block, copied from `first` on, each query sees there, [N, S] bool."""
    at = first + jax.lax.broadcasted_iota(jnp.int32, (origin.shape[0], static.block), 1)
    back = origin[:, :1] - at
    if static.ring:
        back = jnp.where(back < 0, back + static.columns, back)
    seen = (back <= reach[:, :1]) & (at < below)
    return seen if own is first else seen & (at >= own)


def _add(static: _Static, q, heads: range, buffers, seen, out_ref, top_ref, total_ref) -> None:
    """Adds the attention of some heads to a block to that of a row.

    Args:
      q: [N, D], the queries of these heads, and perhaps padding.
      buffers: of keys and values, [K, S, D], and perhaps of their scales, [K, S].
      seen: [N, S] bool.
      out_ref: [N, D]; top_ref, total_ref: [N, LANES].
    """
    keys, values, *scales = buffers
    of_head = heads.start + jax.lax.div(
        jax.lax.broadcasted_iota(jnp.int32, (q.shape[0], 1), 0), static.Q
    )

    def of_own_head(product):
        """Rows [N, ...] of `product(head)`, each of its own head; all meet the keys of each."""
        found = product(heads.start)
        for h in heads[1:]:
            found = jnp.where(of_head == h, product(h), found)
        return found

    def scores_of(h):
        dimensions = (((1,), (1,)), ((), ()))
        scores = jax.lax.dot_general(
            q, keys[h].astype(q.dtype), dimensions, preferred_element_type=jnp.float32
        )
        return scores * scales[0][h][None, :] if scales else scores

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
        of_values = weights * scales[1][h][None, :] if scales else weights
        return jnp.dot(
            of_values.astype(q.dtype), values[h].astype(q.dtype), preferred_element_type=jnp.float32
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
    """As `group_attention.attend_part`, on a stacked cache with keys [L, rows, K, columns, D]."""
    rows, K, Q, D = q.shape
    page, tables = kv.v.shape[-2], ()
    columns = page
    is_quantized = kv.k_scale is not None
    block = block_of(page, block, is_quantized=is_quantized, is_page=table is not None)
    if table is not None:
        columns = page * table.shape[1]
        tables = (table.reshape(-1).astype(jnp.int32),)
    start, last = block_range(reach, columns, block)
    sees = jnp.any(reach.back >= 0, axis=1) & (reach.length > 0)
    count = jnp.where(sees, last + 1, 0)
    G, programs, A, N = cut_of(q, block, kv.k.dtype)
    # A chip with two cores gives each of them half of the programs.
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
        A=A,
        block=block,
        blocks=-(-columns // block),
        columns=columns,
        page=page if tables else 0,
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
                *(pltpu.VMEM((A, *size), x.dtype) for size, x in zip(buffers, stored)),
                pltpu.SemaphoreType.DMA((A, len(stored))),
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
        of_queries(reach.back),
        *stored,
    )

    def of_heads(x):
        return x[:rows, : K * Q].reshape(rows, K, Q, -1)

    return Part(of_heads(out), of_heads(top)[..., 0], of_heads(total)[..., 0])
