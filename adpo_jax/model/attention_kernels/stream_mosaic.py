"""Attention over packed streams and rows for Hopper GPUs in Mosaic, with gradients.

The successor of `stream_gpu`, which says what is computed, by which lists, and runs on older cards.
Here a thread block is one warpgroup that only copies, and two that only compute (as in Shah et al.
2024, arXiv 2407.08608). The copier walks the list of a tile and fills a ring of buffers; a buffer
is filled again when all who read it have said so. A computing warpgroup holds 64 queries of a head,
or 64 keys and half of the queries that see them, and keeps sums in registers. The heads of one
key/value head have the same lists, so two of them share the copies.

`mosaic` has the kernels. Letters: as in `stream_gpu`; P blocks of a tile, C computing warpgroups, U
blocks of a step.
"""

import functools

import jax
import jax.numpy as jnp

from adpo_jax.model.attention_kernels import stream_gpu
from adpo_jax.model.attention_kernels.mosaic.key_kernel import key_kernel, key_scratch
from adpo_jax.model.attention_kernels.mosaic.pieces import Cut, Work
from adpo_jax.model.attention_kernels.mosaic.query_kernels import forward_kernel, query_kernel
from adpo_jax.model.attention_kernels.mosaic.warpgroups import BLOCK, COMPUTING, call, plgpu
from adpo_jax.model.attention_kernels.stream_gpu import Lists, Static, like, lists_of
from adpo_jax.model.tile_attention import Saved, Stream
from adpo_jax.model.triton import plt

__all__ = ["attend", "limit", "lists_of", "obstacle", "rows_as_stream"]

HEAD_DIMS = (64, 128)
FORWARD = Cut(2, 2, 2, persistent=True, take_turns=True)
OF_QUERIES = Cut(1, 2, 2, persistent=True, take_turns=False)


def obstacle(head_dim: int) -> str:
    """Why the kernels cannot run heads of this size, or not under this jax; empty if they can."""
    if plgpu is None or plt is None:
        return (
            f"needs Pallas' Mosaic and Triton for GPUs, which jax {jax.__version__} does not have"
        )
    if head_dim not in HEAD_DIMS:
        sizes = " or ".join(map(str, HEAD_DIMS))
        return f"needs a head_dim of {sizes}; given {head_dim}"
    return ""


def limit(num_tokens: int, num_tiles: int) -> str:
    """Why tiles of this size cannot be run; empty if they can."""
    tile = num_tokens // num_tiles
    return f"needs tiles of a multiple of {BLOCK} tokens; given {tile}" if tile % BLOCK else ""


def attend(*args, **settings) -> jax.Array:
    """Attention of the tokens of a stream to its keys, as `stream_gpu.attend`."""
    return stream_gpu.attend(*args, kernels=_kernels(), **settings)


def forward(*args, **settings) -> Saved:
    """As `stream_gpu.forward`."""
    return stream_gpu.forward(*args, kernels=_kernels(), **settings)


def gradients(*args, **settings) -> tuple[jax.Array, ...]:
    """As `stream_gpu.gradients`."""
    return stream_gpu.gradients(*args, kernels=_kernels(), **settings)


def _kernels() -> stream_gpu.Kernels:
    return stream_gpu.Kernels(_run_forward, _run_gradients)


def rows_as_stream(positions: jax.Array, segments: jax.Array) -> Stream:
    """Rows as streams, as `stream_gpu.rows_as_stream`, in tiles that these kernels take."""
    return stream_gpu.rows_as_stream(positions, segments, least=BLOCK)


def _run_forward(static: Static, q, k, v, places, lists: Lists, window):
    work = Work.of(static, FORWARD, q, k)
    B, N, H, D = q.shape
    return call(
        static,
        functools.partial(forward_kernel, work),
        work.computing + 1,
        work.grid,
        [lists.order, lists.keys, lists.key_counts, window, *places, q, k, v],
        [like(q), jax.ShapeDtypeStruct((B, H, N), jnp.float32)],
        work.scratch(D, q.dtype, 1, 0),
        "stream_attention",
    )


def _run_gradients(static: Static, q, k, v, places, lists: Lists, window, d_out, log_z, mean):
    work = Work.of(static, OF_QUERIES, q, k)
    (B, _, H, D), K = q.shape, k.shape[2]
    tensors = [window, *places, q, k, v, d_out, log_z, mean]
    (d_q,) = call(
        static,
        functools.partial(query_kernel, work),
        work.computing + 1,
        work.grid,
        [lists.order, lists.keys, lists.key_counts, *tensors],
        [like(q)],
        work.scratch(D, q.dtype, 2, 2),
        "stream_attention_d_query",
    )
    M = lists.chunks.shape[1]
    part = jax.ShapeDtypeStruct((B, M, K, static.tile, D), jnp.float32)
    d_k, d_v, *parts = call(
        static,
        functools.partial(key_kernel, static, H // K),
        COMPUTING + 1,
        B * M * (static.tile // BLOCK) * K,
        [lists.queries, lists.query_counts, lists.chunks, lists.sums, *tensors],
        [like(k), like(v), part, part],
        key_scratch(D, k.dtype),
        "stream_attention_d_key",
    )
    d_k, d_v = stream_gpu.sum_of_parts(static, lists, *parts, d_k, d_v, whole=True)
    return d_q, d_k, d_v
