"""ADPO (Anchored Direct Preference Optimization, arXiv 2510.18913) for language models in JAX.

The public names below are imported on first use, so that a process which needs one of them (a
grading worker, say) does not pay for the others.
"""

import importlib

_HOMES = {
    "adpo_loss": "losses",
    "grpo_loss": "losses",
    "rloo_loss": "losses",
    "target_distribution": "losses",
    "adaptive_tau": "losses",
    "good_accuracy": "rewards",
    "Policy": "policy",
    "Engine": "engine",
    "SamplingParams": "sampling",
    "ContinuousBatch": "continuous",
    "Adpo": "losses",
    "Grpo": "losses",
    "Rloo": "losses",
    "Batch": "update",
    "TrainState": "update",
    "init_state": "update",
    "make_update": "update",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__():
    return __all__
