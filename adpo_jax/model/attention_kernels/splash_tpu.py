"""Attention of rows for TPUs by JAX's splash attention: no [T, T] scores in memory, with gradients.

The plain version is `attention.self_attention`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel,
    splash_attention_mask,
)

from adpo_jax.model.attention import LayerInfo

# Splash attention needs blocks and a head dim that are multiples of this, and lengths that are
# multiples of the block.
LANES = 128
BLOCK = 512


def segment_attention(q, k, v, layer: LayerInfo, arrays, *, settings, interpret: bool = False):
    """Causal attention within segments and each layer's window.

    Args:
      q: [B, T, H, D], not scaled; k, v: [B, T, K, D].
      arrays: (segments [B, T] int32,), 0 for padding.
      settings: `attention_kernels.Settings`.

    Returns:
      [B, T, H, D], meaningless at padding.
    """
    windows = sorted(set(settings.windows), key=lambda w: (w is None, w))
    branch_of_layer = np.array([windows.index(w) for w in settings.windows], np.int32)
    branches = [
        functools.partial(_splash, settings=settings, window=w, interpret=interpret)
        for w in windows
    ]
    return jax.lax.switch(jnp.asarray(branch_of_layer)[layer.index], branches, q, k, v, arrays[0])


def _splash(q, k, v, segments, *, settings, window: int | None, interpret: bool):
    T = q.shape[1]
    padding = -T % LANES
    if padding:
        q, k, v = (jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0))) for x in (q, k, v))
        segments = jnp.pad(segments, ((0, 0), (0, padding)))
    kernel = _kernel(T + padding, q.shape[2], settings.soft_cap, window, interpret)

    def attend_row(q, k, v, segments):
        return kernel(q, k, v, splash_attention_kernel.SegmentIds(segments, segments))

    q = q * jnp.asarray(settings.scale, q.dtype)
    out = jax.vmap(attend_row)(*(jnp.swapaxes(x, 1, 2) for x in (q, k, v)), segments)
    return jnp.swapaxes(out, 1, 2)[:, :T].astype(q.dtype)


def _kernel(length: int, heads: int, soft_cap, window: int | None, interpret: bool):
    if window is None or window >= length:
        one = splash_attention_mask.CausalMask((length, length))
    else:
        one = splash_attention_mask.LocalMask(
            (length, length), window_size=(window - 1, 0), offset=0
        )
    block = next(b for b in (BLOCK, 256, LANES) if length % b == 0)
    return splash_attention_kernel.make_splash_mha(
        mask=splash_attention_mask.MultiHeadMask([one] * heads),
        block_sizes=splash_attention_kernel.BlockSizes(
            block_q=block,
            block_kv=block,
            block_kv_compute=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_kv_dkv_compute=block,
            block_q_dq=block,
            block_kv_dq=block,
        ),
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=soft_cap,
        interpret=interpret,
    )
