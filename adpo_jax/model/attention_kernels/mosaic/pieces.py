"""Work whose pieces are blocks of queries: how it is cut, and the warpgroup that copies for it.

Letters: as in `stream_mosaic`.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from adpo_jax.model.attention_kernels.mosaic.warpgroups import (
    BLOCK,
    COMPUTING,
    bias_of,
    full,
    laid_out,
    loads,
    plgpu,
    scratch_of,
)
from adpo_jax.model.attention_kernels.stream_gpu import Static

# Thread blocks that an H100 or H200 runs at once, one on each of its multiprocessors.
AT_ONCE = 132


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


class Piece(NamedTuple):
    """A piece of work: C blocks of queries that see the same tiles, and their key/value head."""

    b: jax.Array
    tile: jax.Array
    group: jax.Array
    kv_head: jax.Array


class Work(NamedTuple):
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

    def piece(self, index, order) -> Piece:
        """The pieces of long lists come first."""
        groups = self.heads * (self.static.tile // BLOCK) // self.computing
        index, kv_head = jax.lax.div(index, self.kv_heads), jax.lax.rem(index, self.kv_heads)
        index, group = jax.lax.div(index, groups), jax.lax.rem(index, groups)
        b = jax.lax.rem(index, self.streams)
        return Piece(b, order[b, jax.lax.div(index, self.streams)], group, kv_head)

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

    def block(self, piece: Piece, c):
        """The first query and the head of the c-th block of a piece."""
        unit = piece.group * self.computing + c
        first = piece.tile * self.static.tile + jax.lax.div(unit, self.heads) * BLOCK
        return first, piece.kv_head * self.heads + jax.lax.rem(unit, self.heads)

    def steps(self, piece: Piece, counts):
        """How many steps need no mask, how many there are, and the blocks of keys of all."""
        blocks, units = self.static.tile // BLOCK, self.cut.units
        free = counts[piece.b, piece.tile, 0] * (0 if self.static.windows else blocks)
        listed = counts[piece.b, piece.tile, 1] * blocks
        return jax.lax.div(free, units), jax.lax.div(listed + (units - 1), units), listed

    def key_block(self, piece: Piece, tiles, unit):
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
        keys = scratch_of(S, U * BLOCK, D, dtype=dtype)
        return {
            "k_ring": keys,
            "v_ring": keys,
            "places_ring": plgpu.SMEM((S, 2, U * BLOCK), jnp.int32),
            "row_buffers": scratch_of(self.cut.rows, rows, C, BLOCK, D, dtype=dtype),
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


def copy_pieces(work: Work, lists, places, rows, numbers, k, v, memory):
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
    drain(memory, ("k_free", "v_free"), steps, S)
    drain(memory, ("rows_free",), turns, slots)


def drain(memory, names, fillings, buffers: int):
    """Waits until the last fillings of all buffers have been read."""
    for i in range(buffers):

        @pl.when(fillings > i)
        def _(i=i):
            for name in names:
                at = jax.lax.rem(fillings - 1 - i, buffers)
                plgpu.barrier_wait(memory[name].at[at])


def bias_of_step(work: Work, window, memory, slot, at, c, j, free, listed):
    """The bias of a step: which of its keys the queries of a block see."""
    shape, layout = (BLOCK, work.cut.units * BLOCK), plgpu.Layout.WGMMA

    def masked():
        plgpu.barrier_wait(memory["places_ready"].at[at])
        queries = [memory["query_places"].at[slot, x, c] for x in range(3)]
        keys = [memory["places_ring"].at[at, x] for x in range(2)]
        queries = loads(work.static, queries, layout.reduce(1))
        keys = loads(work.static, keys, layout.reduce(0))
        present = None
        if work.cut.units > 1:
            column = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
            column = laid_out(work.static, column, layout)
            present = column < (listed - j * work.cut.units) * BLOCK
        return bias_of(work.static, queries, keys, window, shape, 0, present)

    return jax.lax.cond(j >= free, masked, lambda: full(work.static, shape, 0.0, layout))
