"""Embeddings of tokens: those of the model, and those that some models have for each layer.

Letters: B batch, T tokens, D model width, V vocabulary, L layers, P width of a layer's own.
"""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from adpo_jax.devices.sharding import (
    constrain,
    mesh_axis_size,
    names_of,
    partition_spec,
    rule,
    shard_map,
)
from adpo_jax.model import parameters
from adpo_jax.model.layers import project, rms_norm
from adpo_jax.model.model_config import ModelConfig


@jax.named_scope("embed")
def embed_tokens(
    config: ModelConfig, embed: jax.Array, tokens: jax.Array, dtype, mesh: Mesh | None
) -> jax.Array:
    """Embeddings [B, T, D] of tokens [B, T]."""
    x = lookup(embed, tokens, dtype, mesh)
    if config.embed_multiplier != 1.0:
        x = (x.astype(jnp.float32) * config.embed_multiplier).astype(dtype)
    return x * jnp.asarray(config.hidden_size**0.5, dtype) if config.embed_scale else x


@jax.named_scope("embed")
def per_layer_inputs(
    config: ModelConfig, params, tokens: jax.Array, x: jax.Array, mesh: Mesh | None
) -> jax.Array:
    """The embeddings of tokens for each layer, [L, B, T, P].

    Half of them is looked up, the other half is made of the embeddings of the model.

    Args:
      tokens: [B, T] int32.
      x: [B, T, D], their embeddings.
    """
    L, P = config.num_layers, config.per_layer_size
    table = params["per_layer_embed"]
    looked_up = lookup(table, tokens, x.dtype, mesh) * jnp.asarray(P**0.5, x.dtype)
    made = project(x, params["per_layer_context"]) * jnp.asarray(config.hidden_size**-0.5, x.dtype)
    made, looked_up = (y.reshape(*tokens.shape, L, P) for y in (made, looked_up))
    made = rms_norm(made, params["per_layer_norm"], config.norm_eps, config.norm_plus_one)
    both = jnp.moveaxis((made + looked_up) * jnp.asarray(0.5**0.5, x.dtype), 2, 0)
    return constrain(both, mesh, None, "batch", "length", None)


def lookup(table: jax.Array, tokens: jax.Array, dtype, mesh: Mesh | None) -> jax.Array:
    """The rows [B, T, D] of a table [V, D], split as that of the embeddings is."""
    if mesh is not None and mesh.size > 1:
        return _split_lookup(table, tokens, dtype, mesh)
    return jnp.take(table, tokens, axis=0).astype(dtype)


def _split_lookup(embed: jax.Array, tokens: jax.Array, dtype, mesh: Mesh) -> jax.Array:
    """Rows of a table that is split over the mesh, found without gathering it or its gradient.

    Devices that split the width look each other's tokens up in their parts of the table, and the
    parts of the result change places, so that no more than the result moves. (The partitioner would
    gather the table, and sum its gradient whole on every device: 2.5 GB each for 152k tokens of
    width 4096.) Rows are cast after they are found, so that the gradient of a frequent token is
    summed in the table's dtype: in bfloat16, 4,096 times 0.01 would come to 4.
    """
    B, T = tokens.shape
    vocab, width = partition_spec(mesh, parameters.at(("embed",)).logical_axes, embed.shape)
    spec = PartitionSpec(rule(mesh, "batch"), rule(mesh, "length"))
    if any(size % mesh_axis_size(mesh, axes) for size, axes in zip((B, T), spec)):
        return jnp.take(constrain(embed, mesh, None, None), tokens, axis=0).astype(dtype)
    # For each mesh axis that splits the width, the axis of the tokens that it splits too.
    axes = [(name, 0 if name in names_of(spec[0]) else 1) for name in names_of(width)]

    def rows_of_part(embed, tokens):
        for name, axis in axes:
            tokens = jax.lax.all_gather(tokens, name, axis=axis, tiled=True)
        if vocab is None:
            x = jnp.take(embed, tokens, axis=0).astype(dtype)
        else:
            local = tokens - jax.lax.axis_index(vocab) * embed.shape[0]
            here = (local >= 0) & (local < embed.shape[0])
            x = jnp.take(embed, jnp.where(here, local, 0), axis=0).astype(dtype)
            x = jax.lax.psum(jnp.where(here[..., None], x, jnp.zeros((), dtype)), vocab)
        for name, axis in reversed(axes):
            x = jax.lax.all_to_all(x, name, split_axis=axis, concat_axis=2, tiled=True)
        return x

    return shard_map(rows_of_part, mesh, (PartitionSpec(vocab, width), spec), spec, check_vma=True)(
        embed, tokens
    )
