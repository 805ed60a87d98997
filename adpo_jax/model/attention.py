"""Attention as an argument of the decoder: which keys a query sees, and where keys are kept.

The decoder calls `attend(q, k, v, layer, cache) -> (out, cache)` in every layer, with q already
rotated and not yet scaled. A plain forward, a cached decode and a packed batch differ only in the
`attend` that they pass in.

Letters: B batch, T query tokens, S key tokens, H heads, K key/value heads, R = H / K, D head dim.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# No window: larger than any position.
GLOBAL_WINDOW = np.iinfo(np.int32).max
MASKED = -1e30


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Store:
    """Where a layer's memory lies, in a model whose layers are of two kinds.

    Attributes:
      kind: as of `ModelConfig.kind_of`; each kind has a store of its own.
      written: whether the layer has keys and values of its own. Else it reads those of an earlier
        layer of its kind.
    """

    kind: int
    written: bool


class LayerInfo(NamedTuple):
    """What differs between the layers of a stack; outside of a layer, leaves have a layer axis."""

    index: jax.Array  # int32, 0 .. L-1
    window: jax.Array  # int32, how many tokens back a query sees, itself included
    rope: jax.Array  # int32, the number of its rope among the model's
    place: jax.Array | None = None  # int32, of its keys in the store of its kind; None for `index`
    store: Store | None = None  # None where all layers have one shape
    chunk: jax.Array | None = None  # int32, a query sees that chunk of positions; None for all
    # [H], the logit of a key without a value that every query of a head sees; None for none.
    sinks: jax.Array | None = None

    def of(self, which: Any, change: Callable[[Any], Any] = lambda x: x) -> "LayerInfo":
        """That of one layer, or of a slice of layers, from that of all of them."""
        return jax.tree.map(lambda leaf: change(leaf[which]), self)

    def window_at(self, positions: jax.Array):
        """How many tokens back queries at these positions see, in a shape that broadcasts."""
        if self.chunk is None:
            return self.window
        return jnp.minimum(self.window, positions % self.chunk + 1)

    @property
    def at(self):
        """The place of its keys and values in their store."""
        return self.index if self.place is None else self.place

    @property
    def writes(self) -> bool:
        """Whether it has keys and values of its own."""
        return self.store is None or self.store.written


Attend = Callable[[jax.Array, jax.Array, jax.Array, LayerInfo, Any], tuple[jax.Array, Any]]


class Unturned(NamedTuple):
    """Queries, keys and values as a layer's products made them, and what norms and rotates them."""

    q: jax.Array  # [B, T, H, D]
    k: jax.Array  # [B, T, K, D]
    v: jax.Array  # [B, T, K, D]
    q_norm: jax.Array | None  # [D], the weight of the norm; None for no norm
    k_norm: jax.Array | None  # [D]
    cos: jax.Array  # [B, T, D // 2] float32
    sin: jax.Array  # [B, T, D // 2] float32


@dataclasses.dataclass(frozen=True)
class Turning:
    """An `Attend` that does the norm and rotation of queries and keys itself where it may.

    Attributes:
      attend: for layers that turn queries and keys in a way of their own.
      turn: the same of heads that are not turned yet.
    """

    attend: Attend
    turn: Callable[[Unturned, LayerInfo, Any], tuple[jax.Array, Any]]

    def __call__(self, q, k, v, layer: LayerInfo, cache):
        return self.attend(q, k, v, layer, cache)


def dot_product_attention(
    q_BTHD: jax.Array,
    k_BSKD: jax.Array,
    v_BSKD: jax.Array,
    visible_BTS: jax.Array,
    *,
    scale: float,
    soft_cap: float | None = None,
    sinks: jax.Array | None = None,
) -> jax.Array:
    """Grouped-query attention, softmax in float32; every kernel is tested against this version.

    Args:
      visible_BTS: bool; a query that sees nothing gets a finite, meaningless mean of the values.
      sinks: as in `LayerInfo`.

    Returns:
      [B, T, H, D] in the dtype of q.
    """
    B, T, H, D = q_BTHD.shape
    K = k_BSKD.shape[2]
    q_BTKRD = q_BTHD.reshape(B, T, K, H // K, D) * jnp.asarray(scale, q_BTHD.dtype)
    scores = jnp.einsum("btkrd,bskd->bkrts", q_BTKRD, k_BSKD, preferred_element_type=jnp.float32)
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    scores = jnp.where(visible_BTS[:, None, None], scores, MASKED)
    if sinks is not None:
        sinks = jnp.broadcast_to(by_kv_head(sinks, K)[..., None, None], (*scores.shape[:-1], 1))
        scores = jnp.concatenate([scores, sinks], axis=-1)
    weights = jax.nn.softmax(scores, axis=-1).astype(v_BSKD.dtype)
    if sinks is not None:
        weights = weights[..., :-1]
    return jnp.einsum("bkrts,bskd->btkrd", weights, v_BSKD).reshape(B, T, H, D)


def by_kv_head(sinks_H: jax.Array, num_kv_heads: int) -> jax.Array:
    """Attention sinks [K, R] float32 of the heads that share each key/value head."""
    return sinks_H.astype(jnp.float32).reshape(num_kv_heads, -1)


class Places(NamedTuple):
    """The places of tokens, which decide who sees whom; arrays of shapes that broadcast."""

    positions: jax.Array  # int32, the position in the sequence
    segments: jax.Array  # int32, the sequence that a token is part of; 0 is padding
    prompts: jax.Array | None = None  # int32, the other segment that a token sees; None for none

    def pairs(self) -> tuple["Places", "Places"]:
        """Arrays [..., T] as queries [..., T, 1] and keys [..., 1, T] of `visible`."""
        queries = jax.tree.map(lambda x: x[..., :, None], self)
        return queries, Places(self.positions[..., None, :], self.segments[..., None, :])


def visible(queries: Places, keys: Places, window=None) -> jax.Array:
    """Which queries see which keys: the one rule for attention of sequences to themselves.

    A query sees the tokens of its segment, and of its prompt, up to itself; padding is never seen.

    Args:
      queries, keys: tokens in shapes that broadcast, such as [B, T, 1] and [B, 1, S].
      window: int32 scalar; a query sees itself and the window - 1 tokens before it. None for no
        window.

    Returns:
      bool, in the broadcast shape.
    """
    distance = queries.positions - keys.positions
    same = keys.segments == queries.segments
    if queries.prompts is not None:
        same = same | (keys.segments == queries.prompts)
    seen = same & (keys.segments > 0) & (distance >= 0)
    return seen if window is None else seen & (distance < window)


def self_attention(
    positions: jax.Array, segments: jax.Array, *, scale: float, soft_cap: float | None = None
) -> Attend:
    """Causal attention of a batch to itself without a cache, for the training forward.

    Args:
      positions, segments: [B, T] int32, as in `Places`. Segment numbers tell the sequences of a row
        apart.
    """
    queries, keys = Places(positions, segments).pairs()

    def attend(q, k, v, layer: LayerInfo, cache):
        mask = visible(queries, keys, layer.window_at(queries.positions))
        out = dot_product_attention(
            q, k, v, mask, scale=scale, soft_cap=soft_cap, sinks=layer.sinks
        )
        return out, cache

    return attend
