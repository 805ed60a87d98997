"""Decode attention for GPUs in Triton; there is one program for each row and key/value head.

A program walks the blocks of columns that its row sees, from the newest back, with a running
softmax. With a table it looks up which row of the store, a page, holds a block. The plain version
is `group_attention.attend_part`.

Letters: K key/value heads, Q queries of a row and head, S of them and padding, D head dim.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from adpo_jax.engine.group_attention import Part, Reach, block_range
from adpo_jax.engine.kv_cache import KV, LayerKV
from adpo_jax.model import attention_choice
from adpo_jax.model.attention import MASKED
from adpo_jax.model.triton import plt

# The smallest side of a matrix product on tensor cores.
MIN_QUERIES = 16
# Numbers in the queries of a program; more of them are cut into several programs.
QUERY_NUMBERS = 1 << 14
# Bytes of a core's shared memory that a program may take; an A100 has 163 KiB for it.
SHARED_BYTES = 160 << 10
# Columns of a block and stages of its pipeline, the first that the memory has room for. The first
# of all was the fastest of 32 on an H200 (0.139 ms for 232 rows of 8 heads that see 483 MB).
BLOCKS = ((64, 3), (32, 3), (32, 2), (16, 2))
WARPS = 4
MOST_HEAD_DIM = 512


def obstacle(device: jax.Device | None = None) -> str:
    """Why the kernel runs on no GPU, or not on this one; empty where it does."""
    if plt is None:
        return f"needs Pallas' Triton backend, which jax {jax.__version__} does not have"
    return attention_choice.old_gpu(device)


class Cut(NamedTuple):
    """The size of a program."""

    queries: int  # padding included
    block: int  # columns that are read together
    stages: int

    @classmethod
    def of(cls, queries: int, D: int, itemsize: int) -> "Cut":
        """That of so many queries of a row and head, and of keys whose numbers have so many bytes.

        What a compiled program takes is less than what is counted here, by up to 64 KiB.
        """
        most = max(MIN_QUERIES, QUERY_NUMBERS // D)
        S = min(most, max(MIN_QUERIES, 1 << (queries - 1).bit_length()))

        def taken(block: int, stages: int) -> int:
            return 4 * S * D + (stages - 1) * 2 * block * D * itemsize

        fitting = (pair for pair in BLOCKS if taken(*pair) <= SHARED_BYTES)
        return cls(S, *next(fitting, BLOCKS[-1]))

    def programs(self, queries: int) -> int:
        """How many programs have the queries of a row and head."""
        return -(-queries // self.queries)


@dataclasses.dataclass(frozen=True)
class Walk:
    """How a program walks the columns of a row of a store; all of it is static.

    Attributes:
      block: columns that are read together.
      columns: those of a row, in all its pages where there are any.
      ring: whether the columns before the first are the last ones, as of `Reach`.
      nearest: how many columns back from its origin a query begins to see.
    """

    block: int
    columns: int
    ring: bool
    soft_cap: float | None
    nearest: int = 0

    @property
    def blocks(self) -> int:
        """The blocks of a row."""
        return -(-self.columns // self.block)

    def attend(self, q, k_ref, v_ref, here, bounds, start, last, running):
        """A running softmax over the blocks that a row sees, from the newest back.

        Args:
          q: [S, D], scaled.
          here: block -> where it begins, the leading indices into keys and values and the column.
          bounds: origin and reach [S] of each query, as in `Reach`, and the row's length.
          start, last: of the row, as of `block_range`.
          running: `Running` to go on from.
        """
        origin, reach, length = bounds

        def visit(j, running: Running) -> Running:
            this = jax.lax.rem(start - j + self.blocks, self.blocks)
            at = this * self.block + jnp.arange(self.block)
            back = origin[:, None] - at[None, :]
            if self.ring:
                back = jnp.where(back < 0, back + self.columns, back)
            seen = (back <= reach[:, None]) & (at[None, :] < jnp.minimum(length, self.columns))
            if self.nearest:
                seen &= back >= self.nearest
            # What no query sees is not read: on average that is a block of each row.
            read = (jnp.max(seen.astype(jnp.int32), axis=0) > 0)[:, None]
            *lead, first = here(this)
            block = (*lead, pl.ds(first, self.block), slice(None))
            k, v = (
                plt.load(ref.at[block], mask=read, other=0).astype(q.dtype)
                for ref in (k_ref, v_ref)
            )
            scores = capped(plt.dot(q, k, trans_b=True), self.soft_cap)
            scores = jnp.where(seen, scores, MASKED)
            out, top, total = running
            new_top = jnp.maximum(top, jnp.max(scores, axis=1))
            weights = jnp.where(seen, jnp.exp(scores - new_top[:, None]), 0.0)
            shrink = jnp.exp(top - new_top)
            total = total * shrink + jnp.sum(weights, axis=1)
            out = out * shrink[:, None] + plt.dot(weights.astype(v.dtype), v)
            return Running(out, new_top, total)

        return jax.lax.fori_loop(0, last + 1, visit, running)


class Running(NamedTuple):
    """Attention to the keys so far, as `Part`."""

    out: jax.Array  # [S, D] float32
    top: jax.Array  # [S] float32
    total: jax.Array  # [S] float32

    @classmethod
    def nothing(cls, queries: int, D: int) -> "Running":
        """Before the first key."""
        return cls(
            jnp.zeros((queries, D), jnp.float32),
            jnp.full((queries,), MASKED, jnp.float32),
            # As on a TPU: what is divided by the total of a row that sees no key is 0, not NaN.
            jnp.ones((queries,), jnp.float32),
        )


def capped(scores, soft_cap: float | None):
    """soft_cap * tanh(scores / soft_cap), of functions that Triton has."""
    if soft_cap is None:
        return scores
    return soft_cap * (2 / (1 + jnp.exp(-2 * scores / soft_cap)) - 1)


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
    walk: Walk,
    padded: int,
):
    table_ref = rest[0] if len(rest) == 4 else None
    out_ref, top_ref, total_ref = rest[-3:]
    row, head = pl.program_id(0), pl.program_id(1)
    layer, start, length = index_ref[0], start_ref[row], length_ref[row]
    queries, D = q_ref.shape[2:]
    first = pl.program_id(2) * padded
    real = first + jnp.arange(padded) < queries
    # Beyond the arrays a mask holds.
    part = pl.ds(first, padded)
    mine = (row, head, part)
    q = plt.load(q_ref.at[*mine, slice(None)], mask=real[:, None], other=0)
    origin = plt.load(origin_ref.at[row, part], mask=real, other=0)
    reach = plt.load(reach_ref.at[row, part], mask=real, other=-1)

    def here(this):
        if table_ref is None:
            return layer, row, head, this * walk.block
        of_page = k_ref.shape[-2] // walk.block
        page = table_ref[row, this // of_page]
        return layer, page, head, jax.lax.rem(this, of_page) * walk.block

    found = walk.attend(
        q,
        k_ref,
        v_ref,
        here,
        (origin, reach, length),
        start,
        last_ref[row],
        Running.nothing(padded, D),
    )
    plt.store(out_ref.at[*mine, slice(None)], found.out, mask=real[:, None])
    plt.store(top_ref.at[*mine], found.top, mask=real)
    plt.store(total_ref.at[*mine], found.total, mask=real)


def attend_part(
    q: jax.Array,
    kv: KV,
    index,
    reach: Reach,
    table: jax.Array | None = None,
    *,
    soft_cap: float | None = None,
    interpret: bool = False,
    block: int = 0,
) -> Part:
    """As `group_attention.attend_part`, on a cache whose layers are a tuple or stacked.

    Keys are [rows, K, columns, D] of a layer.

    Args:
      block: columns that are read together; 0 for as many as there is room for.
    """
    if not isinstance(kv, LayerKV):
        kv, index = jax.tree.map(lambda x: x[None], kv[index]), 0
    rows, K, Q, D = q.shape
    cut = Cut.of(Q, D, kv.v.dtype.itemsize)
    block = block or cut.block
    columns, tables = kv.v.shape[-2], ()
    if table is not None:
        # A block lies within a page.
        block, columns = math.gcd(block, columns), columns * table.shape[1]
        tables = (table.astype(jnp.int32),)
    start, last = block_range(reach, columns, block)
    whole = pl.BlockSpec(memory_space=pl.ANY)
    found = pl.pallas_call(
        functools.partial(
            _kernel, walk=Walk(block, columns, reach.ring, soft_cap), padded=cut.queries
        ),
        grid=(rows, K, cut.programs(Q)),
        in_specs=[whole] * (9 + len(tables)),
        out_specs=[whole] * 3,
        out_shape=[
            jax.ShapeDtypeStruct((rows, K, Q, D), jnp.float32),
            jax.ShapeDtypeStruct((rows, K, Q), jnp.float32),
            jax.ShapeDtypeStruct((rows, K, Q), jnp.float32),
        ],
        compiler_params=plt.CompilerParams(num_warps=WARPS, num_stages=cut.stages),
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
    return Part(*found)
