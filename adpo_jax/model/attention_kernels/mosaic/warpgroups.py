"""What the kernels for Hopper GPUs are made of: warpgroups, their registers, products and memory.

Letters: as in `stream_mosaic`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from adpo_jax.model.attention import Places, visible
from adpo_jax.model.attention_kernels import stream_gpu
from adpo_jax.model.attention_kernels.stream_gpu import LOG2_E, Static

try:
    from jax.experimental.pallas import mosaic_gpu as plgpu
except ImportError:
    plgpu = None

# The rows of a matrix that a warpgroup multiplies at once: queries or keys of a block.
BLOCK = 64
# Warpgroups that compute, where there is work for as many.
COMPUTING = 2
# Registers of a thread: 65536 for the threads of one copying and two computing warpgroups.
COPIER_REGISTERS, COMPUTER_REGISTERS = 24, 240


def rows_of(x, axis: int, shape):
    """A vector along one axis of a matrix."""
    return jax.lax.broadcast_in_dim(x, shape, (axis,))


def laid_out(static: Static, x, layout):
    """Numbers dealt to the threads of a warpgroup; an older interpreter has no layouts."""
    return x if static.interpret else plgpu.layout_cast(x, layout)


def full(static: Static, shape, value, layout):
    return laid_out(static, jnp.full(shape, value, jnp.float32), layout)


def _plain(acc, a, b):
    """acc + a @ b in the interpreter, which knows no products that begin with a sum."""
    return acc + jnp.dot(a, b, preferred_element_type=jnp.float32)


def times(static: Static, *sums):
    """acc + a @ b of each (acc, a, b) on tensor cores; a in registers, b in shared memory."""
    accs, left, right = zip(*sums)
    if static.interpret:
        return tuple(_plain(acc, a, b[...]) for acc, a, b in sums)

    def products(refs):
        for acc, a, b in zip(refs, left, right):
            plgpu.wgmma(acc, a, b)

    return pl.run_state(products)(tuple(map(plgpu.ACC.init, accs)))


def products_of(static: Static, bias, a, b, meanwhile: Callable):
    """bias + a @ b.T, both in shared memory; `meanwhile()` is called when they are on their way."""
    if static.interpret:
        meanwhile()
        return _plain(bias, a[...], b[...].T)

    def products(acc):
        acc[...] = bias
        plgpu.wgmma(acc, a, b.T)
        meanwhile()
        return acc[...]

    return pl.run_scoped(products, plgpu.ACC(bias.shape, jnp.float32))


def both_products(static: Static, bias, a, b, c, d, between: Callable):
    """`between(bias + a @ b.T)` and c @ d.T, all in shared memory; the second runs meanwhile."""
    if static.interpret:
        return between(_plain(bias, a[...], b[...].T)), _plain(0.0, c[...], d[...].T)

    def products(first, second):
        first[...] = bias
        plgpu.wgmma(first, a, b.T)
        plgpu.wgmma(second, c, d.T)
        made = between(plgpu.wgmma_accumulator_load(first, wait_n=1))
        # Else the compiler waits for the second product first.
        return jax.lax.optimization_barrier(made), second[...]

    acc = plgpu.ACC(bias.shape, jnp.float32)
    return pl.run_scoped(products, acc, acc)


def bias_of(static: Static, queries, keys, window, shape, query_axis: int, present=None):
    """0 where a query sees a key, else -inf: what the products of a block begin with.

    Args:
      queries, keys: the places of the rows and of the columns of a block of scores, or turned.
      present: which keys are there at all; None for all of them.
    """
    queries = Places(*(rows_of(x, query_axis, shape) for x in queries))
    keys = Places(*(rows_of(x, 1 - query_axis, shape) for x in keys))
    seen = visible(queries, keys, window[0] if static.windows else None)
    return jnp.where(seen if present is None else seen & present, 0.0, -jnp.inf)


def scores_of(static: Static, products):
    """Scores of products that may be -inf, a factor, and the slope of the soft cap.

    The factor > 0 makes powers of two of scores. It stays outside, where one instruction multiplies
    and subtracts a maximum.
    """
    if static.soft_cap is None:
        return products, static.scale * LOG2_E, 1.0
    scores, slope = stream_gpu.capped(static, products)
    return jnp.where(products == -jnp.inf, -jnp.inf, scores), 1.0, slope


def loads(static: Static, refs, layout):
    return [laid_out(static, ref[...], layout) for ref in refs]


def give_registers(warpgroups: int):
    """The copying warpgroup leaves registers to two that compute; there are enough for one."""
    if warpgroups > COMPUTING:
        plgpu.set_max_registers(COPIER_REGISTERS, action="decrease")


def take_registers(warpgroups: int):
    if warpgroups > COMPUTING:
        plgpu.set_max_registers(COMPUTER_REGISTERS, action="increase")


def scratch_of(*shape, dtype):
    """Shared memory of matrices, laid out as tensor cores read them."""
    swizzle = 128
    tiling = plgpu.TilingTransform((8, swizzle // jnp.dtype(dtype).itemsize))
    return plgpu.SMEM(shape, dtype, transforms=(tiling, plgpu.SwizzleTransform(swizzle)))


def call(static: Static, body: Callable, threads: int, grid: int, inputs, out_type, scratch, name):
    interpret = None
    if static.interpret:
        from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

        interpret = InterpretGPUParams()
    return plgpu.kernel(
        body,
        out_type=out_type,
        scratch_types=scratch,
        grid=(grid,),
        grid_names=("block",),
        num_threads=threads,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
        interpret=interpret,
        kernel_name=name,
    )(*inputs)
