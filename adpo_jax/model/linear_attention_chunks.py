"""Gated DeltaNet of whole sequences: the chunked form, and its use as `Recur`.

It gives what `linear_attention.recurrent` gives. Inside of a chunk all tokens act at once, and a
scan carries the state from chunk to chunk. A segment begins with an empty memory, or with that of
its prompt.

Source: Yang et al. 2024, arXiv 2406.06484.

Letters: B rows, T tokens, N key heads, n key dim, M value heads, m value dim, H heads of either, h
their dimension, X = 2 N n + M m channels of the convolution, t its taps, C tokens of a chunk, c
chunks, P tokens of prompts.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from adpo_jax.devices.sharding import on_each_device
from adpo_jax.model.attention import LayerInfo
from adpo_jax.model.linear_attention import (
    CHUNK,
    Inputs,
    Memory,
    Recur,
    chunk_of,
    query,
    to_value_heads,
    unit,
)
from adpo_jax.model.tile_attention import Stream


class Origins(NamedTuple):
    """Chunks that go on after the last token of a prompt; [B, c] each."""

    end: jax.Array  # int32, the place of that token among those of the prompts; -1 for none
    segment: jax.Array  # int32, the segment of the prompt


class _Ends(NamedTuple):
    """What later chunks may go on from, of the prompts of a stream."""

    states: jax.Array  # [B, c, M, n, m], after each chunk
    mixed: jax.Array  # [B, P, X], what goes into the convolution
    segments: jax.Array  # [B, P]


def chunked(
    inputs: Inputs, segments: jax.Array, memory: Memory | None = None, *, chunk: int = CHUNK
) -> tuple[jax.Array, Memory]:
    """`recurrent`, chunk by chunk.

    Args:
      memory: of the tokens before these, which are all of one segment and have their padding on the
        right; None for empty ones.
      chunk: tokens of a chunk, a power of two, at least as many as the convolution reaches back.
    """
    inputs, segments, T = _padded(inputs, segments, chunk)
    out, state, _ = _chunks(inputs, segments, chunk, memory=memory)
    if memory is None:
        return out[:, :T], _memory_at_end(inputs, segments, state)
    return out[:, :T], _memory_after(inputs, segments, memory, state)


def chunked_stream(
    inputs: Inputs, segments: jax.Array, origins: Origins, *, num_prompt: int, chunk: int = CHUNK
) -> jax.Array:
    """A packed stream, whose completions go on from the memory of their prompts.

    Prompts and completions start at chunks.

    Args:
      segments: [B, T] int32, 0 is padding.
      origins: of the chunks behind the prompts.
      num_prompt: P, places of the prompts, which come first; whole chunks, as T is.

    Returns:
      [B, T, M, m], meaningless at padding.
    """

    def part(places: slice) -> Inputs:
        return Inputs(*(x[:, places] for x in inputs[:5]), *inputs[5:])

    prompts, completions = part(slice(num_prompt)), part(slice(num_prompt, None))
    prompt_segments = segments[:, :num_prompt]
    out, _, states = _chunks(prompts, prompt_segments, chunk)
    ends = _Ends(states, _mixed(prompts)[0], prompt_segments)
    rest, _, _ = _chunks(completions, segments[:, num_prompt:], chunk, origins, ends)
    return jnp.concatenate([out, rest], axis=1)


def origins_of(segments: jax.Array, prompts: jax.Array, *, num_prompt: int, chunk: int) -> Origins:
    """Which chunks of completions begin one, and where the prompt of it ends.

    Args:
      segments, prompts: [B, T] int32, the segment of each token and that of its prompt.
    """
    prompt_segments, completion_segments = segments[:, :num_prompt], segments[:, num_prompt:]
    first = completion_segments[:, ::chunk]
    last = _carried(completion_segments)[:, chunk - 1 :: chunk]
    before = jnp.pad(last[:, :-1], ((0, 0), (1, 0)))
    begins = (first > 0) & (first != before)
    prompt = prompts[:, num_prompt::chunk]
    places = jnp.arange(num_prompt, dtype=jnp.int32)
    found = (prompt_segments[:, None] == prompt[..., None]) & (prompt[..., None] > 0)
    end = jnp.max(jnp.where(found, places, -1), axis=-1, initial=-1)
    return Origins(jnp.where(begins, end, -1), prompt)


def _padded(inputs: Inputs, segments, chunk: int) -> tuple[Inputs, jax.Array, int]:
    """Inputs of whole chunks, and the tokens that there were."""
    T = segments.shape[1]
    more = -T % chunk
    if not more:
        return inputs, segments, T
    tokens = [jnp.pad(x, ((0, 0), (0, more)) + ((0, 0),) * (x.ndim - 2)) for x in inputs[:5]]
    return Inputs(*tokens, *inputs[5:]), jnp.pad(segments, ((0, 0), (0, more))), T


def _carried(segments: jax.Array) -> jax.Array:
    """Segments [B, T] in which padding counts to the segment before it."""
    places = jnp.arange(segments.shape[1], dtype=jnp.int32)
    last = jax.lax.cummax(jnp.where(segments > 0, places, 0), axis=1)
    return jnp.take_along_axis(segments, last, axis=1)


def _chunks(
    inputs: Inputs,
    segments,
    chunk: int,
    origins: Origins | None = None,
    ends: _Ends | None = None,
    memory: Memory | None = None,
):
    """The chunked form of whole chunks.

    Args:
      origins, ends: what some of the chunks go on from; None for none.
      memory: what the first chunk of each row goes on from; None for nothing.

    Returns:
      (out [B, T, M, m]; the last state [B, M, n, m]; the state after each chunk [B, c, M, n, m]).
    """
    B, T = segments.shape
    if not T:
        M, m = inputs.v.shape[2:]
        states = jnp.zeros((B, 0, M, inputs.k.shape[-1], m), jnp.float32)
        return inputs.v, states.sum(axis=1), states

    def split(x):
        return x.reshape(B, T // chunk, chunk, *x.shape[2:])

    segments_BcC = split(segments)
    tails = None
    if origins is not None:
        tails = _tails(origins, ends, inputs.k_taps.shape[-1] - 1)
    elif memory is not None:
        tails = _tails_of_memory(memory, T // chunk)
    mixed, taps = _mixed(inputs)
    mixed = _convolved(split(mixed), taps, segments_BcC, tails)
    widths = [math.prod(x.shape[2:]) for x in inputs[:2]]
    parts = jnp.split(mixed, (widths[0], sum(widths)), axis=-1)
    q, k, v = (y.reshape(*y.shape[:3], *x.shape[2:]) for y, x in zip(parts, inputs[:3]))
    M = v.shape[3]
    q, k = to_value_heads(query(q), M, 3), to_value_heads(unit(k), M, 3)
    present = (segments_BcC > 0)[..., None]
    # Padding neither decays nor writes, so the state after a chunk is that of its last token.
    decay, beta = (jnp.where(present, split(x), 0.0) for x in (inputs.log_decay, inputs.beta))
    carried = split(_carried(segments))
    before = jnp.pad(carried[:, :-1, -1], ((0, 0), (1, 0)))
    first = None
    if memory is not None:
        before, first = before.at[:, 0].set(carried[:, 0, 0]), memory.state
    source = None
    if origins is not None:
        source = jnp.where(origins.end < 0, -1, origins.end // chunk)
        before = jnp.where(source < 0, before, carried[:, :, 0])
    states = None if ends is None else ends.states
    out, last, after = _delta_rule(q, k, v, decay, beta, carried, before, first, source, states)
    return out.reshape(B, T, *out.shape[3:]).astype(inputs.v.dtype), last, after


def _tails(origins: Origins, ends: _Ends, count: int):
    """The last inputs of the convolution before chunks that go on after prompts.

    Returns:
      (values [B, c, count, X], whether they are there [B, c, count]).
    """
    B, P = ends.segments.shape
    places = origins.end[..., None] + jnp.arange(1 - count, 1, dtype=jnp.int32)
    at = jnp.clip(places, 0, max(P - 1, 0)).reshape(B, -1)
    rows = jnp.arange(B)[:, None]

    def taken(x):
        if not P:
            return jnp.zeros((*places.shape, *x.shape[2:]), x.dtype)
        return x[rows, at].reshape(*places.shape, *x.shape[2:])

    there = (places >= 0) & (origins.end[..., None] >= 0)
    there &= taken(ends.segments) == origins.segment[..., None]
    return taken(ends.mixed), there


def _tails_of_memory(memory: Memory, num_chunks: int):
    """`_tails` where the first chunk of each row alone goes on, after the tokens of its memory."""
    by_token = (x.swapaxes(1, 2) for x in memory[1:])
    values = jnp.concatenate([x.reshape(*x.shape[:2], -1) for x in by_token], axis=-1)
    values = jnp.pad(values[:, None], ((0, 0), (0, num_chunks - 1), (0, 0), (0, 0)))
    is_first = jnp.arange(num_chunks) == 0
    return values, jnp.broadcast_to(is_first[:, None], values.shape[:3])


def _mixed(inputs: Inputs) -> tuple[jax.Array, jax.Array]:
    """Queries, keys and values side by side [B, T, X], and their taps [X, t]."""
    channels = [x.reshape(*x.shape[:2], -1) for x in inputs[:3]]
    taps = [taps.reshape(-1, taps.shape[-1]) for taps in inputs[5:]]
    return jnp.concatenate(channels, axis=-1), jnp.concatenate(taps)


def _convolved(x_BcCX, taps_Xt, segments_BcC, tails) -> jax.Array:
    """The causal convolution of each segment, and its activation; [B, c, C, X] float32.

    Args:
      tails: (values [B, c, t - 1, X], whether they are there [B, c, t - 1]) of chunks that go on
        after prompts; None for none.
    """
    C = x_BcCX.shape[2]
    before = taps_Xt.shape[-1] - 1
    x, taps = x_BcCX.astype(jnp.float32), taps_Xt.astype(jnp.float32)
    if not before:
        return jax.nn.silu(x * taps[..., 0])

    def end_of_chunk_before(x):
        widths = ((0, 0), (1, 0), *((0, 0),) * (x.ndim - 2))
        return jnp.pad(x, widths)[:, :-1, C - before :]

    ahead, ahead_segments = end_of_chunk_before(x), end_of_chunk_before(segments_BcC)
    if tails is not None:
        values, there = tails
        goes_on = jnp.any(there, axis=-1)
        values = jnp.where(there[..., None], values.astype(jnp.float32), 0.0)
        ahead = jnp.where(goes_on[..., None, None], values, ahead)
        own = jnp.where(there, segments_BcC[:, :, :1], 0)
        ahead_segments = jnp.where(goes_on[..., None], own, ahead_segments)
    window = jnp.concatenate([ahead, x], axis=2)
    its_segments = jnp.concatenate([ahead_segments, segments_BcC], axis=2)
    y = jnp.zeros_like(x)
    for tap in range(before + 1):
        same = its_segments[:, :, tap : tap + C] == segments_BcC
        part = jnp.where(same[..., None], window[:, :, tap : tap + C], 0.0)
        y = y + part * taps[..., tap]
    return jax.nn.silu(y)


def _delta_rule(q, k, v, log_decay, beta, segments, before, first, source, sources):
    """The gated delta rule of chunks, in float32.

    Args:
      q, k, v: [B, c, C, M, h].
      log_decay, beta: [B, c, C, M]; 0 at padding.
      segments: [B, c, C], in which padding counts to the segment before it.
      before: [B, c], the segment whose state a chunk finds.
      first: [B, M, n, m], the state that the first chunk finds; None for an empty one.
      source: [B, c], the number of the state in `sources` [B, s, M, n, m] that it finds; -1 for
        that of the chunk before. None for no sources.
    """
    C = q.shape[2]
    q, k, v = (x.transpose(0, 1, 3, 2, 4) for x in (q, k, v))  # [B, c, M, C, h]
    beta = beta.transpose(0, 1, 3, 2)[..., None]
    total = jnp.cumsum(log_decay.transpose(0, 1, 3, 2), axis=-1)  # [B, c, M, C]
    same = segments[:, :, :, None] == segments[:, :, None, :]
    seen = (same & jnp.tril(jnp.ones((C, C), bool)))[:, :, None]
    apart = total[..., :, None] - total[..., None, :]
    decay = jnp.where(seen, jnp.exp(jnp.where(seen, apart, 0.0)), 0.0)
    goes_on = (segments == before[..., None])[:, :, None, :, None]
    reaches_end = (segments == segments[..., -1:])[:, :, None, :, None]
    since_start = jnp.exp(total)[..., None] * goes_on
    to_end = jnp.exp(total[..., -1:] - total)[..., None] * reaches_end
    weighted = k * beta
    mixing = jnp.einsum("bcmik,bcmjk->bcmij", weighted, k) * decay
    scores = jnp.einsum("bcmik,bcmjk->bcmij", q, k) * decay
    # What tokens write, less what earlier ones of the chunk have written under their keys.
    sides = jnp.concatenate([v * beta, weighted * since_start], axis=-1)
    solved = _inverse(mixing) @ sides
    m = v.shape[-1]
    kept = jnp.exp(total[..., -1]) * (segments[..., -1] == before)[..., None]
    each = [solved[..., :m], solved[..., m:], q * since_start, scores, k * to_end, kept]
    each = [jnp.moveaxis(x, 1, 0) for x in each]
    if source is not None:
        each.append(source.T)

    def body(state, chunk_inputs):
        writes, reads, q, scores, k, kept, *at = chunk_inputs
        if at:
            found = jax.vmap(lambda states, i: states[jnp.maximum(i, 0)])(sources, at[0])
            state = jnp.where((at[0] >= 0)[:, None, None, None], found, state)
        new = writes - reads @ state
        out = q @ state + scores @ new
        state = state * kept[..., None, None] + jnp.swapaxes(k, -1, -2) @ new
        return state, (out, state)

    B, _, M, _, n = k.shape
    if source is not None and not sources.shape[1]:
        each, source = each[:-1], None
    if first is None:
        first = jnp.zeros((B, M, n, m), jnp.float32)
    last, (out, after) = jax.lax.scan(body, first, each)
    return out.transpose(1, 0, 3, 2, 4), last, jnp.moveaxis(after, 0, 1)


@jax.custom_vjp
def _inverse(mixing: jax.Array) -> jax.Array:
    """The inverse of I + L, where L is the part of `mixing` [..., C, C] below its diagonal.

    Inverses of blocks on the diagonal are joined to those of blocks twice as large, in a few
    products of all blocks at once. (XLA's compilers for CPUs and GPUs have a triangular solve for
    one matrix, and for many a loop over rows that takes seconds to compile.)

    Args:
      mixing: C is a power of two.
    """
    lead, C = mixing.shape[:-2], mixing.shape[-1]
    blocks = jnp.ones((*lead, C, 1, 1), mixing.dtype)
    size = 1
    while size < C:
        pairs = mixing.reshape(*lead, C // (2 * size), 2, size, C // (2 * size), 2, size)
        below = jnp.diagonal(pairs[..., :, 1, :, :, 0, :], axis1=-4, axis2=-2)
        below = jnp.moveaxis(below, -1, -3)
        first, second = blocks[..., ::2, :, :], blocks[..., 1::2, :, :]
        corner = -second @ below @ first
        upper = jnp.concatenate([first, jnp.zeros_like(first)], axis=-1)
        lower = jnp.concatenate([corner, second], axis=-1)
        blocks = jnp.concatenate([upper, lower], axis=-2)
        size *= 2
    return blocks[..., 0, :, :]


def _inverse_forward(mixing):
    inverse = _inverse(mixing)
    return inverse, inverse


def _inverse_backward(inverse, g):
    transposed = jnp.swapaxes(inverse, -1, -2)
    return (jnp.tril(-transposed @ g @ transposed, -1),)


_inverse.defvjp(_inverse_forward, _inverse_backward)


def _memory_at_end(inputs: Inputs, segments, state) -> Memory:
    """The memory after the last token of each row."""
    count = inputs.k_taps.shape[-1] - 1
    places = jnp.arange(segments.shape[1], dtype=jnp.int32)
    end = jnp.max(jnp.where(segments > 0, places, -1), axis=1)
    at = end[:, None] + jnp.arange(1 - count, 1, dtype=jnp.int32)
    rows, clipped = jnp.arange(len(segments))[:, None], jnp.maximum(at, 0)
    segment = segments[rows, jnp.maximum(end, 0)[:, None]]
    there = (at >= 0) & (segments[rows, clipped] == segment) & (segment > 0)

    def tail(x):
        taken = jnp.where(there[..., None, None], x[rows, clipped], jnp.zeros((), x.dtype))
        return taken.swapaxes(1, 2)

    return Memory(state, tail(inputs.q), tail(inputs.k), tail(inputs.v))


def _memory_after(inputs: Inputs, segments, memory: Memory, state) -> Memory:
    """`_memory_at_end` of rows that went on from a memory."""
    count = jnp.sum(segments > 0, axis=1, dtype=jnp.int32)
    before = inputs.k_taps.shape[-1] - 1
    at = count[:, None] + jnp.arange(before, dtype=jnp.int32)

    def tail(x_BTHh, before_BHth):
        whole = jnp.concatenate([before_BHth.swapaxes(1, 2).astype(x_BTHh.dtype), x_BTHh], axis=1)
        return whole[jnp.arange(len(whole))[:, None], at].swapaxes(1, 2)

    tails = (tail(x, kept) for x, kept in zip(inputs[:3], memory[1:], strict=True))
    return Memory(state, *tails)


# --- whole sequences as `Recur`

_BY_HEAD = ("batch", None, "heads")
_TAPS_BY_HEAD = ("heads",)
_INPUT_AXES = (_BY_HEAD,) * 5 + (_TAPS_BY_HEAD,) * 3


def _on_shares(function: Callable, inputs: Inputs, mesh: Mesh | None, out_axes, *others):
    """`function(inputs, *others)` on each device's share of the rows and heads.

    Args:
      others: pytrees of arrays [B, ...]; a `Memory` is split over the heads too.
    """

    def local(*arrays):
        return function(Inputs(*arrays[:8]), *arrays[8:])

    # Value heads are a multiple of the key heads, so what divides these divides them too.
    sizes = {"batch": len(inputs.k), "heads": inputs.k.shape[2]}
    with_heads = (("batch", "heads") if isinstance(x, Memory) else ("batch",) for x in others)
    in_axes = (*_INPUT_AXES, *with_heads)
    return on_each_device(local, mesh, sizes, in_axes, out_axes)(*inputs, *others)


def rows_with_memory(
    inputs: Inputs, segments: jax.Array, mesh: Mesh | None = None, memory: Memory | None = None
) -> tuple[jax.Array, Memory]:
    """`chunked` of each device's share of rows and heads, with the memory after each row."""

    # Short rows need no long chunk, which is not shorter than any convolution.
    chunk = min(CHUNK, max(16, 1 << (segments.shape[1] - 1).bit_length()))

    def local(inputs, segments, *memory):
        out, after = chunked(inputs, segments, *memory, chunk=chunk)
        # Heads of the output come first too, so that all results are split alike.
        return out.swapaxes(1, 2), after

    before = () if memory is None else (memory,)
    out, after = _on_shares(local, inputs, mesh, ("batch", "heads"), segments, *before)
    return out.swapaxes(1, 2), after


def rows(segments: jax.Array, mesh: Mesh | None = None) -> Recur:
    """Linear attention of rows of segments without a cache.

    Args:
      segments: [B, T] int32, as in `attention.self_attention`.
    """

    def recur(inputs: Inputs, layer: LayerInfo, cache):
        out, _ = rows_with_memory(inputs, segments, mesh)
        return out, cache

    return recur


def stream(streams: Stream, num_prompt: int, mesh: Mesh | None = None) -> Recur:
    """Linear attention of packed streams, whose segments start at chunks.

    Args:
      num_prompt: places of prompts in a stream, which come before those of completions.
    """
    tile = streams.segments.shape[1] // streams.key_tiles.shape[1]
    chunk = chunk_of(tile)
    origins = origins_of(streams.segments, streams.prompts, num_prompt=num_prompt, chunk=chunk)
    local = functools.partial(chunked_stream, num_prompt=num_prompt, chunk=chunk)

    def recur(inputs: Inputs, layer: LayerInfo, cache):
        out = _on_shares(local, inputs, mesh, _BY_HEAD, streams.segments, origins)
        return out, cache

    return recur
