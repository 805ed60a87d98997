"""Gated DeltaNet: attention whose memory is one matrix a head, whatever the length (Qwen3-Next).

A token reads and writes the state S of its head, which decays in between:

    S <- exp(g) S;  S <- S + k (beta (v - S^T k))^T;  out = S^T q

Queries, keys and values pass a short causal convolution first, so that the memory of a layer is the
state and the last inputs of the convolution (`Memory`). There are two forms. The recurrent form,
which is here, takes the tokens one by one: decoding, and the plain version (`recurrent`). The
chunked form is for whole sequences (`linear_attention_chunks`). A segment begins with an empty
memory in both, or with that of its prompt.

The decoder calls `recur(inputs, layer, cache) -> (out, cache)` in every such layer, as it calls
`attend` in the others. `Hybrid` is the two in one.

Source: Yang, Kautz and Hatamizadeh 2024, arXiv 2412.06464.

Letters: B rows, T tokens, N key heads, n key dim, M value heads, m value dim, H heads of either, h
their dimension, t taps of the convolution, C tokens of a chunk.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from adpo_jax.model.attention import Attend, LayerInfo

# Tokens of a chunk: more of them make larger products and fewer steps of the scan, and C^2 numbers.
CHUNK = 64
# Added to the squared length of queries and keys.
LENGTH_EPS = 1e-6


class Inputs(NamedTuple):
    """What a layer makes of its tokens; the convolutions are those of queries, keys and values."""

    q: jax.Array  # [B, T, N, n], before the convolution
    k: jax.Array  # [B, T, N, n], likewise
    v: jax.Array  # [B, T, M, m], likewise
    log_decay: jax.Array  # [B, T, M] float32, at most 0
    beta: jax.Array  # [B, T, M] float32, how far a token overwrites what its key finds
    q_taps: jax.Array  # [N, n, t]; the last tap is that of the token itself
    k_taps: jax.Array  # [N, n, t]
    v_taps: jax.Array  # [M, m, t]


class Memory(NamedTuple):
    """What a layer keeps of the tokens of each row so far, with a leading layer axis or without."""

    state: jax.Array  # [B, M, n, m] float32
    q: jax.Array  # [B, N, t - 1, n], the last inputs of the convolution; 0 before the first token
    k: jax.Array  # [B, N, t - 1, n]
    v: jax.Array  # [B, M, t - 1, m]


Recur = Callable[[Inputs, LayerInfo, Any], tuple[jax.Array, Any]]


@dataclasses.dataclass(frozen=True)
class Hybrid:
    """An `Attend` of a model that has layers of linear attention too, which call `recur`."""

    attend: Attend
    recur: Recur

    def __call__(self, q, k, v, layer: LayerInfo, cache):
        return self.attend(q, k, v, layer, cache)


def chunk_of(tile: int) -> int:
    """Tokens of a chunk in streams with attention of such tiles: a power of two."""
    return math.gcd(CHUNK, tile)


# --- one token


def empty_memory(inputs: Inputs) -> Memory:
    """The memory before the first token of each row."""
    B, _, N, n = inputs.k.shape
    M, m = inputs.v.shape[2:]
    before = inputs.k_taps.shape[-1] - 1
    no_keys = jnp.zeros((B, N, before, n), inputs.k.dtype)
    no_values = jnp.zeros((B, M, before, m), inputs.v.dtype)
    return Memory(jnp.zeros((B, M, n, m), jnp.float32), no_keys, no_keys, no_values)


def step(inputs: Inputs, memory: Memory) -> tuple[jax.Array, Memory]:
    """One token of each row: the recurrent form.

    Args:
      inputs: of T = 1.

    Returns:
      (out [B, 1, M, m] in the dtype of the values, the memory with the token).
    """

    def convolved(x_B1Hh, before_BHth, taps_Hht):
        window = jnp.concatenate([before_BHth, x_B1Hh.swapaxes(1, 2)], axis=2)
        y = jnp.einsum("bhtd,hdt->bhd", window.astype(jnp.float32), taps_Hht.astype(jnp.float32))
        return jax.nn.silu(y), window[:, :, 1:]

    q, q_memory = convolved(inputs.q, memory.q, inputs.q_taps)
    k, k_memory = convolved(inputs.k, memory.k, inputs.k_taps)
    v, v_memory = convolved(inputs.v, memory.v, inputs.v_taps)
    q, k = to_value_heads(query(q), v.shape[1], 1), to_value_heads(unit(k), v.shape[1], 1)
    state = memory.state * jnp.exp(inputs.log_decay[:, 0, :, None, None])
    found = jnp.einsum("bhkv,bhk->bhv", state, k)
    change = (v - found) * inputs.beta[:, 0, :, None]
    state = state + k[..., None] * change[..., None, :]
    out = jnp.einsum("bhkv,bhk->bhv", state, q)
    out = out[:, None].astype(inputs.v.dtype)
    return out, Memory(state, q_memory, k_memory, v_memory)


def recurrent(inputs: Inputs, segments: jax.Array) -> tuple[jax.Array, Memory]:
    """Rows of segments token by token; every other form is tested against this one.

    Args:
      segments: [B, T] int32; the tokens of a segment are neighbours, and 0 is padding.

    Returns:
      (out [B, T, M, m], meaningless at padding; the memory after the last token of each row).
    """
    taps = inputs[5:]

    def body(carry, now):
        memory, last = carry
        *tokens, segment = now
        begins = (segment > 0) & (segment != last)
        memory = where_rows(begins, jax.tree.map(jnp.zeros_like, memory), memory)
        out, after = step(Inputs(*(x[:, None] for x in tokens), *taps), memory)
        memory = where_rows(segment > 0, after, memory)
        return (memory, jnp.where(segment > 0, segment, last)), out[:, 0]

    by_token = [x.swapaxes(0, 1) for x in (*inputs[:5], segments)]
    first = empty_memory(inputs), jnp.zeros_like(segments[:, 0])
    (memory, _), out = jax.lax.scan(body, first, by_token)
    return out.swapaxes(0, 1), memory


def where_rows(rows: jax.Array, new: Any, old: Any, lead: int = 0) -> Any:
    """`new` in some rows and `old` in the others; each a `Memory`, or a tuple of them.

    Args:
      rows: [B] bool.
      lead: the axis of the rows.
    """

    def choose(new, old):
        chosen = rows.reshape(-1, *(1,) * (new.ndim - lead - 1))
        return jnp.where(chosen, new.astype(old.dtype), old)

    return jax.tree.map(choose, new, old)


def unit(x: jax.Array) -> jax.Array:
    """x [..., h] float32 of length 1."""
    return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + LENGTH_EPS)


def query(x: jax.Array) -> jax.Array:
    """x [..., h] float32 of the length that queries have."""
    return unit(x) * x.shape[-1] ** -0.5


def to_value_heads(x: jax.Array, num_value_heads: int, axis: int) -> jax.Array:
    """Queries or keys of all value heads; neighbours among these share a key head."""
    return jnp.repeat(x, num_value_heads // x.shape[axis], axis=axis)
