"""Attention of one layer in a step of decoding in two kernels for GPUs, in Triton.

The plain way norms and rotates queries and keys, writes keys and values into the ring, attends to
the prompts and to the ring and merges the two: ten kernels a layer, of which eight do next to
nothing. Here the kernel of the prompts fetches the queries of a group itself. That of the ring goes
on from what the first one found, and takes the token that is fed from registers while it writes it.
Both turn the queries that they need. The plain version is `group_attention` behind
`LayerWeights.norm_and_rotate` and `CacheLayout.write`.

Letters: B slots, P prefix rows, M samples of a prefix row, K key/value heads, R queries of a slot
and key/value head, Q = M R, S of them and padding, D head dim.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from adpo_jax.engine.group_attention import Part, Reach, block_range
from adpo_jax.engine.kernels.decode_gpu import WARPS, Cut, Running, Walk, capped
from adpo_jax.engine.kv_cache import LayerKV
from adpo_jax.model.attention import MASKED
from adpo_jax.model.triton import plt


class Fed(NamedTuple):
    """What the products of a layer made of the tokens that are fed, and what turns it."""

    # [B, K R + K + K, D]: queries, keys and values side by side, which the compiler makes in one
    # product. Apart they would be copied out of it.
    heads: jax.Array
    q_norm: jax.Array | None  # [D]; None for no norm
    k_norm: jax.Array | None  # [D]
    cos: jax.Array  # [B, D // 2] float32
    sin: jax.Array  # [B, D // 2] float32

    def queries_a_head(self, K: int) -> int:
        """R, given K."""
        return self.heads.shape[1] // K - 2


class Members(NamedTuple):
    """Which slots the samples of prefix rows have."""

    slot: jax.Array  # [P, M] int32; any number where there is no sample
    row: jax.Array  # [B] int32, the slot's prefix row
    rank: jax.Array  # [B] int32, the slot's place among those of the row, below M if idle too


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the kernels know before they run.

    Attributes:
      scale: what queries are multiplied by after their rotation.
      eps, plus_one: those of the norms, as for `rms_norm`.
    """

    scale: float
    soft_cap: float | None
    eps: float
    plus_one: bool
    interpret: bool = False


def attend(
    settings: Settings,
    fed: Fed,
    ring: LayerKV,
    prefix: LayerKV,
    column: jax.Array,
    members: Members,
    ring_reach: Reach,
    prefix_reach: Reach,
) -> tuple[jax.Array, LayerKV]:
    """Writes the keys and values of a step into the ring, and attends to prompts and ring.

    Args:
      ring, prefix: those of the layer; the ring is written in place.
      column: int32, of the ring, where the step writes.
      ring_reach: of the slots [B, 1]; one that reaches nothing is idle.
      prefix_reach: of the queries [P, Q] of each prefix row's samples.

    Returns:
      Attention [B, K, R, D] in the dtype of the queries, and the ring.
    """
    part = _attend_prompts(settings, fed, prefix, members, prefix_reach)
    column = jnp.reshape(column, (1,)).astype(jnp.int32)
    return _attend_ring(settings, fed, part, ring, column, members, ring_reach)


def _attend_prompts(settings: Settings, fed: Fed, prefix: LayerKV, members, reach) -> Part:
    (P, M), (_, K, _, D) = members.slot.shape, prefix.v.shape
    R = fed.queries_a_head(K)
    cut = Cut.of(M * R, D, prefix.v.dtype.itemsize)
    of_queries = jax.ShapeDtypeStruct((P, K, M * R), jnp.float32)
    outputs = Part(jax.ShapeDtypeStruct((P, K, M * R, D), jnp.float32), of_queries, of_queries)
    inputs = (prefix, _Bounds.of(reach, prefix, cut), fed, members.slot)
    grid = (P, K, cut.programs(M * R))
    return _call(settings, _prompts_kernel, cut, grid, inputs, outputs, "step_prompts")


def _attend_ring(settings: Settings, fed: Fed, part, ring: LayerKV, column, members, reach):
    B, K, _, D = ring.v.shape
    R = fed.queries_a_head(K)
    cut = Cut.of(R, D, ring.v.dtype.itemsize)
    out = jax.ShapeDtypeStruct((B, K, R, D), fed.heads.dtype)
    outputs = (out, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), ring))
    inputs = (ring, _Bounds.of(reach, ring, cut), fed, column, part, members)
    grid, in_place = (B, K, cut.programs(R)), {0: 1, 1: 2}
    return _call(settings, _ring_kernel, cut, grid, inputs, outputs, "step_ring", in_place)


class _Bounds(NamedTuple):
    """The blocks that each row walks, as of `block_range`, and its `Reach`."""

    start: jax.Array
    last: jax.Array
    origin: jax.Array
    back: jax.Array
    length: jax.Array

    @classmethod
    def of(cls, reach: Reach, store: LayerKV, cut: Cut) -> "_Bounds":
        return cls(*block_range(reach, store.v.shape[-2], cut.block), *reach[:3])


def _call(settings, kernel, cut: Cut, grid, inputs, outputs, name: str, in_place=None):
    """Runs a kernel that finds its way in whole arrays.

    Args:
      in_place: which array of the inputs each of the outputs overwrites.
    """
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    return pl.pallas_call(
        functools.partial(kernel, settings, cut),
        grid=grid,
        in_specs=jax.tree.map(lambda _: anywhere, inputs),
        out_specs=jax.tree.map(lambda _: anywhere, outputs),
        out_shape=outputs,
        input_output_aliases=in_place or {},
        compiler_params=plt.CompilerParams(num_warps=WARPS, num_stages=cut.stages),
        interpret=settings.interpret,
        name=name,
    )(*inputs)


def _prompts_kernel(settings: Settings, cut: Cut, prefix, bounds, fed, slots, *outputs):
    part = Part(*outputs)
    row, head = pl.program_id(0), pl.program_id(1)
    (B, _, D), (_, K, queries) = fed.heads.shape, part.top.shape
    R = fed.queries_a_head(K)
    first = pl.program_id(2) * cut.queries
    query = first + jnp.arange(cut.queries)
    real, these = query < queries, pl.ds(first, cut.queries)
    slot = plt.load(slots.at[row, query // R], mask=real, other=0) % B
    origin = plt.load(bounds.origin.at[row, these], mask=real, other=0)
    back = plt.load(bounds.back.at[row, these], mask=real, other=-1)
    q = _queries(settings, fed, slot, head * R + jax.lax.rem(query, R), real)
    walk = Walk(cut.block, prefix.v.shape[-2], False, settings.soft_cap)
    found = walk.attend(
        q,
        prefix.k,
        prefix.v,
        lambda block: (row, head, block * cut.block),
        (origin, back, bounds.length[row]),
        bounds.start[row],
        bounds.last[row],
        Running.nothing(len(query), D),
    )
    plt.store(part.out.at[row, head, these, slice(None)], found.out, mask=real[:, None])
    plt.store(part.top.at[row, head, these], found.top, mask=real)
    plt.store(part.total.at[row, head, these], found.total, mask=real)


def _ring_kernel(
    settings: Settings, cut: Cut, ring, bounds, fed, column, part, members, out, written
):
    """Reads `written`, which is the memory of `ring`."""
    slot, head, first = pl.program_id(0), pl.program_id(1), pl.program_id(2) * cut.queries
    (P, K, _), R = part.top.shape, out.shape[2]
    query = first + jnp.arange(cut.queries)
    real = query < R
    back = jnp.full(query.shape, bounds.back[slot, 0])
    k = _key(settings, fed, slot, (R * K) + head)
    v = plt.load(fed.heads.at[slot, (R + 1) * K + head, slice(None)])
    here = (slot, head, column[0], slice(None))
    k, v = k.astype(written.k.dtype), v.astype(written.v.dtype)
    plt.store(written.k.at[here], k)
    plt.store(written.v.at[here], v)

    q = _queries(settings, fed, slot, head * R + query, real)
    # The prompt's part, then the token itself, which no block has: other threads of the program may
    # still be writing it.
    mine = (members.row[slot] % P, head, pl.ds(members.rank[slot] * R + first, len(query)))
    prompt = Running(
        plt.load(part.out.at[*mine, slice(None)], mask=real[:, None], other=0.0),
        plt.load(part.top.at[*mine], mask=real, other=MASKED),
        plt.load(part.total.at[*mine], mask=real, other=1.0),
    )
    score = jnp.sum(q.astype(jnp.float32) * k.astype(jnp.float32)[None, :], axis=1)
    score = jnp.where(back >= 0, capped(score, settings.soft_cap), MASKED)
    top = jnp.maximum(prompt.top, score)
    shrink, weight = jnp.exp(prompt.top - top), jnp.exp(score - top)
    both = Running(
        prompt.out * shrink[:, None] + weight[:, None] * v.astype(jnp.float32)[None, :],
        top,
        prompt.total * shrink + weight,
    )
    walk = Walk(cut.block, written.v.shape[-2], True, settings.soft_cap, nearest=1)
    found = walk.attend(
        q,
        written.k,
        written.v,
        lambda block: (slot, head, block * cut.block),
        (jnp.full(query.shape, column[0]), back, bounds.length[slot]),
        bounds.start[slot],
        bounds.last[slot],
        both,
    )
    result = (found.out / found.total[:, None]).astype(out.dtype)
    these = pl.ds(first, len(query))
    plt.store(out.at[slot, head, these, slice(None)], result, mask=real[:, None])


def _queries(settings: Settings, fed: Fed, slot, head, real):
    """Turned and scaled queries [S, D].

    Args:
      slot: a scalar, or [S].
      head: [S], among those of the slot.
      real: [S] bool, which of them there are.
    """
    slot, dtype = jnp.broadcast_to(slot, head.shape)[:, None], fed.heads.dtype

    def load(dims):
        at = fed.heads.at[slot, head[:, None], dims[None, :]]
        return plt.load(at, mask=real[:, None], other=0).astype(jnp.float32)

    def of_token(table, dims):
        return plt.load(table.at[slot, dims[None, :]])

    q = _turned(settings, fed, fed.q_norm, load, of_token)
    return (q.astype(jnp.float32) * jnp.asarray(settings.scale, dtype)).astype(dtype)


def _key(settings: Settings, fed: Fed, slot, head):
    """The turned key [D] of a slot; its number is among the heads of all kinds."""
    return _turned(
        settings,
        fed,
        fed.k_norm,
        lambda dims: plt.load(fed.heads.at[slot, head, dims]).astype(jnp.float32),
        lambda table, dims: plt.load(table.at[slot, dims]),
    )


def _turned(settings: Settings, fed: Fed, weight, load, of_token):
    """`rope.rotate` of the norm of heads [..., D], in their dtype.

    Args:
      weight: of the norm; None for none.
      load: dims -> the heads' numbers at these dimensions.
      of_token: (cos or sin, dims) -> its numbers there, in a shape that broadcasts.
    """
    D, dtype = fed.heads.shape[-1], fed.heads.dtype
    half = D // 2
    dims = jnp.arange(D)
    # Each number beside the other one of its pair, since Triton joins no halves.
    paired = jax.lax.rem(dims + half, D)
    x, y = load(dims), load(paired)
    if weight is not None:
        inverse = jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) / D + settings.eps)

        def normed(x, dims):
            scale = plt.load(weight.at[dims]).astype(jnp.float32)
            scale = scale + 1.0 if settings.plus_one else scale
            # The norm's result has the dtype of x, as in the plain version.
            return (x * inverse * scale).astype(dtype).astype(jnp.float32)

        x, y = normed(x, dims), normed(y, paired)
    angle = jax.lax.rem(dims, half)
    cos, sin = of_token(fed.cos, angle), of_token(fed.sin, angle)
    return (x * cos + y * jnp.where(dims < half, -sin, sin)).astype(dtype)
