"""Attention that every device of a mesh runs on its share of rows, heads and queries.

Kernels need it, since the partitioner cannot split them. Along the mesh axis `sequence` a device
has a share of the queries of a packed stream. The keys and values of the other shares come to it in
every layer: all at once (an all-gather, which the backward pass repeats, so that none is kept) or,
where those do not fit beside the rest, one share after the other (`ring`).

Letters: B rows or streams, N tokens, n tiles, H heads, K key/value heads, D head dim.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from adpo_jax.devices.sharding import axes_that_split, mesh_axis_size, on_each_device
from adpo_jax.model import tile_attention
from adpo_jax.model.attention import Attend, LayerInfo, Places, by_kv_head
from adpo_jax.model.attention_kernels import ring
from adpo_jax.model.tile_attention import Stream

EXCHANGES = ("auto", "gather", "ring")

# Under "auto", from so many bytes of a layer's keys and values on they go round: gathered, they and
# their gradients would take two to three times as much.
RING_BYTES = 2**30

# What kernels and the plain version name their results for `jax.checkpoint`.
_RESULTS = jax.checkpoint_policies.save_only_these_names("attention", tile_attention.SAVED)


def of_rows(kernel: Callable, settings, arrays) -> Attend:
    """Attention of rows, whose queries are not split.

    Args:
      kernel: (q, k, v, layer, arrays) -> out.
      settings: the `Settings` of the model.
      arrays: a pytree of arrays [B, ...].
    """
    return _attend(kernel, settings, [(arrays, ("batch",))], num_tiles=1)


class Kernel(NamedTuple):
    """Attention of packed streams on one device.

    Attributes:
      attend: (q, k, v, layer, stream, lists) -> out.
      passes: the same in two passes, without sinks.
      lists_of: makes arrays [B, ...] of a stream, once for all layers; None for none.
    """

    attend: Callable
    passes: ring.Passes
    lists_of: Callable[[Stream], Any] | None = None


def of_stream(kernel: Kernel, settings, stream: Stream) -> Attend:
    """Attention of packed streams.

    Args:
      settings: the `Settings` of the model.
    """
    (B, n), shares = stream.key_tiles.shape[:2], num_shares(settings, stream)
    axis = axes_that_split(settings.mesh, "length", n)
    keys = Places(stream.positions, stream.segments) if shares > 1 else None
    by_token, whole = ("batch", "length"), ("batch",)
    lists, lists_of, lists_axes = None, kernel.lists_of, by_token
    if goes_round := is_ring(settings, stream):
        lists_axes = ("batch", None, "length")

        def lists_of(stream):
            return ring.parts_of(stream, shares, kernel.lists_of)

    if lists_of is not None:
        lists = on_each_device(
            lambda stream, keys: lists_of(stream._replace(keys=keys)),
            settings.mesh,
            {"batch": B, "length": n},
            in_axes=(by_token, whole),
            out_axes=lists_axes,
        )(stream, keys)

    def alone(q, k, v, layer, stream, lists, keys):
        return kernel.attend(q, k, v, layer, stream._replace(keys=keys), lists)

    def gathering(q, k, v, *others):
        k, v = (jax.lax.all_gather(x, axis, axis=1, tiled=True) for x in (k, v))
        return alone(q, k, v, *others)

    def going_round(q, k, v, layer, stream, lists, keys):
        parts = ring.Parts(stream._replace(keys=keys), *lists)
        return ring.attend(q, k, v, layer, parts, passes=kernel.passes, axis=axis)

    on_share = alone
    if shares > 1:
        on_share = jax.checkpoint(gathering, policy=_RESULTS, prevent_cse=False)
    if goes_round:
        on_share = going_round
    return _attend(on_share, settings, [(stream, by_token), (lists, lists_axes), (keys, whole)], n)


def num_shares(settings, stream: Stream) -> int:
    """The devices that each have a share of the stream's queries."""
    axes = axes_that_split(settings.mesh, "length", stream.key_tiles.shape[1])
    return mesh_axis_size(settings.mesh, axes) if axes else 1


def is_ring(settings, stream: Stream) -> bool:
    """Whether keys and values go round among the devices that share a stream."""
    if num_shares(settings, stream) == 1 or settings.exchange == "gather":
        return False
    return settings.exchange == "ring" or gathered_bytes(settings, stream) >= RING_BYTES


def gathered_bytes(settings, stream: Stream) -> int:
    """Bytes of a layer's keys and values of whole streams on one device."""
    B, N = stream.positions.shape
    parts = (
        mesh_axis_size(settings.mesh, axes_that_split(settings.mesh, *of) or ())
        for of in (("batch", B), ("kv_heads", settings.num_kv_heads))
    )
    numbers = 2 * B * N * settings.num_kv_heads * max(settings.head_dims)
    return numbers * jnp.dtype(settings.dtype).itemsize // math.prod(parts)


def tiles_at_once(settings, stream: Stream) -> tuple[int, int]:
    """Tiles of queries and of keys that a kernel sees in one call."""
    n, shares = stream.key_tiles.shape[1], num_shares(settings, stream)
    return n // shares, n // shares if is_ring(settings, stream) else n


def _attend(
    on_share: Callable, settings, others: Sequence[tuple[Any, tuple]], num_tiles: int
) -> Attend:
    """Attention that every device runs on its share of rows, heads and tiles of queries.

    Args:
      on_share: (q, k, v, layer, *others) -> out.
      others: pytrees of arrays, each with the logical axes of all its arrays.
      num_tiles: n, which the devices share along `sequence`; 1 for queries that stay whole.
    """
    by_head = ("batch", "length", "kv_heads")
    trees, axes = zip(*others)

    def attend(q, k, v, layer: LayerInfo, cache):
        def local(q, k, v, layer, sinks, *others):
            if sinks is not None:
                layer = layer._replace(sinks=sinks.reshape(-1))
            return on_share(q, k, v, layer, *others)

        on_devices = on_each_device(
            local,
            settings.mesh,
            {"batch": q.shape[0], "length": num_tiles, "kv_heads": k.shape[2]},
            in_axes=(by_head, by_head, by_head, (), ("kv_heads",), *axes),
            out_axes=by_head,
        )
        sinks = None if layer.sinks is None else by_kv_head(layer.sinks, k.shape[2])
        place = jax.tree.map(jnp.asarray, layer._replace(sinks=None))
        return on_devices(q, k, v, place, sinks, *trees), cache

    return attend
