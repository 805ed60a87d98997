"""Decode attention for GPUs in Triton; there is one program for each row and key/value head.

A program walks the blocks of columns that its row sees, from the newest back, with a running
softmax. With a table it looks up which row of the store, a page, holds a block. The plain version
is `group_attention.attend_part`.

Letters: K key/value heads, Q queries of a row and head, D head dim, S columns of a block.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from adpo_jax.engine.group_attention import Part, Reach, block_range
from adpo_jax.engine.kv_cache import KV, LayerKV
from adpo_jax.model import attention_choice
from adpo_jax.model.attention import MASKED
from adpo_jax.model.triton import plt

# Of 32 ways to cut it, the fastest on an H200 (0.139 ms for 232 rows of 8 heads that see 483 MB).
BLOCK, WARPS, STAGES = 64, 4, 3
# The smallest side of a matrix product on tensor cores.
MIN_QUERIES = 16


def obstacle(device: jax.Device | None = None) -> str:
    """Why the kernel runs on no GPU, or not on this one; empty where it does."""
    if plt is None:
        return f"needs Pallas' Triton backend, which jax {jax.__version__} does not have"
    return attention_choice.old_gpu(device)


def _kernel(
    index_ref,
    start_ref,
    last_ref,
    length_ref,
    q_ref,
    origin_ref,
    reach_ref,
    k_ref,
    v_ref,
    *rest,
    padded: int,
    block: int,
    blocks: int,
    columns: int,
    ring: bool,
    soft_cap: float | None,
):
    table_ref = rest[0] if len(rest) == 4 else None
    out_ref, top_ref, total_ref = rest[-3:]
    row, head = pl.program_id(0), pl.program_id(1)
    layer, start, length = index_ref[0], start_ref[row], length_ref[row]
    queries, D = q_ref.shape[2:]
    query = jnp.arange(padded)
    real = query < queries
    # Beyond the arrays a mask holds; jax 0.12 refuses a start that it knows to lead there.
    whole = pl.ds(row * 0, padded)
    mine = (row, head, whole)
    q = plt.load(q_ref.at[*mine, slice(None)], mask=real[:, None], other=0)
    origin = plt.load(origin_ref.at[row, whole], mask=real, other=0)
    reach = plt.load(reach_ref.at[row, whole], mask=real, other=-1)

    def visit(j, carry):
        out, top, total = carry
        this = jax.lax.rem(start - j + blocks, blocks)
        at = this * block + jnp.arange(block)
        back = origin[:, None] - at[None, :]
        if ring:
            back = jnp.where(back < 0, back + columns, back)
        seen = (back <= reach[:, None]) & (at[None, :] < jnp.minimum(length, columns))
        # What no query sees is not read: on average that is a block of each row.
        read = (jnp.max(seen.astype(jnp.int32), axis=0) > 0)[:, None]
        stored, first = row, this * block
        if table_ref is not None:
            of_page = k_ref.shape[-2] // block
            stored, first = table_ref[row, this // of_page], jax.lax.rem(this, of_page) * block
        here = (layer, stored, head, pl.ds(first, block), slice(None))
        k = plt.load(k_ref.at[here], mask=read, other=0).astype(q.dtype)
        v = plt.load(v_ref.at[here], mask=read, other=0).astype(q.dtype)
        scores = plt.dot(q, k, trans_b=True)
        if soft_cap is not None:
            scores = soft_cap * (2 / (1 + jnp.exp(-2 * scores / soft_cap)) - 1)  # tanh
        scores = jnp.where(seen, scores, MASKED)
        new_top = jnp.maximum(top, jnp.max(scores, axis=1))
        weights = jnp.where(seen, jnp.exp(scores - new_top[:, None]), 0.0)
        shrink = jnp.exp(top - new_top)
        total = total * shrink + jnp.sum(weights, axis=1)
        out = out * shrink[:, None] + plt.dot(weights.astype(v.dtype), v)
        return out, new_top, total

    first = (
        jnp.zeros((padded, D), jnp.float32),
        jnp.full((padded,), MASKED, jnp.float32),
        # As on a TPU: what is divided by the total of a row that sees no key is 0, not NaN.
        jnp.ones((padded,), jnp.float32),
    )
    out, top, total = jax.lax.fori_loop(0, last_ref[row] + 1, visit, first)
    plt.store(out_ref.at[*mine, slice(None)], out, mask=real[:, None])
    plt.store(top_ref.at[*mine], top, mask=real)
    plt.store(total_ref.at[*mine], total, mask=real)


def attend_part(
    q: jax.Array,
    kv: KV,
    index,
    reach: Reach,
    table: jax.Array | None = None,
    *,
    soft_cap: float | None = None,
    interpret: bool = False,
    block: int = BLOCK,
    warps: int = WARPS,
    stages: int = STAGES,
) -> Part:
    """As `group_attention.attend_part`, on a cache whose layers are a tuple or stacked.

    Keys are [rows, K, columns, D] of a layer.
    """
    if not isinstance(kv, LayerKV):
        kv, index = jax.tree.map(lambda x: x[None], kv[index]), 0
    rows, K, Q, D = q.shape
    columns, tables = kv.v.shape[-2], ()
    if table is not None:
        # A block lies within a page.
        block, columns = math.gcd(block, columns), columns * table.shape[1]
        tables = (table.astype(jnp.int32),)
    start, last = block_range(reach, columns, block)
    whole = pl.BlockSpec(memory_space=pl.ANY)
    kernel = functools.partial(
        _kernel,
        padded=max(MIN_QUERIES, 1 << (Q - 1).bit_length()),
        block=block,
        blocks=-(-columns // block),
        columns=columns,
        ring=reach.ring,
        soft_cap=soft_cap,
    )
    part = pl.pallas_call(
        kernel,
        grid=(rows, K),
        in_specs=[whole] * (9 + len(tables)),
        out_specs=[whole] * 3,
        out_shape=[
            jax.ShapeDtypeStruct((rows, K, Q, D), jnp.float32),
            jax.ShapeDtypeStruct((rows, K, Q), jnp.float32),
            jax.ShapeDtypeStruct((rows, K, Q), jnp.float32),
        ],
        compiler_params=plt.CompilerParams(num_warps=warps, num_stages=stages),
        interpret=interpret,
        name="decode_pages" if tables else "decode_ring" if reach.ring else "decode_prompts",
    )(
        jnp.reshape(index, (1,)).astype(jnp.int32),
        start,
        last,
        reach.length,
        q,
        reach.origin,
        reach.back,
        kv.k,
        kv.v,
        *tables,
    )
    return Part(*part)
