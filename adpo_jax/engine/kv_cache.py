"""Keys and values of the rollout engine: prompts in shared prefix rows, samples in a ring.

A slot (one sample being decoded) attends to two stores:

- *prefix*: one row a prompt, shared by the samples of its group. It holds all tokens of the prompt
  but the last, which is the first token that each sample feeds.
- *own*: one row a slot, the tokens of the sample itself. The columns form a ring that all slots
  fill together: step t of the engine writes column t mod C of every row. So a step writes one
  column, whatever the slots' lengths, instead of scattering. A slot sees the columns of its own
  last steps, so a refilled slot needs no reset.

Where samples go on after tokens that they did not sample in their slot there is a third store:

- *past*: one row a sample, its completion from before it took its slot: earlier turns, and what
  tools said. The first column is the last token of the prompt, which the prefix does not hold.

Where completions may be long, the ring is short, and what no longer fits it lies in a fourth store:

- *pages*: rows of equal length that belong to no slot for good. The table of a slot lists the pages
  with the tokens of its sample that left the ring (`pages`), in their order. The first column of
  the first page is the last token of the prompt, as in the past.

Layers of linear attention keep a state of fixed size in place of columns (`state_store`). A row of
a store has one beside its columns, so that what is done with rows of keys and values is done with
states too: `CacheLayout` reads and writes the memory of a layer, and copies and takes rows of all
layers, whatever it is made of.

A decode step gathers the queries of a group and attends to its prefix once for all of them. The
parts are merged by their log-sum-exps, as if the keys lay side by side.

Letters: B slots, P prefix rows, M samples of a prefix row, S past rows, C columns of the ring, T
tokens of a prefix, N pages of a slot, L layers, H heads, K key/value heads, R = H / K, D head dim.
"""

import dataclasses
import functools
import math
import operator
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from adpo_jax.devices.sharding import on_each_device
from adpo_jax.engine.state_store import StateLayout
from adpo_jax.model.attention import MASKED, LayerInfo, by_kv_head
from adpo_jax.model.linear_attention import Memory

# A reach that is longer than any sequence.
UNBOUNDED = 1 << 30
# Bytes of the states of rows that are prefilled in one call, about.
STATE_BYTES = 1 << 29
# In place of the axis of the columns, for an array that has none.
NO_COLUMNS = -1


class LayerKV(NamedTuple):
    """Keys and values of one layer, or of all of them with a leading layer axis.

    k: [rows, K, D, columns] where keys are transposed, else [rows, K, columns, D].
    v: [rows, K, columns, D].
    k_scale, v_scale: [rows, K, columns] float32 of an int8 cache, else None.
    """

    k: jax.Array
    v: jax.Array
    k_scale: jax.Array | None = None
    v_scale: jax.Array | None = None


# All layers: a tuple with one entry a layer (unrolled), or one LayerKV of stacked arrays. Where
# layers are of two kinds, a tuple with one such store for each; that of linear attention holds
# `Memory` and stands last.
KV = Any


def is_layers(kv: KV) -> bool:
    """Whether it is what a tree of layers ends at."""
    return isinstance(kv, LayerKV | Memory)


def any_layer(kv: KV) -> LayerKV:
    """The first LayerKV of a store; all have as many rows and columns."""
    return jax.tree.leaves(kv, is_leaf=is_layers)[0]


def of_kind(kv: KV, layer: LayerInfo) -> KV:
    """The part of a store that holds the layers of this one's shape; `layer.at` is its place."""
    return kv if layer.store is None else kv[layer.store.kind]


class Copies(NamedTuple):
    """Copies of columns into rows of another store, and of the state that lies beside them.

    [N] int32 each; those of a shard lie side by side.
    """

    row: np.ndarray  # row that is written
    source: np.ndarray  # row of the store that is read
    first: np.ndarray  # column of that row where the copy begins; it goes on round the ring
    at: np.ndarray  # column of the row that is written where it begins
    count: np.ndarray  # columns; 0 for no copy
    state_row: np.ndarray  # row whose state is written; another one where rows are pages


@dataclasses.dataclass(frozen=True)
class CacheLayout:
    """How keys and values lie in memory.

    Attributes:
      dtype: dtype of the stored numbers; int8 adds a float32 scale for each token and head.
      stacked: whether layers lie on a leading axis (scanned), or else in a tuple. A CPU wants the
        tuple, since XLA copies the slice of a stacked array before a matrix product: a step of 128
        rows and 25M parameters takes 27 ms with a tuple, 60 ms with a stack.
      transposed_keys: whether keys lie as [D, columns]. A CPU's product of one query with the keys
        then reads along the columns: 24 ms against 35 ms for 128 rows of 128 columns and 8 layers.
      kinds: (layers, key/value heads, head dim) of each kind of layer where these differ, as in
        `ModelConfig.kinds`; () where all layers are alike. The numbers above count for none then.
      linear: the layout of the layers of linear attention; None for none. With it `kinds` has those
        of full attention.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: Any
    stacked: bool
    transposed_keys: bool
    kinds: tuple[tuple[int, int, int], ...] = ()
    linear: StateLayout | None = None

    def __post_init__(self):
        assert self.kinds or not self.linear

    @property
    def parts(self) -> tuple["CacheLayout", ...]:
        """The layout of each kind of layer; of one kind, this layout."""
        if not self.kinds:
            return (self,)
        return tuple(
            dataclasses.replace(
                self, num_layers=L, num_kv_heads=K, head_dim=D, kinds=(), linear=None
            )
            for L, K, D in self.kinds
        )

    @property
    def without_states(self) -> "CacheLayout":
        """The layout of keys and values alone."""
        return dataclasses.replace(self, linear=None)

    @property
    def quantized(self) -> bool:
        return jnp.dtype(self.dtype) == jnp.int8

    def token_bytes(self) -> int:
        """Bytes of one token's keys and values over all layers."""
        if self.kinds:
            return sum(part.token_bytes() for part in self.parts)
        per_head = self.head_dim * jnp.dtype(self.dtype).itemsize + (4 if self.quantized else 0)
        return 2 * self.num_layers * self.num_kv_heads * per_head

    def row_tokens(self) -> int:
        """How many tokens' keys and values take the memory that a row has besides them."""
        return -(-self.linear.row_bytes() // self.token_bytes()) if self.linear else 0

    @property
    def most_new_rows(self) -> int | None:
        """The most rows of one prefill, which no plan counts; None for no limit but their tokens.

        They have a state each, however few their tokens are.
        """
        return max(1, STATE_BYTES // self.linear.row_bytes()) if self.linear else None

    def zeros(self, rows: int, columns: int) -> KV:
        """An empty store with room for `rows` sequences of `columns` tokens."""
        if self.kinds:
            states = (self.linear.zeros(rows),) if self.linear else ()
            return (*(part.zeros(rows, columns) for part in self.parts), *states)
        K, D = self.num_kv_heads, self.head_dim
        lead = (self.num_layers,) if self.stacked else ()
        k_shape = (D, columns) if self.transposed_keys else (columns, D)

        def layer():
            scale = jnp.zeros((*lead, rows, K, columns), jnp.float32) if self.quantized else None
            return LayerKV(
                k=jnp.zeros((*lead, rows, K, *k_shape), self.dtype),
                v=jnp.zeros((*lead, rows, K, columns, D), self.dtype),
                k_scale=scale,
                v_scale=None if scale is None else jnp.zeros_like(scale),
            )

        return layer() if self.stacked else tuple(layer() for _ in range(self.num_layers))

    def pack(self, k: jax.Array, v: jax.Array) -> LayerKV:
        """Keys and values [rows, columns, K, D] of one layer in the form that is stored."""
        k, v = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)
        k_scale = v_scale = None
        if self.quantized:
            (k, k_scale), (v, v_scale) = quantize(k), quantize(v)
        if self.transposed_keys:
            k = jnp.swapaxes(k, 2, 3)
        return LayerKV(k.astype(self.dtype), v.astype(self.dtype), k_scale, v_scale)

    # --- what lies in a store

    def axes(self, store: KV) -> KV:
        """The axis of the columns in each array of a store; `NO_COLUMNS` in a state."""
        lead, scale = int(self.stacked), 2 if self.quantized else None
        of_kv = LayerKV(3 if self.transposed_keys else 2, 2, scale, scale)
        of_kv = jax.tree.map(lambda axis: axis + lead, of_kv)

        def of_layer(layer):
            if isinstance(layer, LayerKV):
                return of_kv
            return jax.tree.map(lambda _: NO_COLUMNS, layer)

        return jax.tree.map(of_layer, store, is_leaf=is_layers)

    def read(self, store: KV, layer: LayerInfo) -> LayerKV | Memory:
        """The memory of one layer."""
        return read_layer(of_kind(store, layer), layer.at)

    def write(
        self, store: KV, layer: LayerInfo, new: LayerKV | Memory, column: jax.Array | int = 0
    ) -> KV:
        """The store with columns of one layer, from `column` on, or its states, in all rows.

        A layer without keys of its own writes none.
        """
        if not layer.writes:
            return store
        of_layer, index = of_kind(store, layer), layer.at
        axes = self.axes(of_layer)

        def put(stored, new, axis):
            at = [0] * stored.ndim
            if axis != NO_COLUMNS:
                at[axis] = column
            if self.stacked:
                new, at[0] = new[None], index
            return jax.lax.dynamic_update_slice(stored, new.astype(stored.dtype), at)

        if self.stacked:
            written = jax.tree.map(put, of_layer, new, axes)
        else:
            changed = jax.tree.map(put, of_layer[index], new, axes[index])
            written = (*of_layer[:index], changed, *of_layer[index + 1 :])
        if layer.store is None:
            return written
        return tuple(written if i == layer.store.kind else part for i, part in enumerate(store))

    def copy(self, store: KV, source: KV, copies: Copies, mesh: Mesh | None) -> KV:
        """The store with copies of columns and states of some rows of another one.

        A row lies on the device of the row that is copied into it. Where the store has no states,
        none are copied.
        """
        lead = int(self.stacked)
        of_rows = (*(None,) * lead, "batch", "kv_heads")
        if self.linear:
            source = source[: len(store)]

        def of_layers(stored, new):
            axes = self.axes(stored)
            rows, sources = (jax.tree.leaves(kv)[0].shape[lead] for kv in (stored, new))

            def one(n, stored, new, copies):
                copy = jax.tree.map(lambda x: x[n], copies)
                return jax.tree.map(
                    lambda x, y, axis: _copied(x, y, axis, lead, copy), stored, new, axes
                )

            def local(stored, new, copies):
                count = copies.row.shape[0]
                each = functools.partial(one, new=new, copies=copies)
                return jax.lax.fori_loop(0, count, each, stored)

            batch = functools.reduce(math.gcd, (rows, sources, copies.row.shape[0]))
            heads = min(x.shape[lead + 1] for x in jax.tree.leaves(stored))
            split = on_each_device(
                local,
                mesh,
                {"batch": batch, "kv_heads": heads},
                (of_rows, of_rows, ("batch",)),
                of_rows,
            )
            return split(stored, new, copies)

        return jax.tree.map(of_layers, store, source, is_leaf=is_layers)

    def take(self, store: KV, rows: jax.Array) -> KV:
        """The rows with these numbers; one past the last takes any."""
        return jax.tree.map(lambda x: jnp.take(x, rows, axis=int(self.stacked), mode="clip"), store)

    def by_columns(self, change: Callable[[jax.Array, int], jax.Array], store: KV) -> KV:
        """`change(array, axis of its columns)` for all that has columns; states stay."""

        def of_array(x, axis):
            return x if axis == NO_COLUMNS else change(x, axis)

        return jax.tree.map(of_array, store, self.axes(store))


def _copied(stored, new, axis: int, lead: int, copy: Copies):
    """One of the copies, in one array."""
    row = copy.state_row if axis == NO_COLUMNS else copy.row
    row, source = row % stored.shape[lead], copy.source % new.shape[lead]
    taken = jax.lax.dynamic_slice_in_dim(new, source, 1, axis=lead)
    old = jax.lax.dynamic_slice_in_dim(stored, row, 1, axis=lead)
    if axis == NO_COLUMNS:
        merged = jnp.where(copy.count > 0, taken.astype(old.dtype), old)
        return jax.lax.dynamic_update_slice_in_dim(stored, merged, row, lead)
    C, columns = new.shape[axis], stored.shape[axis]
    # A slice of two rounds is taken, since gathering columns takes several times as long.
    twice = jnp.concatenate([taken, taken], axis)
    turned = jax.lax.dynamic_slice_in_dim(twice, copy.first, C, axis=axis)
    shape = list(turned.shape)
    shape[axis] = columns + C
    placed = jax.lax.dynamic_update_slice_in_dim(
        jnp.zeros(shape, turned.dtype), turned, copy.at, axis
    )
    placed = jax.lax.slice_in_dim(placed, 0, columns, axis=axis)
    at = jnp.arange(columns).reshape(-1, *(1,) * (stored.ndim - axis - 1))
    is_new = (at >= copy.at) & (at < copy.at + copy.count)
    merged = jnp.where(is_new, placed, old)
    return jax.lax.dynamic_update_slice_in_dim(stored, merged, row, lead)


def quantize(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """[..., D] -> int8 [..., D] and float32 scale [...], x ~ int8 * scale."""
    x = x.astype(jnp.float32)
    scale = jnp.maximum(jnp.max(jnp.abs(x), axis=-1), 1e-8) / 127.0
    return jnp.round(x / scale[..., None]).astype(jnp.int8), scale


def read_layer(kv: KV, index) -> LayerKV | Memory:
    """One layer of those of one kind; `index` is an int where layers are a tuple."""
    if not is_layers(kv):
        return kv[index]
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), kv)


class PastView(NamedTuple):
    """Which past row belongs to which slot; all layers share it."""

    row: jax.Array  # [B] int32, the slot's past row
    slot: jax.Array  # [S, 1] int32, slot of the sample of a past row; any number where none
    first: jax.Array  # [S] int32, position of the first column, in its sequence
    length: jax.Array  # [S] int32, columns that the slot sees; 0 for a row without a slot


class PageSizes(NamedTuple):
    """The sizes of a pool of pages."""

    page: int  # columns of a page
    pages: int  # on all devices together
    most: int  # pages of the longest completion


class PageView(NamedTuple):
    """Which pages belong to which slot; all layers share it."""

    table: jax.Array  # [B, N] int32, the slot's pages in their order; any number past the last one
    place: (
        jax.Array
    )  # [B] int32, of the token being fed, counted from the first page's first column
    length: jax.Array  # [B] int32, columns that the slot has in pages


class View(NamedTuple):
    """Where each slot is in this step; all layers share it."""

    position: jax.Array  # [B] int32, of the token being fed, in its sequence
    age: jax.Array  # [B] int32, own tokens before the one being fed; -1 for an idle slot
    column: jax.Array  # int32 scalar, of the ring, where this step writes
    row: jax.Array  # [B] int32, the slot's prefix row
    rank: jax.Array  # [B] int32, the slot's place among the samples of that row
    slot: jax.Array  # [P, M] int32, slot of each sample of a prefix row; any number where none
    prefix_length: jax.Array  # [P] int32
    past: PastView | None = None
    pages: PageView | None = None


class Reach(NamedTuple):
    """Which columns a query sees: of those below `length`, the last `reach + 1` up to `origin`.

    In a ring, the columns before the first are the last ones.
    """

    origin: jax.Array  # [rows, Q] int32
    reach: jax.Array  # [rows, Q] int32, -1 for nothing
    length: jax.Array  # [rows] int32
    ring: bool


def own_reach(view: View, columns: int, queries: int, window) -> Reach:
    """The reach of slots in the ring: a slot sees its own tokens, the one being fed included."""
    B = view.age.shape[0]
    reach = jnp.minimum(view.age, window - 1)
    return Reach(
        origin=jnp.broadcast_to(view.column, (B, queries)),
        reach=jnp.broadcast_to(reach[:, None], (B, queries)),
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
    reach = jnp.where(lives_PM, jnp.minimum(window - 1, UNBOUNDED), -1)
    origin, reach = (jnp.repeat(x, queries, axis=1) for x in (position_PM, reach))
    return Reach(origin, reach, length_P, ring=False)


def columns_in_reach(reach: Reach, columns: int) -> jax.Array:
    """Which columns of a store each query sees, [rows, Q, columns] bool."""
    at = jnp.arange(columns, dtype=jnp.int32)
    back = reach.origin[:, :, None] - at
    if reach.ring:
        back = jnp.mod(back, columns)
    return (back <= reach.reach[:, :, None]) & (at < reach.length[:, None, None])


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
    arguments = q, reach.origin, reach.reach, reach.length, table
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
    page = any_layer(kv).v.shape[-2]

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
    oldest = jnp.min(reach.origin - reach.reach, axis=1)
    if not reach.ring:
        oldest = jnp.clip(oldest, 0, newest)
    start = newest // block
    last = jnp.clip(start - oldest // block, 0, blocks - 1)
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


def group_attention(
    q_BHD: jax.Array,
    own: KV,
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
    """One query a slot over its group's prefix, its past, its pages and its own tokens.

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
    own, prefix = of_kind(own, layer), of_kind(prefix, layer)
    past = None if past is None else of_kind(past, layer)
    one = any_layer(own)
    K, C = one.v.shape[-3], one.v.shape[-2]
    R = H // K
    q_BKRD = (q_BHD * jnp.asarray(scale, q_BHD.dtype)).reshape(B, K, R, D)
    own_part = attend(q_BKRD, own, layer.at, own_reach(view, C, R, layer.window_at(view.position)))
    by_row, by_head = ("batch",), ("batch", "kv_heads")

    def of_rows(q_BKRD, slot_PM):  # -> [P, K, M * R, D]
        (P, M), K = slot_PM.shape, q_BKRD.shape[1]
        return q_BKRD[slot_PM % len(q_BKRD)].swapaxes(1, 2).reshape(P, K, M * R, D)

    def of_members(position_B, age_B, row_B, rank_B, slot_PM):  # -> positions, who lives, [P, M]
        (P, M), slot_PM = slot_PM.shape, slot_PM % len(position_B)
        is_there = (row_B[slot_PM] % P == jnp.arange(P)[:, None]) & (
            rank_B[slot_PM] == jnp.arange(M)
        )
        return position_B[slot_PM], is_there & (age_B[slot_PM] >= 0)

    def part_of(kv, slot_PM, row_B, rank_B, first_P, length_P) -> Part:
        """Attention to a store whose rows, P of them, several slots share, M at most.

        A row counts its columns from the position `first_P` on.
        """
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
        members = on_each_device(of_members, mesh, sizes, (by_row,) * 5, by_row)
        position_PM, lives_PM = members(view.position, view.age, row_B, rank_B, slot_PM)
        window = layer.window_at(position_PM)
        position_PM -= first_P[:, None]
        reach = row_reach(position_PM, lives_PM, length_P, R, window)
        shared = attend(q_PKQD, kv, layer.at, reach)
        return jax.tree.map(lambda x: at_home(of_slots, x, row_B, rank_B), shared)

    first = jnp.zeros_like(view.prefix_length)
    of_prefix = part_of(prefix, view.slot, view.row, view.rank, first, view.prefix_length)
    parts = [own_part, of_prefix]
    if past is not None:
        rank = jnp.zeros_like(view.past.row)
        place = view.past
        parts.append(part_of(past, place.slot, place.row, rank, place.first, place.length))
    if pages is not None:
        paged = view.pages
        window, lives = layer.window_at(view.position[:, None]), view.age[:, None] >= 0
        reach = row_reach(paged.place[:, None], lives, paged.length, R, window)
        parts.append(attend(q_BKRD, of_kind(pages, layer), layer.at, reach, paged.table))
    sinks = None if layer.sinks is None else by_kv_head(layer.sinks, K)
    return merge(*parts, sinks=sinks).reshape(B, H, D).astype(q_BHD.dtype)
