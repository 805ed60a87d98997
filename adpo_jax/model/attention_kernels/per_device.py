"""Attention that every device of a mesh runs on its share of rows, heads and queries.

Kernels need it, since the partitioner cannot split them. Along the mesh axis `sequence` a device
has a share of the queries of a packed stream. The keys and values of the other shares come to it in
every layer (an all-gather), and go again with the layer: the backward pass gathers them once more.

Letters: B rows or streams, N tokens, n tiles, H heads, K key/value heads, D head dim.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from adpo_jax.devices.sharding import axes_that_split, mesh_axis_size, on_each_device
from adpo_jax.model import tile_attention
from adpo_jax.model.attention import Attend, LayerInfo, Tokens, by_kv_head
from adpo_jax.model.tile_attention import Stream

# What kernels and the plain version name their results for `jax.checkpoint`.
_RESULTS = jax.checkpoint_policies.save_only_these_names("attention", tile_attention.SAVED)


def of_rows(kernel: Callable, settings, arrays) -> Attend:
    """Attention of rows, whose queries are not split.

    Args:
      kernel: (q, k, v, layer, arrays) -> out.
      settings: the `Settings` of the model.
      arrays: a pytree of arrays [B, ...].
    """

    def of_share(q, k, v, layer, arrays, _):
        return kernel(q, k, v, layer, arrays)

    return _attend(of_share, settings, arrays, None, num_tiles=1)


def of_stream(
    kernel: Callable, settings, stream: Stream, lists_of: Callable[[Stream], Any] | None = None
) -> Attend:
    """Attention of packed streams.

    Args:
      kernel: (q, k, v, layer, stream, lists) -> out.
      settings: the `Settings` of the model.
      lists_of: makes arrays [B, ...] of a stream, once for all layers; None for none.
    """
    keys = Tokens(stream.positions, stream.segments) if num_shares(settings, stream) > 1 else None
    (B, n), lists = stream.key_tiles.shape[:2], None
    if lists_of is not None:
        lists = on_each_device(
            lambda stream, keys: lists_of(stream._replace(keys=keys)),
            settings.mesh,
            {"batch": B, "length": n},
            in_axes=(("batch", "length"), ("batch",)),
            out_axes=("batch", "length"),
        )(stream, keys)

    def of_share(q, k, v, layer, arrays, keys):
        stream, lists = arrays
        return kernel(q, k, v, layer, stream._replace(keys=keys), lists)

    return _attend(of_share, settings, (stream, lists), keys, num_tiles=n)


def num_shares(settings, stream: Stream) -> int:
    """The devices that each have a share of the stream's queries."""
    axes = axes_that_split(settings.mesh, "length", stream.key_tiles.shape[1])
    return mesh_axis_size(settings.mesh, axes) if axes else 1


def _attend(kernel: Callable, settings, arrays, keys: Tokens | None, num_tiles: int) -> Attend:
    """Attention that every device runs on its share of rows, heads and tiles of queries.

    Args:
      kernel: (q, k, v, layer, arrays, keys) -> out.
      arrays: [B, n, ...] or [B, N, ...] each, split as the queries are.
      keys: tokens [B, N], which each device has whole.
      num_tiles: n, which the devices share along `sequence`; 1 for queries that stay whole.
    """
    axis = axes_that_split(settings.mesh, "length", num_tiles)
    length = axis and "length"
    by_token, by_head = ("batch", length), ("batch", length, "kv_heads")

    def attend(q, k, v, layer: LayerInfo, cache):
        def of_share(q, k, v, layer, sinks, arrays, keys):
            if sinks is not None:
                layer = layer._replace(sinks=sinks.reshape(-1))
            if axis is not None:
                k, v = (jax.lax.all_gather(x, axis, axis=1, tiled=True) for x in (k, v))
            return kernel(q, k, v, layer, arrays, keys)

        if axis is not None:
            of_share = jax.checkpoint(of_share, policy=_RESULTS, prevent_cse=False)
        local = on_each_device(
            of_share,
            settings.mesh,
            {"batch": q.shape[0], "length": num_tiles, "kv_heads": k.shape[2]},
            in_axes=(by_head, by_head, by_head, (), ("kv_heads",), by_token, ("batch",)),
            out_axes=by_head,
        )
        sinks = None if layer.sinks is None else by_kv_head(layer.sinks, k.shape[2])
        place = jax.tree.map(jnp.asarray, layer._replace(sinks=None))
        return local(q, k, v, place, sinks, arrays, keys), cache

    return attend
