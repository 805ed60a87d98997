"""Keys and values of the rollout engine: prompts in shared prefix rows, samples in a ring.

A slot (one sample being decoded) attends to two stores:

- *prefix*: one row a prompt, shared by the samples of its group. It holds all tokens of the prompt
  but the last, which is the first token that each sample feeds.
- *ring*: one row a slot, the tokens of the sample itself. The columns form a ring that all slots
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

Letters: L layers, K key/value heads, D head dim, N copies, C columns of a row that is copied.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from adpo_jax.devices.sharding import on_each_device
from adpo_jax.engine.state_store import StateLayout
from adpo_jax.model.attention import LayerInfo
from adpo_jax.model.linear_attention import Memory

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


def num_columns(kv: KV) -> int:
    """The columns of each row of a store."""
    return any_layer(kv).v.shape[-2]


def of_kind(kv: KV, layer: LayerInfo) -> KV:
    """The part of a store that holds the layers of this one's shape; `layer.at` is its place."""
    return kv if layer.store is None else kv[layer.store.kind]


def with_kind(store: KV, layer: LayerInfo, part: KV) -> KV:
    """The store with another part in place of what `of_kind` gives."""
    if layer.store is None:
        return part
    return tuple(part if i == layer.store.kind else old for i, old in enumerate(store))


def with_layer(layers: tuple, index: int, changed: LayerKV | Memory) -> tuple:
    """A tuple of layers with another one at this place."""
    return (*layers[:index], changed, *layers[index + 1 :])


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


class PageSizes(NamedTuple):
    """The sizes of a pool of pages."""

    page: int  # columns of a page
    pages: int  # on all devices together
    most: int  # pages of the longest completion


@dataclasses.dataclass(frozen=True)
class CacheLayout:
    """How keys and values lie in memory.

    Attributes:
      dtype: dtype of the stored numbers; int8 adds a float32 scale for each token and head.
      stacked: whether layers lie on a leading axis (scanned), or else in a tuple. CPUs and
        GPUs want the tuple, since XLA copies the slice of a stacked array before a matrix product:
        on a CPU a step of 128 rows and 25M parameters takes 27 ms with a tuple, 60 ms with a stack.
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
            return with_kind(store, layer, jax.tree.map(put, of_layer, new, axes))
        changed = jax.tree.map(put, of_layer[index], new, axes[index])
        return with_kind(store, layer, with_layer(of_layer, index, changed))

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
