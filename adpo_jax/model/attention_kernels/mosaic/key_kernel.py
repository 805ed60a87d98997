"""The kernel whose pieces are blocks of keys: the gradients of keys and values.

Letters: as in `stream_mosaic`.
"""

import functools
import operator

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from adpo_jax.model.attention_kernels import stream_gpu
from adpo_jax.model.attention_kernels.mosaic.pieces import drain
from adpo_jax.model.attention_kernels.mosaic.warpgroups import (
    BLOCK,
    COMPUTING,
    bias_of,
    both_products,
    full,
    give_registers,
    loads,
    plgpu,
    rows_of,
    scores_of,
    scratch_of,
    take_registers,
    times,
)
from adpo_jax.model.attention_kernels.stream_gpu import Static

# Blocks of queries in the ring of the kernel.
KEY_STAGES = 4


def key_kernel(static: Static, R: int, *refs, **memory):
    """The gradients of a block of keys, from the queries of a chunk.

    A step is a block of queries of a head. Two warpgroups take every other step, and add up what
    they found: one of them the gradients of keys, one those of values.
    """
    tiles, counts, chunks, sums, window, *places, q, k, v, d_out, log_z, mean = refs[:-4]
    d_k, d_v, parts_k, parts_v = refs[-4:]
    K, W, D = k.shape[2], static.tile, q.shape[-1]
    blocks, c = W // BLOCK, jax.lax.axis_index("warpgroup")
    layout, shape = plgpu.Layout.WGMMA, (BLOCK, BLOCK)

    index = jax.lax.axis_index("block")
    index, kv_head = jax.lax.div(index, K), jax.lax.rem(index, K)
    index, block = jax.lax.div(index, blocks), jax.lax.rem(index, blocks)
    M = parts_k.shape[1]
    b, chunk = jax.lax.div(index, M), jax.lax.rem(index, M)
    tile, place = chunks[b, chunk, 0], chunks[b, chunk, 1]
    first = tile * W + block * BLOCK
    keys = pl.ds(first, BLOCK)

    def steps():
        free, listed = (
            jnp.clip(counts[b, tile, x] - place, 0, stream_gpu.CHUNK) * (blocks * R)
            for x in range(2)
        )
        return (free * 0 if static.windows else free), listed

    def queries_of(step):
        """The first query and the head of a step."""
        unit, head = jax.lax.div(step, R), kv_head * R + jax.lax.rem(step, R)
        listed = tiles[b, tile, place + jax.lax.div(unit, blocks)]
        return listed * W + jax.lax.rem(unit, blocks) * BLOCK, head

    def copy():
        ready = memory["mine_ready"]
        for matrix, name in ((k, "key"), (v, "value")):
            plgpu.copy_gmem_to_smem(matrix.at[b, keys, kv_head], memory[name], ready)
        for x, refs in enumerate(places[3:]):
            plgpu.copy_gmem_to_smem(refs.at[b, keys], memory["key_places"].at[x], ready)

        def step_of(step, _):
            at = jax.lax.rem(step, KEY_STAGES)
            query, head = queries_of(step)
            here = pl.ds(query, BLOCK)

            @pl.when(step >= KEY_STAGES)
            def _():
                plgpu.barrier_wait(memory["q_free"].at[at])

            for x, matrix in enumerate((q, d_out)):
                source, ready = matrix.at[b, here, head], memory["q_ready"].at[at]
                plgpu.copy_gmem_to_smem(source, memory["q_ring"].at[at, x], ready)
            for x, number in enumerate((log_z, mean)):
                source, ready = number.at[b, head, here], memory["q_ready"].at[at]
                plgpu.copy_gmem_to_smem(source, memory["numbers_ring"].at[at, x], ready)
            for x, refs in enumerate(places[:3]):
                source, ready = refs.at[b, here], memory["q_ready"].at[at]
                plgpu.copy_gmem_to_smem(source, memory["places_ring"].at[at, x], ready)

        _, listed = steps()
        jax.lax.fori_loop(0, listed, step_of, None)
        drain(memory, ("q_free",), listed, KEY_STAGES)

    def compute():
        key, value = memory["key"], memory["value"]
        free, listed = steps()
        plgpu.barrier_wait(memory["mine_ready"])

        def visit(turn, grads):
            """A block of queries; keys down the rows, queries along."""
            grad_v, grad_k = grads
            at = jax.lax.rem(turn * COMPUTING + c, KEY_STAGES)
            plgpu.barrier_wait(memory["q_ready"].at[at])
            query, d_rows = (memory["q_ring"].at[at, x] for x in range(2))
            numbers = [memory["numbers_ring"].at[at, x] for x in range(2)]

            def weights_of(products):
                scores, factor, slope = scores_of(static, products)
                (z,) = loads(static, numbers[:1], layout.reduce(0))
                weights = jnp.exp2(scores * factor - rows_of(z, 1, shape))
                return (weights,) if static.soft_cap is None else (weights, slope)

            def masked():
                query_places = [memory["places_ring"].at[at, x] for x in range(3)]
                key_places = [memory["key_places"].at[x] for x in range(2)]
                query_places = loads(static, query_places, layout.reduce(0))
                key_places = loads(static, key_places, layout.reduce(1))
                return bias_of(static, query_places, key_places, window, shape, 1)

            is_free = turn * COMPUTING + c < free
            bias = jax.lax.cond(is_free, lambda: full(static, shape, 0.0, layout), masked)
            (weights, *slope), d_weights = both_products(
                static, bias, key, query, value, d_rows, weights_of
            )
            (m,) = loads(static, numbers[1:], layout.reduce(0))
            d_scores = functools.reduce(
                operator.mul, slope, weights * (d_weights - rows_of(m, 1, shape))
            )
            grads = times(
                static,
                (grad_v, weights.astype(v.dtype), d_rows),
                (grad_k, d_scores.astype(k.dtype), query),
            )
            plgpu.barrier_arrive(memory["q_free"].at[at])
            return grads

        # Step s is turn s // 2 of warpgroup s % 2.
        turns = jax.lax.div(listed + (COMPUTING - 1) - c, COMPUTING)
        zeros = full(static, (BLOCK, D), 0.0, layout)
        grad_v, grad_k = jax.lax.fori_loop(0, turns, visit, (zeros, zeros))
        grad_k = grad_k * static.scale
        alone = sums[b, tile, 1] == 1

        def leave(total, mine, grad, parts):
            """Writes a sum: the gradient, or the part of a chunk of several."""
            (given,) = loads(static, [memory["given"]], layout)
            total = total + given

            @pl.when(alone)
            def _():
                mine[...] = total.astype(grad.dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(mine, grad.at[b, keys, kv_head])
                plgpu.wait_smem_to_gmem(0)

            @pl.when(jnp.logical_not(alone))
            def _():
                parts[b, chunk, kv_head, pl.ds(block * BLOCK, BLOCK), :] = total

        @pl.when(c == 1)
        def _():
            memory["given"][...] = grad_k
            plgpu.barrier_arrive(memory["k_given"])
            plgpu.barrier_wait(memory["v_given"])
            leave(grad_v, value, d_v, parts_v)

        @pl.when(c == 0)
        def _():
            plgpu.barrier_wait(memory["k_given"])
            leave(grad_k, key, d_k, parts_k)
            memory["given"][...] = grad_v
            plgpu.barrier_arrive(memory["v_given"])

    @pl.when(tile >= 0)
    def _():
        @pl.when(c < COMPUTING)
        def _():
            take_registers(COMPUTING + 1)
            compute()

        @pl.when(c == COMPUTING)
        def _():
            give_registers(COMPUTING + 1)
            copy()


def key_scratch(D: int, dtype) -> dict:
    return {
        "key": scratch_of(BLOCK, D, dtype=dtype),
        "value": scratch_of(BLOCK, D, dtype=dtype),
        "key_places": plgpu.SMEM((2, BLOCK), jnp.int32),
        "q_ring": scratch_of(KEY_STAGES, 2, BLOCK, D, dtype=dtype),
        "numbers_ring": plgpu.SMEM((KEY_STAGES, 2, BLOCK), jnp.float32),
        "places_ring": plgpu.SMEM((KEY_STAGES, 3, BLOCK), jnp.int32),
        "given": scratch_of(BLOCK, D, dtype=jnp.float32),
        "mine_ready": plgpu.Barrier(num_arrivals=4),
        "q_ready": plgpu.Barrier(num_arrivals=7, num_barriers=KEY_STAGES),
        "q_free": plgpu.Barrier(num_arrivals=1, num_barriers=KEY_STAGES),
        "k_given": plgpu.Barrier(num_arrivals=1),
        "v_given": plgpu.Barrier(num_arrivals=1),
    }
