"""The memory of linear attention in the rollout engine: a state beside keys and values.

A slot's memory is that of all its tokens so far, a prefix row's that of its prompt without the last
token, and a past row's that of the turns that have ended. It has rows as keys and values have, but
no columns: a sample that starts takes a copy of its prompt's or of its past row's (`begun`), and
what moves rows of keys and values moves these too (`kv_cache.CacheLayout`).

Letters: B slots, P prefix rows, N key heads, n key dim, M value heads, m value dim, t taps.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from adpo_jax.devices.sharding import on_each_device
from adpo_jax.model.linear_attention import Memory, where_rows

# All layers of linear attention: a tuple with one entry a layer (unrolled), or one `Memory` of
# stacked arrays.
MemoryStore = Any


@dataclasses.dataclass(frozen=True)
class StateLayout:
    """How the memory of linear attention lies.

    Attributes:
      before: tokens before the present one that the convolution sees.
      dtype: dtype of the inputs of the convolution; the state is float32.
      stacked: as of `CacheLayout`.
    """

    num_layers: int
    num_key_heads: int
    key_dim: int
    num_value_heads: int
    value_dim: int
    before: int
    dtype: Any
    stacked: bool

    def zeros(self, rows: int) -> MemoryStore:
        """The memory of rows without tokens."""
        lead = (self.num_layers,) if self.stacked else ()
        N, M, n, m = self.num_key_heads, self.num_value_heads, self.key_dim, self.value_dim

        def layer() -> Memory:
            of_key = jnp.zeros((*lead, rows, N, self.before, n), self.dtype)
            return Memory(
                state=jnp.zeros((*lead, rows, M, n, m), jnp.float32),
                q=of_key,
                k=jnp.zeros_like(of_key),
                v=jnp.zeros((*lead, rows, M, self.before, m), self.dtype),
            )

        return layer() if self.stacked else tuple(layer() for _ in range(self.num_layers))

    def row_bytes(self) -> int:
        """Bytes of one row over all layers."""
        of_key = self.num_key_heads * self.key_dim
        of_value = self.num_value_heads * self.value_dim
        inputs = self.before * (2 * of_key + of_value) * jnp.dtype(self.dtype).itemsize
        return self.num_layers * (4 * self.key_dim * of_value + inputs)


def begun(
    ring: MemoryStore,
    prefix: MemoryStore,
    starts: jax.Array,
    row: jax.Array,
    *,
    lead: int,
    mesh: Mesh | None,
) -> MemoryStore:
    """The memory of slots, of which those that start take a copy of that of their prompt.

    Args:
      ring, prefix: of B slots and of P prefix rows; a slot lies on the device of its row.
      starts: [B] bool.
      row: [B] int32, the slot's prefix row.
    """
    rows = jax.tree.leaves(prefix)[0].shape[lead]

    def local(ring, prefix, starts, row):
        P = jax.tree.leaves(prefix)[0].shape[lead]
        copies = jax.tree.map(lambda x: jnp.take(x, row % P, axis=lead), prefix)
        return where_rows(starts, copies, ring, lead)

    heads = min(x.shape[lead + 1] for x in jax.tree.leaves(ring))
    sizes = {"batch": math.gcd(len(starts), rows), "kv_heads": heads}
    of_rows = (*(None,) * lead, "batch", "kv_heads")
    axes = (of_rows, of_rows, ("batch",), ("batch",))
    return on_each_device(local, mesh, sizes, axes, of_rows)(ring, prefix, starts, row)
