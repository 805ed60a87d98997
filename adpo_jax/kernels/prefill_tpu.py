"""Prefill attention for TPUs by splash attention: no [T, T] scores in memory.

Prompts are padded on the right, so under a causal mask no real token sees padding and no segments
are needed. The plain version is `Policy.self_attention`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel,
    splash_attention_mask,
)

from adpo_jax.attention import Attend, LayerInfo
from adpo_jax.model import ModelConfig

# Splash attention wants blocks of a multiple of this, and lengths of a multiple of the block.
LANES = 128
BLOCK = 512


def fits(config: ModelConfig, length: int) -> bool:
    """Whether the kernel takes these sizes."""
    return length % LANES == 0 and config.head_dim % LANES == 0


def causal_attention(config: ModelConfig, length: int, *, interpret: bool = False) -> Attend:
    """Causal attention of `length` tokens to themselves, within each layer's window."""
    windows = sorted(set(config.windows), key=lambda w: (w is None, w))
    of_layer = np.array([windows.index(w) for w in config.windows], np.int32)
    branches = [
        functools.partial(_splash, config=config, window=w, interpret=interpret) for w in windows
    ]

    def attend(q, k, v, layer: LayerInfo, cache):
        which = jnp.asarray(of_layer)[layer.index]
        return jax.lax.switch(which, branches, q, k, v), cache

    return attend


def _splash(q, k, v, *, config: ModelConfig, window: int | None, interpret: bool):
    """q [B, T, H, D], k and v [B, T, K, D] -> [B, T, H, D]."""
    T, H = q.shape[1:3]
    if window is None or window >= T:
        one = splash_attention_mask.CausalMask((T, T))
    else:
        one = splash_attention_mask.LocalMask((T, T), window_size=(window - 1, 0), offset=0)
    block = next(b for b in (BLOCK, 256, LANES) if T % b == 0)
    kernel = splash_attention_kernel.make_splash_mha(
        mask=splash_attention_mask.MultiHeadMask([one] * H),
        block_sizes=splash_attention_kernel.BlockSizes(
            block_q=block, block_kv=block, block_kv_compute=block
        ),
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=config.attention_soft_cap,
        interpret=interpret,
    )
    heads_first = [jnp.swapaxes(x, 1, 2) for x in (q, k, v)]
    heads_first[0] = heads_first[0] * jnp.asarray(config.attention_scale, q.dtype)
    return jnp.swapaxes(jax.vmap(kernel)(*heads_first), 1, 2).astype(q.dtype)
