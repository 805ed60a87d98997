"""The rollout engine: JetStream's verbs over slots, one batching loop, keys and values, kernels."""

from adpo_jax.engine.engine import Engine
from adpo_jax.engine.generation import FinishedGroup

__all__ = ["Engine", "FinishedGroup"]
