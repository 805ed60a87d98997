"""Attention of a decode step: which columns of each store a slot sees, and the parts merged.

A decode step gathers the queries of a group and attends to its prefix once for all of them. The
parts are merged by their log-sum-exps, as if the keys lay side by side.

The stores are those of `kv_cache`.

Letters: B slots, P prefix rows, M samples of a prefix row, S past rows, C columns of the ring, N
pages of a slot, H heads, K key/value heads, R = H / K, Q queries of a row and head, D head dim.
"""

import functools
import math
import operator
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from adpo_jax.devices.sharding import on_each_device
from adpo_jax.engine.kv_cache import KV, LayerKV, any_layer, num_columns, of_kind, read_layer
from adpo_jax.model.attention import MASKED, LayerInfo, by_kv_head

# A reach that is longer than any sequence.
UNBOUNDED = 1 << 30


class PastView(NamedTuple):
    """Which past row belongs to which slot; all layers share it."""

    row: jax.Array  # [B] int32, the slot's past row
    slot: jax.Array  # [S, 1] int32, slot of the sample of a past row; any number where none
    first: jax.Array  # [S] int32, position of the first column, in its sequence
    length: jax.Array  # [S] int32, columns that the slot sees; 0 for a row without a slot


class PageView(NamedTuple):
    """Which pages belong to which slot; all layers share it."""

    table: jax.Array  # [B, N] int32, the slot's pages in their order; any number past the last one
    place: jax.Array  # [B] int32, of the token being fed, from the first page's first column on
    length: jax.Array  # [B] int32, columns that the slot has in pages


class View(NamedTuple):
    """Where each slot is in this step; all layers share it."""

    position: jax.Array  # [B] int32, of the token being fed, in its sequence
    age: jax.Array  # [B] int32, tokens in the ring before the one being fed; -1 for an idle slot
    column: jax.Array  # int32 scalar, of the ring, where this step writes
    row: jax.Array  # [B] int32, the slot's prefix row
    rank: jax.Array  # [B] int32, the slot's place among the samples of that row
    slot: jax.Array  # [P, M] int32, slot of each sample of a prefix row; any number where none
    prefix_length: jax.Array  # [P] int32
    past: PastView | None = None
    pages: PageView | None = None


class Reach(NamedTuple):
    """Which columns a query sees: of those below `length`, the last `back + 1` up to `origin`.

    In a ring, the columns before the first are the last ones.
    """

    origin: jax.Array  # [rows, Q] int32
    back: jax.Array  # [rows, Q] int32, -1 for nothing
    length: jax.Array  # [rows] int32
    ring: bool


def ring_reach(view: View, columns: int, queries: int, window) -> Reach:
    """The reach of slots in the ring: a slot sees its own tokens, the one being fed included."""
    B = view.age.shape[0]
    back = jnp.minimum(view.age, window - 1)
    return Reach(
        origin=jnp.broadcast_to(view.column, (B, queries)),
        back=jnp.broadcast_to(back[:, None], (B, queries)),
        length=jnp.full((B,), columns, jnp.int32),
        ring=True,
    )


def row_reach(position_PM: jax.Array, lives_PM: jax.Array, length_P, queries: int, window) -> Reach:
    """The reach of samples in a row that they share, which nobody else sees.

    Args:
      position_PM: int32, of the token being fed, counted from the row's first column.
      lives_PM: bool, whether there is a sample, and it is not idle.
      length_P: int32, columns of the row.
      queries: heads a sample.
    """
    back = jnp.where(lives_PM, jnp.minimum(window - 1, UNBOUNDED), -1)
    origin, back = (jnp.repeat(x, queries, axis=1) for x in (position_PM, back))
    return Reach(origin, back, length_P, ring=False)


def columns_in_reach(reach: Reach, columns: int) -> jax.Array:
    """Which columns of a store each query sees, [rows, Q, columns] bool."""
    at = jnp.arange(columns, dtype=jnp.int32)
    behind = reach.origin[:, :, None] - at
    if reach.ring:
        behind = jnp.mod(behind, columns)
    return (behind <= reach.back[:, :, None]) & (at < reach.length[:, None, None])


class Part(NamedTuple):
    """Attention to a part of the keys, not yet divided by the sum of the weights."""

    out: jax.Array  # [rows, K, Q, D] float32, sum of exp(score - top) * value
    top: jax.Array  # [rows, K, Q] float32, the largest score
    total: jax.Array  # [rows, K, Q] float32, sum of exp(score - top)


class AttendPart(Protocol):
    """Attention of decoding to one store, as `attend_part`."""

    def __call__(
        self, q: jax.Array, kv: KV, index, reach: Reach, table: jax.Array | None = None
    ) -> Part: ...


def attend_part(
    q,
    kv: KV,
    index,
    reach: Reach,
    table: jax.Array | None = None,
    *,
    soft_cap: float | None,
    transposed_keys: bool,
) -> Part:
    """Attention of queries to the keys of their row; the plain version of the kernels.

    Args:
      q: [rows, K, Q, D], scaled.
      kv, index: the stored layers, and the number of the layer.
      table: [rows, N] int32, the rows of the store whose columns, one row after the other, each
        row of q attends to; None for the row with the same number.
    """
    if table is not None:
        return _attend_pages(
            q, kv, index, reach, table, soft_cap=soft_cap, transposed_keys=transposed_keys
        )
    layer = read_layer(kv, index)
    spec = "bkqd,bkds->bkqs" if transposed_keys else "bkqd,bksd->bkqs"
    k = layer.k.astype(q.dtype)
    scores = jnp.einsum(spec, q, k, preferred_element_type=jnp.float32)
    if layer.k_scale is not None:
        scores = scores * layer.k_scale[:, :, None, :]
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    scores = jnp.where(columns_in_reach(reach, scores.shape[-1])[:, None], scores, MASKED)
    top = jnp.max(scores, axis=-1)
    weights = jnp.exp(scores - top[..., None])
    total = jnp.sum(weights, axis=-1)
    if layer.v_scale is not None:
        weights = weights * layer.v_scale[:, :, None, :]
    out = jnp.einsum(
        "bkqs,bksd->bkqd",
        weights.astype(q.dtype),
        layer.v.astype(q.dtype),
        preferred_element_type=jnp.float32,
    )
    return Part(out, top, total)


def _attend_pages(
    q, kv: KV, index, reach: Reach, table: jax.Array, *, transposed_keys: bool, **options
) -> Part:
    """`attend_part` with a table."""
    visit = functools.partial(_visit_pages, kv, index, transposed_keys=transposed_keys, **options)
    arguments = q, reach.origin, reach.back, reach.length, table
    # Keys are transposed on a CPU. There rows are visited in turn, each with its own number of
    # pages; side by side, as others want them, all would wait for the longest one.
    if transposed_keys and len(q) > 1:
        part = jax.lax.map(lambda row: visit(*(x[None] for x in row)), arguments)
        return jax.tree.map(lambda x: x[:, 0], part)
    return visit(*arguments)


def _visit_pages(kv: KV, index, q, origin, back, length, table: jax.Array, **options) -> Part:
    """Attention to one page of every row after the other, from the first one that is seen.

    Only the pages of one step are gathered, never all of them.
    """
    page = num_columns(kv)

    def pages_at(j) -> LayerKV:
        rows = table[:, j]
        if isinstance(kv, LayerKV):
            return jax.tree.map(lambda x: x[index, rows], kv)
        if len(rows) > 1:
            return jax.tree.map(lambda x: x[rows], kv[index])
        # A CPU slices a single page faster than it gathers it.
        return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, rows[0], 1), kv[index])

    def visit(j, part: Part) -> Part:
        of_page = Reach(origin - j * page, back, length - j * page, ring=False)
        return _joined(part, attend_part(q, (pages_at(j),), 0, of_page, **options))

    top = jnp.full(q.shape[:-1], MASKED, jnp.float32)
    nothing = Part(jnp.zeros(q.shape, jnp.float32), top, jnp.zeros_like(top))
    reach = Reach(origin, back, length, ring=False)
    start, last = block_range(reach, page * table.shape[1], page)
    stop = jnp.max(-(-length // page))
    return jax.lax.fori_loop(jnp.min(start - last), stop, visit, nothing)


def block_range(reach: Reach, columns: int, block: int) -> tuple[jax.Array, jax.Array]:
    """Which blocks of columns a row needs.

    Returns:
      start, last: [rows] int32; block (start - j) mod n for j = 0 .. last.
    """
    blocks = -(-columns // block)
    newest = jnp.max(reach.origin, axis=1)
    if not reach.ring:
        newest = jnp.maximum(reach.length - 1, 0)
    oldest = jnp.min(reach.origin - reach.back, axis=1)
    if not reach.ring:
        oldest = jnp.clip(oldest, 0, newest)
    # Before the first column of a ring is its last block, which need not be a whole one.
    of_oldest = jnp.where(oldest < 0, (oldest + columns) // block - blocks, oldest // block)
    start = newest // block
    last = jnp.clip(start - of_oldest, 0, blocks - 1)
    return start.astype(jnp.int32), last.astype(jnp.int32)


def _joined(a: Part, b: Part) -> Part:
    """Attention to the keys of both parts."""
    top = jnp.maximum(a.top, b.top)
    of_a, of_b = jnp.exp(a.top - top), jnp.exp(b.top - top)
    out = a.out * of_a[..., None] + b.out * of_b[..., None]
    return Part(out, top, a.total * of_a + b.total * of_b)


def merge(*parts: Part, sinks: jax.Array | None = None) -> jax.Array:
    """Attention to the keys of all parts, [..., D] float32.

    A part whose keys are all masked has a top of `MASKED` and so no weight.

    Args:
      sinks: [K, Q] float32, the logits of attention sinks; None for none.
    """
    tops = [part.top for part in parts] + ([] if sinks is None else [sinks])
    top = functools.reduce(jnp.maximum, tops)
    weights = [jnp.exp(part.top - top) for part in parts]
    total = functools.reduce(operator.add, (p.total * w for p, w in zip(parts, weights)))
    if sinks is not None:
        total = total + jnp.exp(sinks - top)
    out = functools.reduce(operator.add, (p.out * w[..., None] for p, w in zip(parts, weights)))
    return out / total[..., None]


def prefix_reach(view: View, layer: LayerInfo, queries: int, mesh: Mesh | None) -> Reach:
    """The reach of the samples of each prefix row in that row, [P, M queries].

    Args:
      queries: heads a sample.
    """
    first = jnp.zeros_like(view.prefix_length)
    of_rows = functools.partial(_reach_of_members, view, layer, queries, mesh)
    return of_rows(view.slot, view.row, view.rank, first, view.prefix_length)


def past_reach(view: View, layer: LayerInfo, queries: int, mesh: Mesh | None) -> Reach:
    """The reach of the sample of each past row in that row, [S, queries], as `prefix_reach`."""
    past, rank = view.past, jnp.zeros_like(view.past.row)
    of_rows = functools.partial(_reach_of_members, view, layer, queries, mesh)
    return of_rows(past.slot, past.row, rank, past.first, past.length)


def _reach_of_members(view, layer, queries, mesh, slot_PM, row_B, rank_B, first_P, length_P):
    """The reach of samples in rows that they share, whose columns count from `first_P` on."""

    def of_members(position_B, age_B, row_B, rank_B, slot_PM):  # -> positions, who lives, [P, M]
        (P, M), slot_PM = slot_PM.shape, slot_PM % len(position_B)
        is_there = (row_B[slot_PM] % P == jnp.arange(P)[:, None]) & (
            rank_B[slot_PM] == jnp.arange(M)
        )
        return position_B[slot_PM], is_there & (age_B[slot_PM] >= 0)

    by_row, sizes = ("batch",), {"batch": math.gcd(len(row_B), len(slot_PM))}
    members = on_each_device(of_members, mesh, sizes, (by_row,) * 5, by_row)
    position_PM, lives_PM = members(view.position, view.age, row_B, rank_B, slot_PM)
    window = layer.window_at(position_PM)
    return row_reach(position_PM - first_P[:, None], lives_PM, length_P, queries, window)


def group_attention(
    q_BHD: jax.Array,
    ring: KV,
    prefix: KV,
    layer: LayerInfo,
    view: View,
    *,
    scale: float,
    attend: AttendPart,
    mesh: Mesh | None = None,
    past: KV | None = None,
    pages: KV | None = None,
) -> jax.Array:
    """One query a slot over its group's prefix, its past, its pages and its row of the ring.

    Queries are gathered by group, so that a prefix is read once for all its samples. A slot lies on
    the device of its prefix row, its past row and its pages (`schedule`), so that nothing moves
    between devices.

    Args:
      past: the third store, where there is one; `view.past` says whose its rows are.
      pages: the fourth store, where there is one; `view.pages` says whose its pages are.

    Returns:
      [B, H, D] in the dtype of q.
    """
    B, H, D = q_BHD.shape
    ring, prefix = of_kind(ring, layer), of_kind(prefix, layer)
    past = None if past is None else of_kind(past, layer)
    K, C = any_layer(ring).v.shape[-3], num_columns(ring)
    R = H // K
    q_BKRD = (q_BHD * jnp.asarray(scale, q_BHD.dtype)).reshape(B, K, R, D)
    reach = ring_reach(view, C, R, layer.window_at(view.position))
    of_ring = attend(q_BKRD, ring, layer.at, reach)
    by_row, by_head = ("batch",), ("batch", "kv_heads")

    def of_rows(q_BKRD, slot_PM):  # -> [P, K, M * R, D]
        (P, M), K = slot_PM.shape, q_BKRD.shape[1]
        return q_BKRD[slot_PM % len(q_BKRD)].swapaxes(1, 2).reshape(P, K, M * R, D)

    def part_of(kv, slot_PM, row_B, rank_B, reach: Reach) -> Part:
        """Attention to a store whose rows, P of them, several slots share, M at most."""
        P, M = slot_PM.shape
        sizes = {"batch": math.gcd(B, P), "kv_heads": K}

        def of_slots(x, row_B, rank_B):  # [P, K, M * R, ...] -> [B, K, R, ...]
            P, K = x.shape[:2]
            by_sample = x.reshape(P, K, M, R, *x.shape[3:]).swapaxes(1, 2)
            return by_sample[row_B % P, rank_B]

        def at_home(gather, x, *indices):
            axes = (by_head, *(by_row for _ in indices))
            return on_each_device(gather, mesh, sizes, axes, by_head)(x, *indices)

        q_PKQD = at_home(of_rows, q_BKRD, slot_PM)
        shared = attend(q_PKQD, kv, layer.at, reach)
        return jax.tree.map(lambda x: at_home(of_slots, x, row_B, rank_B), shared)

    reach = prefix_reach(view, layer, R, mesh)
    parts = [of_ring, part_of(prefix, view.slot, view.row, view.rank, reach)]
    if past is not None:
        place, rank = view.past, jnp.zeros_like(view.past.row)
        reach = past_reach(view, layer, R, mesh)
        parts.append(part_of(past, place.slot, place.row, rank, reach))
    if pages is not None:
        paged = view.pages
        window, lives = layer.window_at(view.position[:, None]), view.age[:, None] >= 0
        reach = row_reach(paged.place[:, None], lives, paged.length, R, window)
        parts.append(attend(q_BKRD, of_kind(pages, layer), layer.at, reach, paged.table))
    sinks = None if layer.sinks is None else by_kv_head(layer.sinks, K)
    return merge(*parts, sinks=sinks).reshape(B, H, D).astype(q_BHD.dtype)
