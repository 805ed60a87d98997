"""Attention of whole sequences (training, log-probs, prefill): which implementation runs where.

The plain versions that all are tested on are `attention.self_attention` for padded rows and
`tile_attention.stream_attention` for packed streams.

Letters: B rows, T tokens, N tokens of a stream, H heads, K key/value heads, D head dim.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from adpo_jax import attention as plain
from adpo_jax import tile_attention
from adpo_jax.attention import Attend, LayerInfo
from adpo_jax.attention_kernels import splash_tpu, stream_tpu
from adpo_jax.sharding import RULES, mesh_axis_size
from adpo_jax.tile_attention import Stream

# xla: everywhere. pallas_tpu: Mosaic; its _interpret runs on a CPU, to test. cudnn: of jax.nn.
ATTENTION = ("auto", "xla", "pallas_tpu", "cudnn", "pallas_tpu_interpret")


class Settings(NamedTuple):
    """What attention needs to know of a model and its devices; hashable.

    Attributes:
      windows: of each layer, in tokens; None for no window.
      scale: multiplies q k^T.
    """

    windows: tuple[int | None, ...]
    num_kv_heads: int
    head_dim: int
    scale: float
    soft_cap: float | None
    dtype: Any
    mesh: Mesh | None

    @property
    def plain(self) -> dict:
        return {"scale": self.scale, "soft_cap": self.soft_cap}


def resolve(attention: str, settings: Settings) -> str:
    """The implementation that `auto` means here; a chosen one is checked.

    On GPUs `auto` is xla: cudnn is a choice, but no measurement speaks for it yet.

    Raises:
      ValueError: for a name that is none of `ATTENTION`, or an implementation that cannot run this
        model.
    """
    if attention not in ATTENTION:
        raise ValueError(f"attention is one of {', '.join(ATTENTION)}; given {attention!r}")
    if attention == "auto":
        on_tpu = platform(settings.mesh) == "tpu"
        return "pallas_tpu" if on_tpu and not obstacle("pallas_tpu", settings) else "xla"
    if why := obstacle(attention, settings):
        raise ValueError(f"attention {attention!r} {why}. Use xla")
    return attention


def platform(mesh: Mesh | None) -> str:
    """Of the devices that run the model, which need not be there to compile for them."""
    return jax.default_backend() if mesh is None else mesh.devices.flat[0].platform


def obstacle(attention: str, settings: Settings) -> str:
    """Why an implementation cannot run this model; empty where it can."""
    D, dtype = settings.head_dim, jnp.dtype(settings.dtype)
    if attention.startswith("pallas_tpu") and D % splash_tpu.LANES:
        return f"needs a head_dim that is a multiple of {splash_tpu.LANES}; given {D}"
    if attention == "cudnn":
        if dtype.itemsize != 2:
            return f"takes bfloat16 or float16; given {dtype.name}"
        if D % 8 or D > 256:
            return f"needs a head_dim of at most 256 that is a multiple of 8; given {D}"
        if settings.soft_cap is not None:
            return "has no soft cap, which this model wants"
    return ""


def self_attention(
    attention: str, settings: Settings, positions: jax.Array, segments: jax.Array
) -> Attend:
    """Causal attention of rows to themselves; arguments as of `attention.self_attention`.

    The tokens of a segment are neighbours in their row, their positions rising by one.
    """
    if attention.startswith("pallas_tpu"):
        interpret = attention.endswith("interpret")
        attend = functools.partial(
            splash_tpu.segment_attention, settings=settings, interpret=interpret
        )
        return _on_each_device(attend, settings, (segments,))
    if attention == "cudnn":

        def mask(window):
            return plain.visible(positions, positions, segments, segments, window)

        return _cudnn(mask, settings)
    return plain.self_attention(positions, segments, **settings.plain)


def stream_attention(attention: str, settings: Settings, stream: Stream) -> Attend:
    """Attention of a packed stream to itself, as `tile_attention.stream_attention`.

    A stream too long for the kernel's fast memory gets the plain version.
    """
    N, n = stream.positions.shape[1], stream.key_tiles.shape[1]
    itemsize = jnp.dtype(settings.dtype).itemsize
    fits = stream_tpu.fits(N, n, settings.head_dim, itemsize)
    if attention.startswith("pallas_tpu") and fits:
        interpret = attention.endswith("interpret")
        attend = functools.partial(stream_tpu.attend, interpret=interpret, **settings.plain)
        return _on_each_device(attend, settings, tuple(stream))
    if attention == "cudnn":
        return _cudnn(functools.partial(_seen_in, stream), settings)
    on_cpu = platform(settings.mesh) == "cpu"
    return tile_attention.stream_attention(
        stream,
        windows=any(window is not None for window in settings.windows),
        score_bytes=tile_attention.CACHED_SCORE_BYTES if on_cpu else tile_attention.SCORE_BYTES,
        **settings.plain,
    )


def _seen_in(stream: Stream, window) -> jax.Array:
    """[B, N, N] bool: the own segment and the group's prompt, up to the token itself."""
    distance = stream.positions[:, :, None] - stream.positions[:, None]
    own, keys = stream.segments[:, :, None], stream.segments[:, None]
    same = (keys == own) | (keys == stream.prompts[:, :, None])
    return same & (keys > 0) & (distance >= 0) & (distance < window)


def _cudnn(mask_of_window, settings: Settings) -> Attend:
    def attend(q, k, v, layer: LayerInfo, cache):
        mask = mask_of_window(layer.window)[:, None]
        out = jax.nn.dot_product_attention(
            q, k, v, mask=mask, scale=settings.scale, implementation="cudnn"
        )
        return out, cache

    return attend


def heads_axis(mesh: Mesh, num_kv_heads: int) -> str | None:
    """The mesh axis that key/value heads, and the queries that read them, are split over."""
    axis = RULES["kv_heads"]
    return axis if num_kv_heads % mesh_axis_size(mesh, axis) == 0 else None


def _on_each_device(attend, settings: Settings, arrays: tuple[jax.Array, ...]) -> Attend:
    """A kernel on its share of the rows and heads: the partitioner cannot split one.

    Args:
      attend: (q, k, v, layer, arrays) -> out.
      arrays: [B, ...] each.
    """
    mesh = settings.mesh

    def attend_all(q, k, v, layer: LayerInfo, cache):
        if mesh is None or mesh.size == 1:
            return attend(q, k, v, layer, arrays), cache
        heads = heads_axis(mesh, settings.num_kv_heads)
        rows = PartitionSpec(RULES["batch"])
        by_head = PartitionSpec(RULES["batch"], None, heads)
        local = jax.shard_map(
            attend,
            mesh=mesh,
            in_specs=(by_head, by_head, by_head, PartitionSpec(), (rows,) * len(arrays)),
            out_specs=by_head,
            check_vma=False,
        )
        return local(q, k, v, jax.tree.map(jnp.asarray, layer), arrays), cache

    return attend_all
