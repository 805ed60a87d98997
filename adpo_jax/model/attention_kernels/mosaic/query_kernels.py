"""The kernels whose pieces are blocks of queries: attention, and the gradients of queries.

Letters: as in `stream_mosaic`.
"""

import functools
import operator

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from adpo_jax.model.attention import MASKED
from adpo_jax.model.attention_kernels.mosaic.pieces import Work, bias_of_step, copy_pieces
from adpo_jax.model.attention_kernels.mosaic.warpgroups import (
    BLOCK,
    both_products,
    full,
    give_registers,
    loads,
    plgpu,
    products_of,
    rows_of,
    scores_of,
    take_registers,
    times,
)


def forward_kernel(work: Work, *refs, **memory):
    order, tiles, counts, window, *places, q, k, v, out, log_z = refs
    static, c = work.static, jax.lax.axis_index("warpgroup")
    C, S, D = work.computing, work.cut.stages, q.shape[-1]
    row, layout = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA
    take_turns = work.cut.take_turns and C > 1

    def arrive():
        if take_turns:
            plgpu.barrier_arrive(memory["turns"].at[0])

    def wait():
        if take_turns:
            plgpu.barrier_wait(memory["turns"].at[0])

    def give_way():
        arrive()
        wait()

    def compute():
        def piece_of(turn, index, step):
            piece = work.piece(index, order)
            slot = jax.lax.rem(turn, work.cut.rows)
            plgpu.barrier_wait(memory["rows_ready"].at[slot])
            query = memory["row_buffers"].at[slot, 0, c]
            free, steps, listed = work.steps(piece, counts)

            shape = (BLOCK, work.cut.units * BLOCK)

            def slot_of(j):
                return jax.lax.rem(step + j, S)

            def bias_of(j):
                return bias_of_step(work, window, memory, slot, slot_of(j), c, j, free, listed)

            def weights_of(products, top, total):
                """Weights, the new maximum and sum, and what older ones shrink by."""
                scores, factor, _ = scores_of(static, products)
                new_top = jnp.maximum(top, jnp.max(scores, axis=1) * factor)
                shrink = jnp.exp2(top - new_top)
                weights = jnp.exp2(scores * factor - rows_of(new_top, 0, shape))
                total = total * shrink + jnp.sum(weights, axis=1)
                return weights, new_top, total, shrink

            def first_half(j, top, total):
                """The weights of a step."""
                at = slot_of(j)
                plgpu.barrier_wait(memory["k_ready"].at[at])
                products = products_of(static, bias_of(j), query, memory["k_ring"].at[at], give_way)
                plgpu.barrier_arrive(memory["k_free"].at[at])
                return weights_of(products, top, total)

            def second_half(j, total_out, weights):
                """Their product with values."""
                at = slot_of(j)
                arrive()
                plgpu.barrier_wait(memory["v_ready"].at[at])
                wait()
                (total_out,) = times(static, (total_out, weights, memory["v_ring"].at[at]))
                plgpu.barrier_arrive(memory["v_free"].at[at])
                return total_out

            def visit(j, carry):
                total_out, top, total = carry
                weights, top, total, shrink = first_half(j, top, total)
                total_out = total_out * rows_of(shrink, 0, (BLOCK, D))
                return second_half(j, total_out, weights.astype(v.dtype)), top, total

            start = (
                full(static, (BLOCK, D), 0.0, layout),
                full(static, (BLOCK,), MASKED, row),
                full(static, (BLOCK,), 0.0, row),
            )

            # The second warpgroup is half a step behind, in each piece anew. None waits in a piece
            # for what the other does in the next, whose copies wait for both.
            pl.when(c == 1)(give_way)
            total_out, top, total = jax.lax.fori_loop(0, steps, visit, start)
            pl.when(c == 0)(arrive)
            total = jnp.where(total > 0, total, 1.0)  # padding sees nothing
            first, head = work.block(piece, c)
            log_z[piece.b, head, pl.ds(first, BLOCK)] = top + jnp.log2(total)
            # The queries have been read: the results leave through their place.
            query[...] = (total_out * rows_of(1.0 / total, 0, (BLOCK, D))).astype(out.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(query, out.at[piece.b, pl.ds(first, BLOCK), head])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            plgpu.barrier_arrive(memory["rows_free"].at[slot])
            pl.when(c == 0)(wait)
            return step + steps

        work.each_piece(piece_of, jnp.int32(0))
        plgpu.wait_smem_to_gmem(0)

    @pl.when(c < C)
    def _():
        take_registers(C + 1)
        compute()

    @pl.when(c == C)
    def _():
        give_registers(C + 1)
        copy_pieces(work, (order, tiles, counts), places, [q], [], k, v, memory)


def query_kernel(work: Work, *refs, **memory):
    order, tiles, counts, window, *places, q, k, v, d_out, log_z, mean, d_q = refs
    static, c = work.static, jax.lax.axis_index("warpgroup")
    C, S, D = work.computing, work.cut.stages, q.shape[-1]
    row, shape = plgpu.Layout.WGMMA.reduce(1), (BLOCK, work.cut.units * BLOCK)

    def piece_of(turn, index, step):
        piece = work.piece(index, order)
        slot = jax.lax.rem(turn, work.cut.rows)
        plgpu.barrier_wait(memory["rows_ready"].at[slot])
        query, d_rows = (memory["row_buffers"].at[slot, x, c] for x in range(2))
        z, m = loads(static, [memory["query_numbers"].at[slot, x, c] for x in range(2)], row)
        free, steps, listed = work.steps(piece, counts)

        def visit(j, carry):
            grad, step = carry
            at = jax.lax.rem(step, S)
            key, value = memory["k_ring"].at[at], memory["v_ring"].at[at]
            plgpu.barrier_wait(memory["k_ready"].at[at])
            plgpu.barrier_wait(memory["v_ready"].at[at])

            def weights_of(products):
                scores, factor, slope = scores_of(static, products)
                weights = jnp.exp2(scores * factor - rows_of(z, 0, shape))
                return (weights,) if static.soft_cap is None else (weights, slope)

            bias = bias_of_step(work, window, memory, slot, at, c, j, free, listed)
            (weights, *slope), d_weights = both_products(
                static, bias, query, key, d_rows, value, weights_of
            )
            plgpu.barrier_arrive(memory["v_free"].at[at])
            d_scores = functools.reduce(
                operator.mul, slope, weights * (d_weights - rows_of(m, 0, shape))
            )
            (grad,) = times(static, (grad, d_scores.astype(k.dtype), key))
            plgpu.barrier_arrive(memory["k_free"].at[at])
            return grad, step + 1

        start = full(static, (BLOCK, D), 0.0, plgpu.Layout.WGMMA), step
        grad, step = jax.lax.fori_loop(0, steps, visit, start)
        first, head = work.block(piece, c)
        query[...] = (grad * static.scale).astype(d_q.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(query, d_q.at[piece.b, pl.ds(first, BLOCK), head])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        plgpu.barrier_arrive(memory["rows_free"].at[slot])
        return step

    @pl.when(c < C)
    def _():
        take_registers(C + 1)
        work.each_piece(piece_of, jnp.int32(0))
        plgpu.wait_smem_to_gmem(0)

    @pl.when(c == C)
    def _():
        give_registers(C + 1)
        lists = order, tiles, counts
        copy_pieces(work, lists, places, [q, d_out], [log_z, mean], k, v, memory)
