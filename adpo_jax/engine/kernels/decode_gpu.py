"""Decode attention for GPUs in Triton; there is one program for each row and key/value head.

A program walks the blocks of columns that its row sees, from the newest back, with a running
softmax. The plain version is `kv_cache.attend_part`.

Letters: K key/value heads, Q queries of a row and head, D head dim, S columns of a block.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from adpo_jax.engine.kernels.decode_tpu import block_range
from adpo_jax.engine.kv_cache import LayerKV, Part, Reach
from adpo_jax.model.attention import MASKED

BLOCK = 64
# The smallest side of a matrix product on tensor cores.
MIN_QUERIES = 16


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
    out_ref,
    top_ref,
    total_ref,
    *,
    block: int,
    blocks: int,
    columns: int,
    ring: bool,
    soft_cap: float | None,
):
    row, head = pl.program_id(0), pl.program_id(1)
    layer, start, length = index_ref[0], start_ref[row], length_ref[row]
    q = q_ref[0, 0]
    origin, reach = origin_ref[0], reach_ref[0]

    def visit(j, carry):
        out, top, total = carry
        this = jax.lax.rem(start - j + blocks, blocks)
        at = this * block + jnp.arange(block)
        here = (layer, row, head, pl.ds(this * block, block), slice(None))
        inside = (at < columns)[:, None]
        k = plt.load(k_ref.at[here], mask=inside, other=0).astype(q.dtype)
        v = plt.load(v_ref.at[here], mask=inside, other=0).astype(q.dtype)
        scores = plt.dot(q, k, trans_b=True)
        if soft_cap is not None:
            scores = soft_cap * (2 / (1 + jnp.exp(-2 * scores / soft_cap)) - 1)  # tanh
        back = origin[:, None] - at[None, :]
        if ring:
            back = jnp.where(back < 0, back + columns, back)
        seen = (back <= reach[:, None]) & (at[None, :] < length)
        scores = jnp.where(seen, scores, MASKED)
        new_top = jnp.maximum(top, jnp.max(scores, axis=1))
        weights = jnp.where(seen, jnp.exp(scores - new_top[:, None]), 0.0)
        shrink = jnp.exp(top - new_top)
        total = total * shrink + jnp.sum(weights, axis=1)
        out = out * shrink[:, None] + plt.dot(weights.astype(v.dtype), v)
        return out, new_top, total

    queries, D = q.shape
    first = (
        jnp.zeros((queries, D), jnp.float32),
        jnp.full((queries,), MASKED, jnp.float32),
        # As on a TPU: what is divided by the total of a row that sees no key is 0, not NaN.
        jnp.ones((queries,), jnp.float32),
    )
    out, top, total = jax.lax.fori_loop(0, last_ref[row] + 1, visit, first)
    out_ref[0, 0], top_ref[0, 0], total_ref[0, 0] = out, top, total


def attend_part(
    q: jax.Array,
    kv: LayerKV,
    index,
    reach: Reach,
    *,
    soft_cap: float | None = None,
    interpret: bool = False,
    block: int = BLOCK,
) -> Part:
    """As `kv_cache.attend_part`, on a stacked cache with keys [L, rows, K, columns, D]."""
    rows, K, Q, D = q.shape
    columns = kv.v.shape[-2]
    padded = max(MIN_QUERIES, 1 << (Q - 1).bit_length())
    more = padded - Q
    q = jnp.pad(q, ((0, 0), (0, 0), (0, more), (0, 0)))
    origin = jnp.pad(reach.origin, ((0, 0), (0, more)))
    reaches = jnp.pad(reach.reach, ((0, 0), (0, more)), constant_values=-1)
    start, last = block_range(reach, columns, block)

    whole = pl.BlockSpec(memory_space=pl.ANY)
    per_query = pl.BlockSpec((1, padded), lambda row, head: (row, 0))
    of_head = pl.BlockSpec((1, 1, padded, D), lambda row, head: (row, head, 0, 0))
    one = pl.BlockSpec((1, 1, padded), lambda row, head: (row, head, 0))
    kernel = functools.partial(
        _kernel,
        block=block,
        blocks=-(-columns // block),
        columns=columns,
        ring=reach.ring,
        soft_cap=soft_cap,
    )
    part = pl.pallas_call(
        kernel,
        grid=(rows, K),
        in_specs=[whole] * 4 + [of_head, per_query, per_query, whole, whole],
        out_specs=[of_head, one, one],
        out_shape=[
            jax.ShapeDtypeStruct((rows, K, padded, D), jnp.float32),
            jax.ShapeDtypeStruct((rows, K, padded), jnp.float32),
            jax.ShapeDtypeStruct((rows, K, padded), jnp.float32),
        ],
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
    )(
        jnp.reshape(index, (1,)).astype(jnp.int32),
        start,
        last,
        reach.length,
        q,
        origin,
        reaches,
        kv.k,
        kv.v,
    )
    return jax.tree.map(lambda x: x[:, :, :Q], Part(*part))
