"""The rollout engine: JetStream's verbs over slots, one batching loop, keys and values, kernels."""

from adpo_jax.engine.engine import Engine
from adpo_jax.engine.generation import FinishedGroup
from adpo_jax.engine.session import Session, Turn

__all__ = ["Engine", "FinishedGroup", "Session", "Turn"]
