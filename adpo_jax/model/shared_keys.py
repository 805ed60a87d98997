"""Layers that take the keys and values of earlier ones.

The last layers of a model may have none of their own (`ModelConfig.shared_kv_layers`, Gemma 4).

Letters: B batch, T tokens.
"""

import jax.numpy as jnp
from jax.sharding import Mesh

from adpo_jax.devices.sharding import constrain
from adpo_jax.model.attention import Attend, LayerInfo
from adpo_jax.model.model_config import ModelConfig


def sharing_keys(attend: Attend) -> Attend:
    """An attention that keeps keys and values for the layers which have none of their own.

    Its cache is (the cache of `attend`, (keys, values) of the last layer of each kind).
    """

    def attend_and_keep(q, k, v, layer: LayerInfo, cache):
        cache, last = cache
        if layer.writes:
            last = tuple((k, v) if i == layer.store.kind else kv for i, kv in enumerate(last))
        out, cache = attend(q, *last[layer.store.kind], layer, cache)
        return out, (cache, last)

    return attend_and_keep


def no_keys_yet(config: ModelConfig, shape: tuple[int, int], dtype, mesh: Mesh | None):
    """What `sharing_keys` keeps before the first layer of a batch [B, T]."""

    def zeros(heads, head_dim):
        empty = jnp.zeros((*shape, heads, head_dim), dtype)
        return constrain(empty, mesh, "batch", "length", "kv_heads", None)

    return tuple((zeros(*sizes), zeros(*sizes)) for _, *sizes in config.kinds)
