"""Attention of whole sequences (training, log-probs, prefill): a table of implementations a use.

The implementations of `ROWS` take the arguments of `attention.self_attention`, those of `STREAMS`
the arguments of `tile_attention.stream_attention`. These two are the plain versions that all others
are tested against.

Letters: B rows or streams, T tokens, N tokens of a stream, H heads, K key/value heads, D head dim.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from adpo_jax.devices.sharding import first_device
from adpo_jax.model import attention as plain
from adpo_jax.model import attention_choice, tile_attention
from adpo_jax.model.attention import Attend, LayerInfo, Places, visible
from adpo_jax.model.attention_choice import Implementation, Use
from adpo_jax.model.attention_kernels import (
    per_device,
    splash_tpu,
    stream_gpu,
    stream_mosaic,
    stream_tpu,
)
from adpo_jax.model.attention_kernels.ring import Passes
from adpo_jax.model.tile_attention import Stream

# What `auto` means on a GPU, the first that can run there. The kernels in Mosaic are for Hopper
# cards, and take three quarters of the time of those in Triton on an H200.
GPU_ORDER = ("mosaic_gpu", "pallas_gpu")

# An obstacle, as the rest of a sentence.
NO_CHUNKS = "has no attention to chunks of positions, which this model wants"


class Settings(NamedTuple):
    """The settings that attention takes from a model and its devices; hashable.

    Attributes:
      windows: the window of each layer in tokens; None for no window.
      scale: multiplies q k^T.
      chunked: whether queries of some layers see their chunk of positions alone.
      global_head_dim: that of layers without a window where it is another; None where it is not.
      sinks: whether heads have attention sinks.
      exchange: how devices that share a stream see each other's keys, of `per_device.EXCHANGES`.
    """

    windows: tuple[int | None, ...]
    num_kv_heads: int
    head_dim: int
    scale: float
    soft_cap: float | None
    dtype: Any
    mesh: Mesh | None
    global_head_dim: int | None = None
    chunked: bool = False
    sinks: bool = False
    exchange: str = "auto"

    @property
    def head_dims(self) -> tuple[int, ...]:
        """The head dimensions of all layers."""
        return (self.head_dim, *([self.global_head_dim] if self.global_head_dim else []))

    @property
    def plain(self) -> dict:
        return {"scale": self.scale, "soft_cap": self.soft_cap}

    @property
    def platform(self) -> str:
        """The platform of the model's devices, which need not be there to compile for them."""
        return first_device(self.mesh).platform

    @property
    def gpu(self) -> Any:
        """A GPU that the model runs on, which need not be there; None for none."""
        return first_device(self.mesh) if self.platform == "gpu" else None


def self_attention(
    name: str, settings: Settings, positions: jax.Array, segments: jax.Array
) -> Attend:
    """Causal attention of rows to themselves; arguments as of `attention.self_attention`.

    The tokens of a segment must be neighbours in their row, with positions that rise by one.

    Args:
      name: as `attention_choice.resolve` gave it for `ROWS`.
    """
    return ROWS.table[name].attend(settings, positions, segments)


def stream_attention(name: str, settings: Settings, stream: Stream) -> Attend:
    """Attention of a packed stream to itself, as `tile_attention.stream_attention`.

    A stream too long for the kernel's fast memory gets the plain version, with a warning.

    Args:
      name: as `attention_choice.resolve` gave it for `STREAMS`.
    """
    name = attention_choice.fitting(name, STREAMS, settings, stream)
    return STREAMS.table[name].attend(settings, stream)


# --- the plain versions


def _plain_rows(settings: Settings, positions, segments) -> Attend:
    return plain.self_attention(positions, segments, **settings.plain)


def _plain_stream(settings: Settings, stream: Stream) -> Attend:
    on_cpu = settings.platform == "cpu"
    attention_of = functools.partial(
        tile_attention.StreamAttention,
        windows=settings.chunked or any(window is not None for window in settings.windows),
        score_bytes=tile_attention.CACHED_SCORE_BYTES if on_cpu else tile_attention.SCORE_BYTES,
        **settings.plain,
    )
    is_long = on_cpu and per_device.tiles_at_once(settings, stream)[1] >= tile_attention.MANY_TILES
    if per_device.num_shares(settings, stream) == 1:
        alone = settings.mesh is None or settings.mesh.size == 1
        # Else the partitioner splits it.
        return attention_of(stream, tile_by_tile=is_long and alone).attend

    def attend(q, k, v, layer, stream, _):
        return attention_of(stream, tile_by_tile=is_long).attend(q, k, v, layer, None)[0]

    def forward(q, k, v, layer, stream, _):
        return attention_of(stream, tile_by_tile=is_long).forward(q, k, v, layer)

    def gradients(q, k, v, layer, stream, _, saved, d_out):
        one = attention_of(stream, tile_by_tile=is_long)
        return one.gradients(q, k, v, layer, saved, d_out)

    kernel = per_device.Kernel(attend, Passes(forward, gradients))
    return per_device.of_stream(kernel, settings, stream)


# --- TPU


def _splash_rows(settings: Settings, positions, segments, *, interpret=False) -> Attend:
    del positions  # positions of neighbours in a segment rise by one
    attend = functools.partial(splash_tpu.segment_attention, settings=settings, interpret=interpret)
    return per_device.of_rows(attend, settings, (segments,))


def _kernel_stream(settings: Settings, stream: Stream, *, interpret=False) -> Attend:
    options = {"interpret": interpret, **settings.plain}

    def attend(q, k, v, layer, stream, _):
        return stream_tpu.attend(q, k, v, layer, stream, **options)

    def forward(q, k, v, layer, stream, _):
        return stream_tpu.forward(q, k, v, layer, stream, **options)

    def gradients(q, k, v, layer, stream, _, *results):
        return stream_tpu.gradients(q, k, v, layer, stream, *results, **options)

    kernel = per_device.Kernel(attend, Passes(forward, gradients))
    return per_device.of_stream(kernel, settings, stream)


def _tpu_obstacle(settings: Settings) -> str:
    if settings.chunked:
        return NO_CHUNKS
    for D in settings.head_dims:
        if D % splash_tpu.LANES:
            return f"needs a head_dim that is a multiple of {splash_tpu.LANES}; given {D}"
    return _without_sinks(settings)


def _without_sinks(settings: Settings) -> str:
    return "has no attention sinks, which this model wants" if settings.sinks else ""


def _tpu_limit(settings: Settings, stream: Stream) -> str:
    return stream_tpu.limit(*per_device.tiles_at_once(settings, stream))


# --- GPU


def _gpu_stream(
    settings: Settings, stream: Stream, *, kernels=stream_gpu, interpret=False
) -> Attend:
    """Packed streams by the kernels of a module, `stream_gpu` or `stream_mosaic`."""
    windows = any(window is not None for window in settings.windows)
    options = {"windows": windows, "interpret": interpret, **settings.plain}
    attend, forward, gradients = (
        functools.partial(one, **options)
        for one in (kernels.attend, kernels.forward, kernels.gradients)
    )
    lists_of = functools.partial(kernels.lists_of, windows=windows)
    kernel = per_device.Kernel(attend, Passes(forward, gradients), lists_of)
    return per_device.of_stream(kernel, settings, stream)


def _gpu_rows(
    settings: Settings, positions, segments, *, kernels=stream_gpu, interpret=False
) -> Attend:
    stream, T = kernels.rows_as_stream(positions, segments), positions.shape[1]
    attend = _gpu_stream(settings, stream, kernels=kernels, interpret=interpret)
    more = stream.positions.shape[1] - T

    def attend_rows(q, k, v, layer: LayerInfo, cache):
        q, k, v = (stream_gpu.padded(x, more) for x in (q, k, v))
        out, cache = attend(q, k, v, layer, cache)
        return out[:, :T], cache

    return attend_rows


def _gpu_obstacle(settings: Settings, kernels=stream_gpu) -> str:
    if jnp.dtype(settings.dtype).itemsize != 2:
        return f"takes bfloat16 or float16; given {jnp.dtype(settings.dtype).name}"
    if settings.chunked:
        return NO_CHUNKS
    each = (kernels.obstacle(D) for D in settings.head_dims)
    return attention_choice.old_gpu(settings.gpu) or next(filter(None, each), "")


def _mosaic_obstacle(settings: Settings) -> str:
    return attention_choice.no_hopper(settings.gpu) or _gpu_obstacle(settings, stream_mosaic)


def _gpu_limit(settings: Settings, stream: Stream, kernels=stream_gpu) -> str:
    return kernels.limit(stream.positions.shape[1], stream.key_tiles.shape[1])


# --- cuDNN


def _cudnn_rows(settings: Settings, positions: jax.Array, segments: jax.Array) -> Attend:
    """Rows by the fused attention of cuDNN, under a mask over all pairs of tokens."""
    return _cudnn(settings, Places(positions, segments))


def _cudnn_stream(settings: Settings, stream: Stream) -> Attend:
    return _cudnn(settings, stream.tokens)


def _cudnn(settings: Settings, tokens: Places) -> Attend:
    queries, keys = tokens.pairs()

    def attend(q, k, v, layer: LayerInfo, cache):
        mask = visible(queries, keys, layer.window_at(queries.positions))[:, None]
        out = jax.nn.dot_product_attention(
            q, k, v, mask=mask, scale=settings.scale, implementation="cudnn"
        )
        return out, cache

    return attend


def _cudnn_obstacle(settings: Settings) -> str:
    """Why cuDNN's attention cannot run this model; empty where it can."""
    dtype = jnp.dtype(settings.dtype)
    if dtype.itemsize != 2:
        return f"takes bfloat16 or float16; given {dtype.name}"
    for D in settings.head_dims:
        if D % 8 or D > 256:
            return f"needs a head_dim of at most 256 that is a multiple of 8; given {D}"
    if settings.soft_cap is not None:
        return "has no soft cap, which this model wants"
    return _without_sinks(settings)


# --- the tables


# (settings, positions, segments) -> Attend
ROWS = Use(
    "padded rows",
    {
        "xla": Implementation(_plain_rows),
        "pallas_tpu": Implementation(_splash_rows, ("tpu",), _tpu_obstacle),
        "pallas_gpu": Implementation(_gpu_rows, ("gpu",), _gpu_obstacle),
        "mosaic_gpu": Implementation(
            functools.partial(_gpu_rows, kernels=stream_mosaic), ("gpu",), _mosaic_obstacle
        ),
        "cudnn": Implementation(_cudnn_rows, ("gpu",), _cudnn_obstacle),
        "pallas_tpu_interpret": Implementation(
            functools.partial(_splash_rows, interpret=True), (), _tpu_obstacle
        ),
    },
    {"tpu": ("pallas_tpu",), "gpu": GPU_ORDER},
)

# (settings, stream) -> Attend
STREAMS = Use(
    "packed streams",
    {
        "xla": Implementation(_plain_stream),
        "pallas_tpu": Implementation(_kernel_stream, ("tpu",), _tpu_obstacle, _tpu_limit),
        "pallas_gpu": Implementation(_gpu_stream, ("gpu",), _gpu_obstacle, _gpu_limit),
        "mosaic_gpu": Implementation(
            functools.partial(_gpu_stream, kernels=stream_mosaic),
            ("gpu",),
            _mosaic_obstacle,
            functools.partial(_gpu_limit, kernels=stream_mosaic),
        ),
        "cudnn": Implementation(_cudnn_stream, ("gpu",), _cudnn_obstacle),
        "pallas_tpu_interpret": Implementation(
            functools.partial(_kernel_stream, interpret=True), (), _tpu_obstacle, _tpu_limit
        ),
    },
    {"tpu": ("pallas_tpu",), "gpu": GPU_ORDER},
)
