"""Products of rows with the matrix of their group: what a mixture of experts is made of.

    grouped_product(x, w, sizes)   row s of x times the matrix of its group
    grouped_outer(x, g, sizes)     for each group the sum of the outer products of its rows

Rows are sorted by group. No group has a bound, and rows behind the last group give zeros. The plain
form is `jax.lax.ragged_dot`. A TPU's compiler has such a product but not the outer one; those for
CPUs and GPUs have neither. What a compiler has not it does with every row and every matrix, E times
the work. So outer products are summed by jax's kernel (`megablox`) on a TPU; on a GPU kernels do
both (`grouped_gpu`), where they take the dtype; and on a CPU a loop runs over blocks of rows of one
group. It turns as often as there are blocks that hold a row, so the matrices of groups without rows
are not read.

Letters: S rows, E groups, D width, F width of the output, C rows of a block.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm

from adpo_jax.model import grouped_gpu

# Of a TPU: numbers side by side, and the most on a side of a tile of sums, whose float32 lie in the
# fast memory of a core three times.
LANES, MOST_SUMS = 128, 768

# Rows of a block at most: enough to pay for the copy of a matrix that XLA makes before each block.
MAX_BLOCK = 256


@jax.jit
def grouped_product(x_SD: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """Rows times the matrix of their group, [S, F] in the dtype of x.

    Args:
      sizes_E: int32, the rows of each group; they may sum to less than S.
    """
    forms = {"cpu": product_by_blocks, "default": product_by_ragged_dot}
    if grouped_gpu.runs(x_SD.dtype, *w_EDF.shape[1:]):
        forms["cuda"] = product_by_kernel
    return jax.lax.platform_dependent(x_SD, w_EDF, sizes_E, **forms)


@jax.jit
def grouped_outer(x_SD: jax.Array, g_SF: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """The sum of x g^T over the rows of each group, [E, D, F] float32; 0 for an empty group."""
    forms = {"cpu": outer_by_blocks, "tpu": outer_by_megablox, "default": outer_by_ragged_dot}
    if grouped_gpu.runs(x_SD.dtype, x_SD.shape[1], g_SF.shape[1]):
        forms["cuda"] = grouped_gpu.outer
    return jax.lax.platform_dependent(x_SD, g_SF, sizes_E, **forms)


def _behind(sizes_E, num_rows: int) -> jax.Array:
    """Which rows lie behind the last group, [S, 1]."""
    return (jnp.arange(num_rows) >= jnp.sum(sizes_E))[:, None]


def product_by_ragged_dot(x_SD, w_EDF, sizes_E):
    """`grouped_product` by the product that XLA has for it."""
    y_SF = jax.lax.ragged_dot(x_SD, w_EDF, sizes_E)
    return jnp.where(_behind(sizes_E, len(x_SD)), jnp.zeros((), y_SF.dtype), y_SF)


def product_by_kernel(x_SD, w_EDF, sizes_E, *, interpret: bool = False):
    """`grouped_product` by the kernel for GPUs."""
    y_SF = grouped_gpu.product(x_SD, w_EDF, sizes_E, interpret=interpret)
    return jnp.where(_behind(sizes_E, len(x_SD)), jnp.zeros((), y_SF.dtype), y_SF)


def outer_by_ragged_dot(x_SD, g_SF, sizes_E):
    """`grouped_outer` by the product that XLA has for it."""
    behind = _behind(sizes_E, len(x_SD))
    x_SD, g_SF = (jnp.where(behind, jnp.zeros((), a.dtype), a) for a in (x_SD, g_SF))
    return jax.lax.ragged_dot_general(
        x_SD,
        g_SF,
        sizes_E,
        jax.lax.RaggedDotDimensionNumbers(
            dot_dimension_numbers=(((0,), (0,)), ((), ())),
            lhs_ragged_dimensions=[0],
            rhs_group_dimensions=[],
        ),
        preferred_element_type=jnp.float32,
    )


def outer_by_megablox(x_SD, g_SF, sizes_E, *, interpret: bool = False):
    """`grouped_outer` by jax's kernel for TPUs."""
    tile = LANES * min(-(-len(x_SD) // LANES), 4)
    x, g = (jnp.pad(a, ((0, -len(a) % tile), (0, 0))) for a in (x_SD, g_SF))
    tiling = (tile, _tile_of(x.shape[1]), _tile_of(g.shape[1]))
    return tgmm(x.T, g, sizes_E, jnp.float32, tiling, interpret=interpret)


def _tile_of(size: int) -> int:
    """The side of a tile of sums: whole lanes where they divide the size, within fast memory."""
    fits = [tile for tile in range(LANES, MOST_SUMS + 1, LANES) if size % tile == 0]
    return max(fits, default=min(size, MOST_SUMS))


# --- blocks


def _block_rows(num_rows: int, num_groups: int) -> int:
    """Rows of a block: a quarter of an even group, so that little of a last block is empty."""
    return min(max(8, num_rows // num_groups // 4 // 8 * 8), MAX_BLOCK)


def _each_block(body, first, sizes_E, block: int):
    """Runs `body(carry, group, first row, rows)` for every block that holds a row, in order."""
    blocks_E = -(-sizes_E // block)
    ends_E, offsets_E = jnp.cumsum(blocks_E), jnp.cumsum(sizes_E) - sizes_E

    def one(i, carry):
        group = jnp.searchsorted(ends_E, i, side="right", method="compare_all").astype(jnp.int32)
        done = (i - (ends_E[group] - blocks_E[group])) * block
        return body(carry, group, offsets_E[group] + done, sizes_E[group] - done)

    return jax.lax.fori_loop(0, ends_E[-1], one, first)


def product_by_blocks(x_SD, w_EDF, sizes_E):
    """`grouped_product` by blocks of rows."""
    (S, _), (E, _, F) = x_SD.shape, w_EDF.shape
    block = _block_rows(S, E)
    padded = jnp.pad(x_SD, ((0, block), (0, 0)))

    def body(out, group, row, rows):
        # Behind the rows of its group a block writes nonsense, which the next blocks write over.
        part = jax.lax.dynamic_slice_in_dim(padded, row, block)
        matrix = jax.lax.dynamic_index_in_dim(w_EDF, group, keepdims=False)
        return jax.lax.dynamic_update_slice_in_dim(out, part @ matrix, row, axis=0)

    out = _each_block(body, jnp.zeros((S + block, F), x_SD.dtype), sizes_E, block)[:S]
    return jnp.where(_behind(sizes_E, S), jnp.zeros((), out.dtype), out)


def outer_by_blocks(x_SD, g_SF, sizes_E):
    """`grouped_outer` by blocks of rows."""
    (S, D), F, E = x_SD.shape, g_SF.shape[1], len(sizes_E)
    block = _block_rows(S, E)
    x, g = (jnp.pad(a, ((0, block), (0, 0))) for a in (x_SD, g_SF))

    def body(sums, group, row, rows):
        held = (jnp.arange(block) < rows)[:, None]
        x_part = jnp.where(held, jax.lax.dynamic_slice_in_dim(x, row, block), 0)
        g_part = jax.lax.dynamic_slice_in_dim(g, row, block)
        more = jnp.einsum("cd,cf->df", x_part, g_part, preferred_element_type=jnp.float32)
        old = jax.lax.dynamic_index_in_dim(sums, group, keepdims=True)
        return jax.lax.dynamic_update_index_in_dim(sums, old + more, group, axis=0)

    return _each_block(body, jnp.zeros((E, D, F), jnp.float32), sizes_E, block)


# --- with a gradient


def biased(y_SF, b_EF, like_EF, sizes_E) -> jax.Array:
    """Rows plus the vector of their group; rows behind the last group stay as they are.

    The gradient of the vectors is summed in float32.

    Args:
      b_EF: in any dtype; its gradient has the same one.
      like_EF: float32 of the shape of b, which gets the gradient instead; None for none.
    """
    if like_EF is not None:
        b_EF = jax.lax.stop_gradient(b_EF).astype(jnp.float32) + like_EF
    return _biased(y_SF, b_EF, sizes_E)


def _groups_of(num_rows: int, sizes_E) -> jax.Array:
    """Whether each row is in each group, [S, E] bool."""
    rows_S1, ends_E = jnp.arange(num_rows)[:, None], jnp.cumsum(sizes_E)
    return (rows_S1 < ends_E) & (rows_S1 >= ends_E - sizes_E)


@jax.custom_vjp
def _biased(y_SF, b_EF, sizes_E):
    held_SE = _groups_of(len(y_SF), sizes_E)
    rows = b_EF.astype(y_SF.dtype)[jnp.argmax(held_SE, axis=1)]
    return y_SF + jnp.where(jnp.any(held_SE, axis=1)[:, None], rows, jnp.zeros((), y_SF.dtype))


def _biased_backward(residuals, g_SF):
    b_EF, sizes_E = residuals
    # A product, since a scatter is slow on every device.
    held_SE = _groups_of(len(g_SF), sizes_E).astype(g_SF.dtype)
    d_b = jnp.einsum("se,sf->ef", held_SE, g_SF, preferred_element_type=jnp.float32)
    return g_SF, d_b.astype(b_EF.dtype), None


_biased.defvjp(lambda y, b, sizes: (_biased(y, b, sizes), (b, sizes)), _biased_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def product(gather: tuple[str, int] | None, x_SD, w_EDF, like_EDF, sizes_E) -> jax.Array:
    """Rows times the matrix of their group, in the dtype of x; differentiable by rows and matrices.

    The backward pass needs the arguments alone.

    Args:
      gather: (mesh axis, array axis): inside a `shard_map`, where each device has a part of the
        matrices, they are gathered here and again in the backward pass. None where they are whole.
      w_EDF: in any dtype; its gradient has the same one.
      like_EDF: float32 of the shape of w; the gradient of w goes to it, so that it is float32
        whatever w is. None for none.
    """
    del like_EDF
    return grouped_product(x_SD, whole(gather, w_EDF, x_SD.dtype), sizes_E)


def whole(gather: tuple[str, int] | None, w: jax.Array, dtype) -> jax.Array:
    """The matrices of which each device has a part, cast before they travel."""
    w = w.astype(dtype)
    return jax.lax.all_gather(w, gather[0], axis=gather[1], tiled=True) if gather else w


def parts(gather: tuple[str, int] | None, d_w: jax.Array) -> jax.Array:
    """The gradient of what `whole` was made of, from each device's gradient of its result."""
    if not gather:
        return d_w
    axis, dimension = gather
    return jax.lax.psum_scatter(d_w, axis, scatter_dimension=dimension, tiled=True)


def _product_forward(gather, x_SD, w_EDF, like_EDF, sizes_E):
    return product(gather, x_SD, w_EDF, like_EDF, sizes_E), (x_SD, w_EDF, like_EDF, sizes_E)


def _product_backward(gather, residuals, g_SF):
    x_SD, w_EDF, like_EDF, sizes_E = residuals
    matrices = whole(gather, w_EDF, g_SF.dtype)
    d_x = grouped_product(g_SF, jnp.swapaxes(matrices, 1, 2), sizes_E)
    d_w = parts(gather, grouped_outer(x_SD, g_SF, sizes_E))
    if like_EDF is None:
        return d_x, d_w.astype(w_EDF.dtype), None, None
    return d_x, jnp.zeros_like(w_EDF), d_w, None


product.defvjp(_product_forward, _product_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def moved(copies: int, x, to, back):
    """The rows `to // copies` of x, where every copy of a row goes to one place at most.

    The gradient is gathered too, since a scatter is slow on every device.

    Args:
      x: [N, D].
      to: [S] int32, the copy (row times `copies` plus its number) that each place gets; -1 for a
        row of zeros.
      back: [N * copies] int32, the place of every copy; -1 for none.

    Returns:
      [S, D].
    """
    return _gathered(x, jnp.where(to < 0, -1, to // copies))


def _gathered(x, rows):
    return jnp.where((rows < 0)[:, None], jnp.zeros((), x.dtype), x[jnp.maximum(rows, 0)])


def _moved_backward(copies, back, g):
    d_x = _gathered(g, back)
    return (d_x.reshape(-1, copies, d_x.shape[-1]).sum(1) if copies > 1 else d_x), None, None


moved.defvjp(lambda copies, x, to, back: (moved(copies, x, to, back), back), _moved_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def collected(copies: int, y, to, back):
    """The sum [N, D] of the rows of y [S, D] that the copies of each row went to; see `moved`."""
    return _gathered(y, back).reshape(-1, copies, y.shape[-1]).sum(1)


def _collected_backward(copies, to, g):
    return _gathered(g, jnp.where(to < 0, -1, to // copies)), None, None


collected.defvjp(
    lambda copies, y, to, back: (collected(copies, y, to, back), to), _collected_backward
)


def sorted_by(ids_S: jax.Array, num_groups: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """An order of rows by group, in which the rows of a group keep their order.

    Args:
      ids_S: [S] int32, the group of each row; `num_groups` for none.

    Returns:
      (the row of each place, the place of each row, the rows of each group), -1 for none.
    """
    order = jnp.argsort(ids_S, stable=True).astype(jnp.int32)
    place = jnp.argsort(order).astype(jnp.int32)
    to = jnp.where(ids_S[order] < num_groups, order, -1)
    back = jnp.where(ids_S < num_groups, place, -1)
    sizes = jnp.sum(ids_S[:, None] == jnp.arange(num_groups), axis=0, dtype=jnp.int32)
    return to, back, sizes
