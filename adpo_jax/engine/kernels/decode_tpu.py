"""Decode attention for TPUs: a few queries a row, which read only the columns that they see.

The stacked cache is read where it lies: the layer is a prefetched scalar, so no slice of the stack
is copied. Blocks of columns are visited from the newest back. Past the oldest column that a row
sees, the block index stays the same, so that Mosaic fetches nothing more. With a table a block is a
page: the table is prefetched too, and the block index is the page's number. The plain version is
`kv_cache.attend_part`.

Letters: K key/value heads, Q queries of a row and head, D head dim, S columns of a block.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from adpo_jax.engine.kv_cache import LayerKV, Part, Reach, block_range
from adpo_jax.model.attention import MASKED

# Columns of a block. With 8 heads of 128 in bf16 a block of keys is 256 kB.
BLOCK = 128
LANES = 128


def _kernel(
    layer_ref,
    start_ref,
    last_ref,
    length_ref,
    *rest,
    block: int,
    blocks: int,
    columns: int,
    ring: bool,
    soft_cap: float | None,
    quantized: bool,
    paged: bool,
):
    del layer_ref  # the index maps use it
    # Of the table the index maps alone know.
    q_ref, origin_ref, reach_ref, k_ref, v_ref, *rest = rest[paged:]
    k_scale_ref, v_scale_ref = rest[:2] if quantized else (None, None)
    out_ref, top_ref, total_ref = rest[2:] if quantized else rest
    row, j = pl.program_id(0), pl.program_id(1)

    @pl.when(j == 0)
    def _():
        out_ref[...] = jnp.zeros_like(out_ref)
        top_ref[...] = jnp.full_like(top_ref, MASKED)
        # The first key that a row sees makes this nothing. A row that sees none keeps it, and what
        # is divided by it is 0 and not NaN, which would spoil the slot for the next sample.
        total_ref[...] = jnp.ones_like(total_ref)

    @pl.when(j <= last_ref[row])
    def _():
        this = jax.lax.rem(start_ref[row] - j + blocks, blocks)
        at = this * block + jax.lax.broadcasted_iota(jnp.int32, origin_ref.shape[1:], 1)
        back = origin_ref[0] - at
        if ring:
            back = jnp.where(back < 0, back + columns, back)
        seen = (back <= reach_ref[0]) & (at < length_ref[row])
        # A block may reach past the last column, where memory holds any numbers.
        inside = this * block + jax.lax.broadcasted_iota(jnp.int32, v_ref.shape[3:], 0) < columns
        for head in range(q_ref.shape[1]):
            q = q_ref[0, head]
            k, v = k_ref[0, 0, head].astype(q.dtype), v_ref[0, 0, head].astype(q.dtype)
            scores = jax.lax.dot_general(
                q, k, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
            )
            if quantized:
                scores = scores * k_scale_ref[0, 0, head][None, :]
            if soft_cap is not None:
                scores = soft_cap * jnp.tanh(scores / soft_cap)
            scores = jnp.where(seen, scores, MASKED)
            old_top = top_ref[0, head]
            top = jnp.maximum(old_top, jnp.max(scores, axis=-1, keepdims=True))
            # Where the row has seen no key yet, the top is still MASKED.
            weights = jnp.where(seen, jnp.exp(scores - top[:, :1]), 0.0)
            shrink = jnp.exp(old_top - top)
            total_ref[0, head] = total_ref[0, head] * shrink + jnp.sum(
                weights, axis=-1, keepdims=True
            )
            if quantized:
                weights = weights * v_scale_ref[0, 0, head][None, :]
            v = jnp.where(inside, v, jnp.zeros_like(v))
            added = jnp.dot(weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
            out_ref[0, head] = out_ref[0, head] * shrink[:, :1] + added
            top_ref[0, head] = top


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
    columns = kv.v.shape[-2]
    block, tables = min(block, columns), ()
    if table is not None:
        block, columns = columns, columns * table.shape[1]
        tables = (table.reshape(-1).astype(jnp.int32),)
    blocks = -(-columns // block)
    quantized = kv.k_scale is not None
    start, last = block_range(reach, columns, block)
    # Tables are wide, for the longest completion; the grid is as long as the longest one there is.
    visited = blocks if table is None else jnp.max(last) + 1

    def of_row(row, j, *scalars):
        return (row, 0, 0, 0)

    def of_query(row, j, *scalars):
        return (row, 0, 0)

    def column_block(row, j, start, last):
        return jax.lax.rem(start[row] - jnp.minimum(j, last[row]) + blocks, blocks)

    def of_scales(row, j, layer, start, last, length, *tables):
        this = column_block(row, j, start, last)
        if not tables:
            return (layer[0], row, 0, this)
        (table,) = tables
        return (layer[0], table[row * blocks + this], 0, 0)

    def of_block(*args):
        return (*of_scales(*args), 0)

    # One number a query, repeated along the lanes of a vector register.
    per_query = pl.BlockSpec((1, Q, block), of_query)
    one = pl.BlockSpec((1, K, Q, LANES), of_row)
    stored = pl.BlockSpec((1, 1, K, block, D), of_block)
    in_specs = [pl.BlockSpec((1, K, Q, D), of_row), per_query, per_query, stored, stored]
    origin, reaches = (
        jnp.broadcast_to(x[..., None], (rows, Q, block)) for x in (reach.origin, reach.reach)
    )
    inputs = [q, origin, reaches, kv.k, kv.v]
    if quantized:
        in_specs += [pl.BlockSpec((1, 1, K, block), of_scales)] * 2
        inputs += [kv.k_scale, kv.v_scale]
    kernel = functools.partial(
        _kernel,
        block=block,
        blocks=blocks,
        columns=columns,
        ring=reach.ring,
        soft_cap=soft_cap,
        quantized=quantized,
        paged=bool(tables),
    )
    out, top, total = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4 + len(tables),
            grid=(rows, visited),
            in_specs=in_specs,
            out_specs=[pl.BlockSpec((1, K, Q, D), of_row), one, one],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((rows, K, Q, D), jnp.float32),
            jax.ShapeDtypeStruct((rows, K, Q, LANES), jnp.float32),
            jax.ShapeDtypeStruct((rows, K, Q, LANES), jnp.float32),
        ],
        # A chip with two cores gives each of them half of the rows.
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=interpret,
    )(jnp.reshape(index, (1,)).astype(jnp.int32), start, last, reach.length, *tables, *inputs)
    return Part(out, top[..., 0], total[..., 0])
