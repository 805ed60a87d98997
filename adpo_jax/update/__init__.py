"""The update: packing, the optimizer step, an iteration's learning, anchors."""

from adpo_jax.update.state import TrainState, abstract_state, init_state
from adpo_jax.update.step import (
    METRICS,
    MIXTURE_METRICS,
    SKIPPED,
    averaged_metrics,
    make_log_probs,
    make_update,
)

__all__ = [
    "METRICS",
    "MIXTURE_METRICS",
    "SKIPPED",
    "TrainState",
    "abstract_state",
    "averaged_metrics",
    "init_state",
    "make_log_probs",
    "make_update",
]
