"""The loss of the supervised stage. It is no algorithm of the table, since it has no rewards."""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from adpo_jax.losses.algorithm import Metric
from adpo_jax.losses.tokens import Tokens


@dataclass(frozen=True)
class Imitation:
    """The mean negative log-prob of a completion token in nats.

    It has those attributes of an `Algorithm` that an update uses. Groups have one completion, and
    there is neither an anchor nor a teacher.
    """

    name: ClassVar[str] = "sft"
    needs: ClassVar[frozenset[str]] = frozenset()
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("sft/loss", "tokens", "mean negative log-prob of a completion token, nats"),
    )
    loss_metric: ClassVar[str] = "sft/loss"
    anchor_kl_metric: ClassVar[None] = None
    teacher_beta: ClassVar[None] = None
    entropy_bonus: ClassVar[float] = 0.0
    slope_is_known: ClassVar[bool] = True

    def normalise(self, scores: None, tokens: Tokens) -> jax.Array:
        """1 / the number of trained tokens of an optimizer step."""
        return 1.0 / jnp.maximum(jnp.sum(tokens.trained, dtype=jnp.float32), 1.0)

    def loss(self, log_probs, tokens: Tokens, per_token: jax.Array, *, entropy: None = None):
        """(loss, metrics) of some rows, from the policy's own log-probs alone."""
        log_probs = jnp.where(tokens.trained, log_probs["policy"], 0.0)
        loss = -per_token * jnp.sum(log_probs)
        return loss, {"sft/loss": loss}
