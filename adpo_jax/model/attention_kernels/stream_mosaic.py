"""Attention over packed streams and rows for Hopper GPUs in Mosaic, with gradients.

The successor of `stream_gpu`, which says what is computed, by which lists, and runs on older cards.
Here a thread block is one warpgroup that only copies, and two that only compute (as in Shah et al.
2024, arXiv 2407.08608). The copier walks the list of a tile and fills a ring of buffers; a buffer
is filled again when all who read it have said so. A computing warpgroup holds 64 queries of a head,
or 64 keys and half of the queries that see them, and keeps sums in registers. The heads of one
key/value head have the same lists, so two of them share the copies.

Letters: as in `stream_gpu`; P blocks of a tile, C computing warpgroups, U blocks of a step.
"""

import functools
import operator
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from adpo_jax.model.attention import MASKED, Tokens, visible
from adpo_jax.model.attention_kernels import stream_gpu
from adpo_jax.model.attention_kernels.stream_gpu import LOG2_E, Lists, Static, like, lists_of
from adpo_jax.model.tile_attention import Saved, Stream
from adpo_jax.model.triton import plt

try:
    from jax.experimental.pallas import mosaic_gpu as plgpu
except ImportError:
    plgpu = None

__all__ = ["attend", "limit", "lists_of", "obstacle", "rows_as_stream"]

# The rows of a matrix that a warpgroup multiplies at once: queries or keys of a block.
BLOCK = 64
HEAD_DIMS = (64, 128)
# Warpgroups that compute, where there is work for as many.
COMPUTING = 2
# Thread blocks that an H100 or H200 runs at once, one on each of its multiprocessors.
AT_ONCE = 132
# Registers of a thread: 65536 for the threads of one copying and two computing warpgroups.
COPIER_REGISTERS, COMPUTER_REGISTERS = 24, 240


class Cut(NamedTuple):
    """How a kernel is cut.

    Attributes:
      units: blocks of keys that a step multiplies with.
      stages: steps whose keys and values lie in shared memory.
      rows: pieces of work whose queries lie in shared memory.
      persistent: whether a thread block takes piece after piece of work, so that it copies for the
        next one while it computes; else one piece.
      take_turns: whether one warpgroup multiplies while the other makes weights.
    """

    units: int
    stages: int
    rows: int
    persistent: bool
    take_turns: bool


FORWARD = Cut(2, 2, 2, persistent=True, take_turns=True)
OF_QUERIES = Cut(1, 2, 2, persistent=True, take_turns=False)
# Blocks of queries in the ring of the kernel for keys.
KEY_STAGES = 4


def obstacle(head_dim: int) -> str:
    """Why the kernels cannot run heads of this size, or not under this jax; empty if they can."""
    if plgpu is None or plt is None:
        return (
            f"needs Pallas' Mosaic and Triton for GPUs, which jax {jax.__version__} does not have"
        )
    if head_dim not in HEAD_DIMS:
        sizes = " or ".join(map(str, HEAD_DIMS))
        return f"needs a head_dim of {sizes}; given {head_dim}"
    return ""


def limit(num_tokens: int, num_tiles: int) -> str:
    """Why tiles of this size cannot be run; empty if they can."""
    tile = num_tokens // num_tiles
    return f"needs tiles of a multiple of {BLOCK} tokens; given {tile}" if tile % BLOCK else ""


def attend(*args, **settings) -> jax.Array:
    """Attention of the tokens of a stream to its keys, as `stream_gpu.attend`."""
    return stream_gpu.attend(*args, kernels=_kernels(), **settings)


def forward(*args, **settings) -> Saved:
    """As `stream_gpu.forward`."""
    return stream_gpu.forward(*args, kernels=_kernels(), **settings)


def gradients(*args, **settings) -> tuple[jax.Array, ...]:
    """As `stream_gpu.gradients`."""
    return stream_gpu.gradients(*args, kernels=_kernels(), **settings)


def _kernels() -> stream_gpu.Kernels:
    return stream_gpu.Kernels(_run_forward, _run_gradients)


def rows_as_stream(positions: jax.Array, segments: jax.Array) -> Stream:
    """Rows as streams, as `stream_gpu.rows_as_stream`, in tiles that these kernels take."""
    return stream_gpu.rows_as_stream(positions, segments, least=BLOCK)


# --- parts of all kernels


def _rows_of(x, axis: int, shape):
    """A vector along one axis of a matrix."""
    return jax.lax.broadcast_in_dim(x, shape, (axis,))


def _laid_out(static: Static, x, layout):
    """Numbers dealt to the threads of a warpgroup; an older interpreter has no layouts."""
    return x if static.interpret else plgpu.layout_cast(x, layout)


def _full(static: Static, shape, value, layout):
    return _laid_out(static, jnp.full(shape, value, jnp.float32), layout)


def _plain(acc, a, b):
    """acc + a @ b in the interpreter, which knows no products that begin with a sum."""
    return acc + jnp.dot(a, b, preferred_element_type=jnp.float32)


def _times(static: Static, *sums):
    """acc + a @ b of each (acc, a, b) on tensor cores; a in registers, b in shared memory."""
    accs, left, right = zip(*sums)
    if static.interpret:
        return tuple(_plain(acc, a, b[...]) for acc, a, b in sums)

    def products(refs):
        for acc, a, b in zip(refs, left, right):
            plgpu.wgmma(acc, a, b)

    return pl.run_state(products)(tuple(map(plgpu.ACC.init, accs)))


def _products(static: Static, bias, a, b, meanwhile: Callable):
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


def _both_products(static: Static, bias, a, b, c, d, between: Callable):
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


def _bias(static: Static, queries, keys, window, shape, query_axis: int, present=None):
    """0 where a query sees a key, else -inf: what the products of a block begin with.

    Args:
      queries, keys: the places of the rows and of the columns of a block of scores, or turned.
      present: which keys are there at all; None for all of them.
    """
    queries = Tokens(*(_rows_of(x, query_axis, shape) for x in queries))
    keys = Tokens(*(_rows_of(x, 1 - query_axis, shape) for x in keys))
    seen = visible(queries, keys, window[0] if static.windows else None)
    return jnp.where(seen if present is None else seen & present, 0.0, -jnp.inf)


def _scores(static: Static, products):
    """Scores of products that may be -inf, a factor, and the slope of the soft cap.

    The factor > 0 makes powers of two of scores. It stays outside, where one instruction multiplies
    and subtracts a maximum.
    """
    if static.soft_cap is None:
        return products, static.scale * LOG2_E, 1.0
    scores, slope = stream_gpu.capped(static, products)
    return jnp.where(products == -jnp.inf, -jnp.inf, scores), 1.0, slope


def _loads(static: Static, refs, layout):
    return [_laid_out(static, ref[...], layout) for ref in refs]


def _give_registers(warpgroups: int):
    """The copying warpgroup leaves registers to two that compute; there are enough for one."""
    if warpgroups > COMPUTING:
        plgpu.set_max_registers(COPIER_REGISTERS, action="decrease")


def _take_registers(warpgroups: int):
    if warpgroups > COMPUTING:
        plgpu.set_max_registers(COMPUTER_REGISTERS, action="increase")


def _scratch(*shape, dtype):
    """Shared memory of matrices, laid out as tensor cores read them."""
    swizzle = 128
    tiling = plgpu.TilingTransform((8, swizzle // jnp.dtype(dtype).itemsize))
    return plgpu.SMEM(shape, dtype, transforms=(tiling, plgpu.SwizzleTransform(swizzle)))


def _call(static: Static, body: Callable, threads: int, grid: int, inputs, out_type, scratch, name):
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


# --- kernels whose pieces are blocks of queries


class _Piece(NamedTuple):
    """A piece of work: C blocks of queries that see the same tiles, and their key/value head."""

    b: jax.Array
    tile: jax.Array
    group: jax.Array
    kv_head: jax.Array


class _Work(NamedTuple):
    """The pieces of a kernel, and where their steps lie.

    Attributes:
      heads: R.
      computing: C.
      pieces: how many there are.
    """

    static: Static
    cut: Cut
    streams: int
    heads: int
    kv_heads: int
    computing: int
    pieces: int
    grid: int

    @classmethod
    def of(cls, static: Static, cut: Cut, q, k):
        (B, N, H, _), K = q.shape, k.shape[2]
        blocks = H // K * (static.tile // BLOCK)
        C = COMPUTING if blocks % COMPUTING == 0 else 1
        pieces = B * (N // static.tile) * (blocks // C) * K
        grid = min(AT_ONCE, pieces) if cut.persistent else pieces
        return cls(static, cut, B, H // K, K, C, pieces, grid)

    def piece(self, index, order) -> _Piece:
        """The pieces of long lists come first."""
        groups = self.heads * (self.static.tile // BLOCK) // self.computing
        index, kv_head = jax.lax.div(index, self.kv_heads), jax.lax.rem(index, self.kv_heads)
        index, group = jax.lax.div(index, groups), jax.lax.rem(index, groups)
        b = jax.lax.rem(index, self.streams)
        return _Piece(b, order[b, jax.lax.div(index, self.streams)], group, kv_head)

    def mine(self, turn):
        """The number of the piece of this thread block in a turn; there and back again.

        Pieces are sorted by length, so that those of one thread block add up to like lengths.
        """
        block = jax.lax.axis_index("block")
        back = jax.lax.rem(turn, 2) == 1
        return turn * self.grid + jnp.where(back, self.grid - 1 - block, block)

    @property
    def turns(self) -> int:
        return -(-self.pieces // self.grid)

    def block(self, piece: _Piece, c):
        """The first query and the head of the c-th block of a piece."""
        unit = piece.group * self.computing + c
        first = piece.tile * self.static.tile + jax.lax.div(unit, self.heads) * BLOCK
        return first, piece.kv_head * self.heads + jax.lax.rem(unit, self.heads)

    def steps(self, piece: _Piece, counts):
        """How many steps need no mask, how many there are, and the blocks of keys of all."""
        blocks, units = self.static.tile // BLOCK, self.cut.units
        free = counts[piece.b, piece.tile, 0] * (0 if self.static.windows else blocks)
        listed = counts[piece.b, piece.tile, 1] * blocks
        return jax.lax.div(free, units), jax.lax.div(listed + (units - 1), units), listed

    def key_block(self, piece: _Piece, tiles, unit):
        """The first key of a listed block."""
        blocks = self.static.tile // BLOCK
        tile = tiles[piece.b, piece.tile, jax.lax.div(unit, blocks)]
        return tile * self.static.tile + jax.lax.rem(unit, blocks) * BLOCK

    def scratch(self, D: int, dtype, rows: int, numbers: int) -> dict:
        """Shared memory and barriers.

        Args:
          rows: matrices of queries of a piece: queries, and gradients of results.
          numbers: numbers of a query: the normaliser, the mean.
        """
        C, U, S = self.computing, self.cut.units, self.cut.stages
        keys = _scratch(S, U * BLOCK, D, dtype=dtype)
        return {
            "k_ring": keys,
            "v_ring": keys,
            "places_ring": plgpu.SMEM((S, 2, U * BLOCK), jnp.int32),
            "row_buffers": _scratch(self.cut.rows, rows, C, BLOCK, D, dtype=dtype),
            "query_places": plgpu.SMEM((self.cut.rows, 3, C, BLOCK), jnp.int32),
            "query_numbers": plgpu.SMEM((self.cut.rows, max(numbers, 1), C, BLOCK), jnp.float32),
            "rows_ready": plgpu.Barrier(
                num_arrivals=(rows + 3 + numbers) * C, num_barriers=self.cut.rows
            ),
            "rows_free": plgpu.Barrier(num_arrivals=C, num_barriers=self.cut.rows),
            "k_ready": plgpu.Barrier(num_arrivals=U, num_barriers=S),
            "k_free": plgpu.Barrier(num_arrivals=C, num_barriers=S),
            "v_ready": plgpu.Barrier(num_arrivals=U, num_barriers=S),
            "v_free": plgpu.Barrier(num_arrivals=C, num_barriers=S),
            "places_ready": plgpu.Barrier(num_arrivals=2 * U, num_barriers=S),
            "turns": plgpu.Barrier(num_arrivals=C, num_barriers=1),
        }

    def each_piece(self, visit: Callable, carry):
        """Runs `visit(turn, index, carry) -> carry` for the pieces of this thread block."""

        def one(turn, carry):
            index = self.mine(turn)
            return jax.lax.cond(
                index < self.pieces, lambda: visit(turn, index, carry), lambda: carry
            )

        return jax.lax.fori_loop(0, self.turns, one, carry)


def _copy_pieces(work: _Work, lists, places, rows, numbers, k, v, memory):
    """The copying warpgroup: fills buffers in the order in which the others read them.

    Args:
      lists: the references order, tiles and counts.
      places: those of the places of queries, then of keys.
      rows: the matrices of queries.
      numbers: the numbers of queries, [B, H, N] float32.
    """
    order, tiles, counts = lists
    U, S, slots = work.cut.units, work.cut.stages, work.cut.rows

    def copy_rows(piece, turn):
        slot = jax.lax.rem(turn, slots)

        @pl.when(turn >= slots)
        def _():
            plgpu.barrier_wait(memory["rows_free"].at[slot])

        ready = memory["rows_ready"].at[slot]
        for c in range(work.computing):
            first, head = work.block(piece, c)
            here = pl.ds(first, BLOCK)
            for x, matrix in enumerate(rows):
                place = memory["row_buffers"].at[slot, x, c]
                plgpu.copy_gmem_to_smem(matrix.at[piece.b, here, head], place, ready)
            for x, place in enumerate(places[:3]):
                buffer = memory["query_places"].at[slot, x, c]
                plgpu.copy_gmem_to_smem(place.at[piece.b, here], buffer, ready)
            for x, number in enumerate(numbers):
                buffer = memory["query_numbers"].at[slot, x, c]
                plgpu.copy_gmem_to_smem(number.at[piece.b, head, here], buffer, ready)

    def piece_of(turn, index, carry):
        piece = work.piece(index, order)
        free, steps, listed = work.steps(piece, counts)

        def step_of(j, step):
            at = jax.lax.rem(step, S)
            # Where the last step is not full, its last block comes twice, and one is not seen.
            firsts = [
                work.key_block(piece, tiles, jnp.minimum(j * U + u, listed - 1)) for u in range(U)
            ]

            def copy(ring, matrix):
                @pl.when(step >= S)
                def _():
                    plgpu.barrier_wait(memory[f"{ring}_free"].at[at])

                for u, first in enumerate(firsts):
                    source = matrix.at[piece.b, pl.ds(first, BLOCK), piece.kv_head]
                    target = memory[f"{ring}_ring"].at[at, pl.ds(u * BLOCK, BLOCK)]
                    plgpu.copy_gmem_to_smem(source, target, memory[f"{ring}_ready"].at[at])

            copy("k", k)

            # Places are read before keys are free again. They do not wait for values, which one
            # warpgroup may still hold while the other needs these places to let it go on.
            @pl.when(j >= free)
            def _():
                for u, first in enumerate(firsts):
                    for x, place in enumerate(places[3:]):
                        target = memory["places_ring"].at[at, x, pl.ds(u * BLOCK, BLOCK)]
                        source = place.at[piece.b, pl.ds(first, BLOCK)]
                        plgpu.copy_gmem_to_smem(source, target, memory["places_ready"].at[at])

            copy("v", v)
            return step + 1

        # The first keys need not wait until the queries of the piece before have left.
        ahead = jnp.minimum(steps, S)
        step = jax.lax.fori_loop(0, ahead, step_of, carry[0])
        copy_rows(piece, turn)
        return jax.lax.fori_loop(ahead, steps, step_of, step), turn + 1

    steps, turns = work.each_piece(piece_of, (jnp.int32(0), jnp.int32(0)))
    _drain(memory, ("k_free", "v_free"), steps, S)
    _drain(memory, ("rows_free",), turns, slots)


def _drain(memory, names, fillings, buffers: int):
    """Waits until the last fillings of all buffers have been read."""
    for i in range(buffers):

        @pl.when(fillings > i)
        def _(i=i):
            for name in names:
                at = jax.lax.rem(fillings - 1 - i, buffers)
                plgpu.barrier_wait(memory[name].at[at])


def _bias_of(work: _Work, window, memory, slot, at, c, j, free, listed):
    """The bias of a step: which of its keys the queries of a block see."""
    shape, layout = (BLOCK, work.cut.units * BLOCK), plgpu.Layout.WGMMA

    def masked():
        plgpu.barrier_wait(memory["places_ready"].at[at])
        queries = [memory["query_places"].at[slot, x, c] for x in range(3)]
        keys = [memory["places_ring"].at[at, x] for x in range(2)]
        queries = _loads(work.static, queries, layout.reduce(1))
        keys = _loads(work.static, keys, layout.reduce(0))
        present = None
        if work.cut.units > 1:
            column = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
            column = _laid_out(work.static, column, layout)
            present = column < (listed - j * work.cut.units) * BLOCK
        return _bias(work.static, queries, keys, window, shape, 0, present)

    return jax.lax.cond(j >= free, masked, lambda: _full(work.static, shape, 0.0, layout))


def _forward_kernel(work: _Work, *refs, **memory):
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
                return _bias_of(work, window, memory, slot, slot_of(j), c, j, free, listed)

            def weights_of(products, top, total):
                """Weights, the new maximum and sum, and what older ones shrink by."""
                scores, factor, _ = _scores(static, products)
                new_top = jnp.maximum(top, jnp.max(scores, axis=1) * factor)
                shrink = jnp.exp2(top - new_top)
                weights = jnp.exp2(scores * factor - _rows_of(new_top, 0, shape))
                total = total * shrink + jnp.sum(weights, axis=1)
                return weights, new_top, total, shrink

            def first_half(j, top, total):
                """The weights of a step."""
                at = slot_of(j)
                plgpu.barrier_wait(memory["k_ready"].at[at])
                products = _products(static, bias_of(j), query, memory["k_ring"].at[at], give_way)
                plgpu.barrier_arrive(memory["k_free"].at[at])
                return weights_of(products, top, total)

            def second_half(j, total_out, weights):
                """Their product with values."""
                at = slot_of(j)
                arrive()
                plgpu.barrier_wait(memory["v_ready"].at[at])
                wait()
                (total_out,) = _times(static, (total_out, weights, memory["v_ring"].at[at]))
                plgpu.barrier_arrive(memory["v_free"].at[at])
                return total_out

            def visit(j, carry):
                total_out, top, total = carry
                weights, top, total, shrink = first_half(j, top, total)
                total_out = total_out * _rows_of(shrink, 0, (BLOCK, D))
                return second_half(j, total_out, weights.astype(v.dtype)), top, total

            start = (
                _full(static, (BLOCK, D), 0.0, layout),
                _full(static, (BLOCK,), MASKED, row),
                _full(static, (BLOCK,), 0.0, row),
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
            query[...] = (total_out * _rows_of(1.0 / total, 0, (BLOCK, D))).astype(out.dtype)
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
        _take_registers(C + 1)
        compute()

    @pl.when(c == C)
    def _():
        _give_registers(C + 1)
        _copy_pieces(work, (order, tiles, counts), places, [q], [], k, v, memory)


def _run_forward(static: Static, q, k, v, places, lists: Lists, window):
    work = _Work.of(static, FORWARD, q, k)
    B, N, H, D = q.shape
    return _call(
        static,
        functools.partial(_forward_kernel, work),
        work.computing + 1,
        work.grid,
        [lists.order, lists.keys, lists.key_counts, window, *places, q, k, v],
        [like(q), jax.ShapeDtypeStruct((B, H, N), jnp.float32)],
        work.scratch(D, q.dtype, 1, 0),
        "stream_attention",
    )


def _query_kernel(work: _Work, *refs, **memory):
    order, tiles, counts, window, *places, q, k, v, d_out, log_z, mean, d_q = refs
    static, c = work.static, jax.lax.axis_index("warpgroup")
    C, S, D = work.computing, work.cut.stages, q.shape[-1]
    row, shape = plgpu.Layout.WGMMA.reduce(1), (BLOCK, work.cut.units * BLOCK)

    def piece_of(turn, index, step):
        piece = work.piece(index, order)
        slot = jax.lax.rem(turn, work.cut.rows)
        plgpu.barrier_wait(memory["rows_ready"].at[slot])
        query, d_rows = (memory["row_buffers"].at[slot, x, c] for x in range(2))
        z, m = _loads(static, [memory["query_numbers"].at[slot, x, c] for x in range(2)], row)
        free, steps, listed = work.steps(piece, counts)

        def visit(j, carry):
            grad, step = carry
            at = jax.lax.rem(step, S)
            key, value = memory["k_ring"].at[at], memory["v_ring"].at[at]
            plgpu.barrier_wait(memory["k_ready"].at[at])
            plgpu.barrier_wait(memory["v_ready"].at[at])

            def weights_of(products):
                scores, factor, slope = _scores(static, products)
                weights = jnp.exp2(scores * factor - _rows_of(z, 0, shape))
                return (weights,) if static.soft_cap is None else (weights, slope)

            bias = _bias_of(work, window, memory, slot, at, c, j, free, listed)
            (weights, *slope), d_weights = _both_products(
                static, bias, query, key, d_rows, value, weights_of
            )
            plgpu.barrier_arrive(memory["v_free"].at[at])
            d_scores = functools.reduce(
                operator.mul, slope, weights * (d_weights - _rows_of(m, 0, shape))
            )
            (grad,) = _times(static, (grad, d_scores.astype(k.dtype), key))
            plgpu.barrier_arrive(memory["k_free"].at[at])
            return grad, step + 1

        start = _full(static, (BLOCK, D), 0.0, plgpu.Layout.WGMMA), step
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
        _take_registers(C + 1)
        work.each_piece(piece_of, jnp.int32(0))
        plgpu.wait_smem_to_gmem(0)

    @pl.when(c == C)
    def _():
        _give_registers(C + 1)
        lists = order, tiles, counts
        _copy_pieces(work, lists, places, [q, d_out], [log_z, mean], k, v, memory)


# --- the kernel whose pieces are blocks of keys


def _key_kernel(static: Static, R: int, *refs, **memory):
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
        _drain(memory, ("q_free",), listed, KEY_STAGES)

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
                scores, factor, slope = _scores(static, products)
                (z,) = _loads(static, numbers[:1], layout.reduce(0))
                weights = jnp.exp2(scores * factor - _rows_of(z, 1, shape))
                return (weights,) if static.soft_cap is None else (weights, slope)

            def masked():
                query_places = [memory["places_ring"].at[at, x] for x in range(3)]
                key_places = [memory["key_places"].at[x] for x in range(2)]
                query_places = _loads(static, query_places, layout.reduce(0))
                key_places = _loads(static, key_places, layout.reduce(1))
                return _bias(static, query_places, key_places, window, shape, 1)

            is_free = turn * COMPUTING + c < free
            bias = jax.lax.cond(is_free, lambda: _full(static, shape, 0.0, layout), masked)
            (weights, *slope), d_weights = _both_products(
                static, bias, key, query, value, d_rows, weights_of
            )
            (m,) = _loads(static, numbers[1:], layout.reduce(0))
            d_scores = functools.reduce(
                operator.mul, slope, weights * (d_weights - _rows_of(m, 1, shape))
            )
            grads = _times(
                static,
                (grad_v, weights.astype(v.dtype), d_rows),
                (grad_k, d_scores.astype(k.dtype), query),
            )
            plgpu.barrier_arrive(memory["q_free"].at[at])
            return grads

        # Step s is turn s // 2 of warpgroup s % 2.
        turns = jax.lax.div(listed + (COMPUTING - 1) - c, COMPUTING)
        zeros = _full(static, (BLOCK, D), 0.0, layout)
        grad_v, grad_k = jax.lax.fori_loop(0, turns, visit, (zeros, zeros))
        grad_k = grad_k * static.scale
        alone = sums[b, tile, 1] == 1

        def leave(total, mine, grad, parts):
            """Writes a sum: the gradient, or the part of a chunk of several."""
            (given,) = _loads(static, [memory["given"]], layout)
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
            _take_registers(COMPUTING + 1)
            compute()

        @pl.when(c == COMPUTING)
        def _():
            _give_registers(COMPUTING + 1)
            copy()


def _key_scratch(D: int, dtype) -> dict:
    return {
        "key": _scratch(BLOCK, D, dtype=dtype),
        "value": _scratch(BLOCK, D, dtype=dtype),
        "key_places": plgpu.SMEM((2, BLOCK), jnp.int32),
        "q_ring": _scratch(KEY_STAGES, 2, BLOCK, D, dtype=dtype),
        "numbers_ring": plgpu.SMEM((KEY_STAGES, 2, BLOCK), jnp.float32),
        "places_ring": plgpu.SMEM((KEY_STAGES, 3, BLOCK), jnp.int32),
        "given": _scratch(BLOCK, D, dtype=jnp.float32),
        "mine_ready": plgpu.Barrier(num_arrivals=4),
        "q_ready": plgpu.Barrier(num_arrivals=7, num_barriers=KEY_STAGES),
        "q_free": plgpu.Barrier(num_arrivals=1, num_barriers=KEY_STAGES),
        "k_given": plgpu.Barrier(num_arrivals=1),
        "v_given": plgpu.Barrier(num_arrivals=1),
    }


def _run_gradients(static: Static, q, k, v, places, lists: Lists, window, d_out, log_z, mean):
    work = _Work.of(static, OF_QUERIES, q, k)
    (B, _, H, D), K = q.shape, k.shape[2]
    tensors = [window, *places, q, k, v, d_out, log_z, mean]
    (d_q,) = _call(
        static,
        functools.partial(_query_kernel, work),
        work.computing + 1,
        work.grid,
        [lists.order, lists.keys, lists.key_counts, *tensors],
        [like(q)],
        work.scratch(D, q.dtype, 2, 2),
        "stream_attention_d_query",
    )
    M = lists.chunks.shape[1]
    part = jax.ShapeDtypeStruct((B, M, K, static.tile, D), jnp.float32)
    d_k, d_v, *parts = _call(
        static,
        functools.partial(_key_kernel, static, H // K),
        COMPUTING + 1,
        B * M * (static.tile // BLOCK) * K,
        [lists.queries, lists.query_counts, lists.chunks, lists.sums, *tensors],
        [like(k), like(v), part, part],
        _key_scratch(D, k.dtype),
        "stream_attention_d_key",
    )
    d_k, d_v = stream_gpu.sum_of_parts(static, lists, *parts, d_k, d_v, whole=True)
    return d_q, d_k, d_v
