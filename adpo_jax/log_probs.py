"""From hidden states to log-probs of given tokens, without ever holding [B, T, V] logits.

Letters: B batch, T tokens, C tokens of a chunk, D model width, V vocabulary.
"""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from adpo_jax.model import ModelConfig, head_logits
from adpo_jax.sharding import RULES, mesh_axis_size

# Tokens whose logits are alive at once; at V = 151,936 that is 1.2 GB of float32.
TOKENS_PER_CHUNK = 2048


def token_log_probs(
    config: ModelConfig,
    params,
    hidden_BTD: jax.Array,
    targets_BT: jax.Array,
    *,
    temperature: float = 1.0,
    mesh: Mesh | None = None,
    tokens_per_chunk: int = TOKENS_PER_CHUNK,
) -> tuple[jax.Array, jax.Array]:
    """Log-prob of each target under the tempered softmax at its position, and its entropy.

    The head runs over chunks of columns (so that rows stay sharded as they are), and the backward
    pass recomputes each chunk's logits: [B, C, V] is the largest array.

    Args:
      hidden_BTD: hidden states at the positions that predict the targets.
      targets_BT: int32.
      temperature: divides the logits.
      tokens_per_chunk: tokens of a device whose logits are alive at once.

    Returns:
      (log_probs, entropy), each [B, T] float32, in nats.
    """
    B, T, _ = hidden_BTD.shape
    shards = 1 if mesh is None else mesh_axis_size(mesh, RULES["batch"])
    chunk = min(T, max(1, tokens_per_chunk * shards // B))
    num_chunks = -(-T // chunk)
    padding = num_chunks * chunk - T

    def in_chunks(x):
        x = jnp.pad(x, ((0, 0), (0, padding)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(B, num_chunks, chunk, *x.shape[2:]), 1, 0)

    @jax.checkpoint
    def of_chunk(args):
        hidden_BCD, targets_BC = args
        logits = head_logits(config, params, hidden_BCD, mesh) / temperature
        log_z = jax.nn.logsumexp(logits, axis=-1)
        target = jnp.take_along_axis(logits, targets_BC[..., None], axis=-1)[..., 0]
        expected = jnp.sum(jax.nn.softmax(logits, axis=-1) * logits, axis=-1)
        return target - log_z, log_z - expected

    chunked = jax.lax.map(of_chunk, (in_chunks(hidden_BTD), in_chunks(targets_BT)))
    return tuple(jnp.moveaxis(x, 0, 1).reshape(B, -1)[:, :T] for x in chunked)
