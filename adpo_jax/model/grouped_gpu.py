"""The two products of `grouped` for GPUs: kernels in Triton.

XLA's compiler for GPUs multiplies every row by every matrix (with 16 experts on a device, 13 times
the arithmetic). In `product` a program multiplies rows of one group by some columns of its matrix.
There are tiles of rows for as many as the groups could fill; those that hold no row end at once, so
that matrices of groups without rows are not read. In `outer` a program goes over the rows of its
group.

Letters: as in `grouped`; T tiles, M rows of a tile, K and N columns of a step.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from adpo_jax.model.attention_choice import old_gpu
from adpo_jax.model.triton import plt

# Rows of a tile, and columns of a step and of a result.
LEAST_ROWS, MOST_ROWS = 16, 128
STEP, COLUMNS = 64, 128
WARPS, STAGES = 8, 3


def runs(dtype, *widths: int) -> bool:
    """Whether the kernels run on rows of this dtype and these widths, under this jax."""
    fits = jnp.dtype(dtype).itemsize == 2 and not any(width % LEAST_ROWS for width in widths)
    return plt is not None and fits and not old_gpu(jax.devices()[0])


def product(x_SD, w_EDF, sizes_E, *, interpret: bool = False) -> jax.Array:
    """`grouped.grouped_product`, but for rows behind the last group, which may hold anything."""
    (S, D), (E, _, F) = x_SD.shape, w_EDF.shape
    M, K, N = _rows_of_tile(S, E), _divisor(D, STEP), _divisor(F, COLUMNS)
    blocks_E = -(-sizes_E // M)
    ends_E = jnp.cumsum(blocks_E)
    tile_T = jnp.arange(pl.cdiv(S, M) + E - 1, dtype=jnp.int32)
    group_T = jnp.searchsorted(ends_E, tile_T, side="right", method="compare_all")
    group_T = jnp.minimum(group_T, E - 1).astype(jnp.int32)
    last_E = jnp.cumsum(sizes_E)
    first_T = (last_E - sizes_E)[group_T] + (tile_T - (ends_E - blocks_E)[group_T]) * M
    last_T = jnp.where(tile_T < ends_E[-1], last_E[group_T], 0)
    return _call(
        functools.partial(_product_kernel, M, K, N),
        (len(tile_T), F // N),
        [group_T, first_T.astype(jnp.int32), last_T.astype(jnp.int32), x_SD, w_EDF],
        jax.ShapeDtypeStruct((S, F), x_SD.dtype),
        "grouped_product",
        interpret,
    )


def outer(x_SD, g_SF, sizes_E, *, interpret: bool = False) -> jax.Array:
    """`grouped.grouped_outer`."""
    (S, D), F, E = x_SD.shape, g_SF.shape[1], len(sizes_E)
    M, K, N = min(_rows_of_tile(S, E), STEP), _divisor(D, COLUMNS), _divisor(F, COLUMNS)
    last_E = jnp.cumsum(sizes_E).astype(jnp.int32)
    return _call(
        functools.partial(_outer_kernel, M, K, N),
        (E, D // K, F // N),
        [last_E - sizes_E.astype(jnp.int32), last_E, x_SD, g_SF],
        jax.ShapeDtypeStruct((E, D, F), jnp.float32),
        "grouped_outer",
        interpret,
    )


def _rows_of_tile(S: int, E: int) -> int:
    """About as many rows as an even group has, a power of two."""
    even = 1 << max(S // E - 1, 0).bit_length()
    return min(max(even, LEAST_ROWS), MOST_ROWS)


def _divisor(width: int, most: int) -> int:
    """The largest power of two that divides a width, at most `most`."""
    return min(width & -width, most)


def _call(kernel, grid, inputs, out_shape, name: str, interpret: bool):
    whole = pl.BlockSpec(memory_space=pl.ANY)
    return pl.pallas_call(
        kernel,
        grid=grid,
        in_specs=[whole] * len(inputs),
        out_specs=whole,
        out_shape=out_shape,
        compiler_params=plt.CompilerParams(num_warps=WARPS, num_stages=STAGES),
        interpret=interpret,
        name=name,
    )(*inputs)


def _rows(ref, at, inside, column, width: int):
    """Rows [M, width] from a row and a column on, zeros where they are not `inside`, [M, 1]."""
    part = ref.at[pl.ds(at, len(inside)), pl.ds(column, width)]
    return plt.load(part, mask=jnp.broadcast_to(inside, (len(inside), width)), other=0.0)


def _product_kernel(M, K, N, group_ref, first_ref, last_ref, x, w, out):
    tile, column = pl.program_id(0), pl.program_id(1) * N
    group, first, last = (plt.load(ref.at[tile]) for ref in (group_ref, first_ref, last_ref))
    inside = (first + jnp.arange(M) < last)[:, None]

    @pl.when(first < last)
    def _():
        def add(step, total):
            matrix = plt.load(w.at[group, pl.ds(step * K, K), pl.ds(column, N)])
            return total + plt.dot(_rows(x, first, inside, step * K, K), matrix)

        total = jax.lax.fori_loop(0, x.shape[1] // K, add, jnp.zeros((M, N), jnp.float32))
        part = out.at[pl.ds(first, M), pl.ds(column, N)]
        plt.store(part, total.astype(out.dtype), mask=jnp.broadcast_to(inside, (M, N)))


def _outer_kernel(M, K, N, first_ref, last_ref, x, g, out):
    group, row, column = pl.program_id(0), pl.program_id(1) * K, pl.program_id(2) * N
    first, last = plt.load(first_ref.at[group]), plt.load(last_ref.at[group])

    def add(step, total):
        at = first + step * M
        inside = (at + jnp.arange(M) < last)[:, None]
        part = _rows(g, at, inside, column, N)
        return total + plt.dot(_rows(x, at, inside, row, K), part, trans_a=True)

    steps = pl.cdiv(last - first, M)
    total = jax.lax.fori_loop(0, steps, add, jnp.zeros((K, N), jnp.float32))
    plt.store(out.at[group, pl.ds(row, K), pl.ds(column, N)], total)
