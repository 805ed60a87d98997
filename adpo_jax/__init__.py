"""ADPO (Anchored Direct Preference Optimization, arXiv 2510.18913) for language models in JAX.

The public names below are imported on first use, so that a process that needs one of them (a
grading worker, say) does not pay for the others.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from adpo_jax import pretrained as pretrained
    from adpo_jax.data import arithmetic as arithmetic
    from adpo_jax.engine import Engine as Engine
    from adpo_jax.engine.continuous import ContinuousBatch as ContinuousBatch
    from adpo_jax.engine.sampling import SamplingParams as SamplingParams
    from adpo_jax.losses import Adpo as Adpo
    from adpo_jax.losses import Grpo as Grpo
    from adpo_jax.losses import Rloo as Rloo
    from adpo_jax.losses import adaptive_tau as adaptive_tau
    from adpo_jax.losses import adpo_loss as adpo_loss
    from adpo_jax.losses import cispo_loss as cispo_loss
    from adpo_jax.losses import dapo_loss as dapo_loss
    from adpo_jax.losses import dppo_loss as dppo_loss
    from adpo_jax.losses import dr_grpo_loss as dr_grpo_loss
    from adpo_jax.losses import gmpo_loss as gmpo_loss
    from adpo_jax.losses import grpo_loss as grpo_loss
    from adpo_jax.losses import gspo_loss as gspo_loss
    from adpo_jax.losses import lpo_loss as lpo_loss
    from adpo_jax.losses import opd_loss as opd_loss
    from adpo_jax.losses import reinforce_pp_loss as reinforce_pp_loss
    from adpo_jax.losses import rloo_loss as rloo_loss
    from adpo_jax.losses import sapo_loss as sapo_loss
    from adpo_jax.losses import target_distribution as target_distribution
    from adpo_jax.losses import tpo_loss as tpo_loss
    from adpo_jax.model.lora import Lora as Lora
    from adpo_jax.policy import Policy as Policy
    from adpo_jax.records import Batch as Batch
    from adpo_jax.records import Completion as Completion
    from adpo_jax.records import Completions as Completions
    from adpo_jax.records import make_batch as make_batch
    from adpo_jax.rewards import RewardFunction as RewardFunction
    from adpo_jax.rewards import RewardModel as RewardModel
    from adpo_jax.rewards import good_accuracy as good_accuracy
    from adpo_jax.train import train as train
    from adpo_jax.update import TrainState as TrainState
    from adpo_jax.update import init_state as init_state
    from adpo_jax.update import make_update as make_update
    from adpo_jax.update.packing import pack as pack

    __version__: str

# Where each public name is defined.
_HOMES = {
    "Adpo": "losses",
    "Batch": "records",
    "Completion": "records",
    "Completions": "records",
    "ContinuousBatch": "engine.continuous",
    "Engine": "engine",
    "Grpo": "losses",
    "Lora": "model.lora",
    "Policy": "policy",
    "RewardFunction": "rewards",
    "RewardModel": "rewards",
    "Rloo": "losses",
    "SamplingParams": "engine.sampling",
    "TrainState": "update",
    "adaptive_tau": "losses",
    "adpo_loss": "losses",
    "cispo_loss": "losses",
    "dapo_loss": "losses",
    "dppo_loss": "losses",
    "dr_grpo_loss": "losses",
    "gmpo_loss": "losses",
    "good_accuracy": "rewards",
    "grpo_loss": "losses",
    "gspo_loss": "losses",
    "init_state": "update",
    "lpo_loss": "losses",
    "opd_loss": "losses",
    "make_batch": "records",
    "make_update": "update",
    "pack": "update.packing",
    "reinforce_pp_loss": "losses",
    "rloo_loss": "losses",
    "sapo_loss": "losses",
    "target_distribution": "losses",
    "tpo_loss": "losses",
}
# Public names that are modules; `train` can be called.
_MODULES = {"arithmetic": "data.arithmetic", "pretrained": "pretrained", "train": "train"}

__all__ = sorted([*_HOMES, *_MODULES, "__version__"])


def __getattr__(name: str):
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("adpo-jax")
        except PackageNotFoundError:  # a clone that was never installed
            return "0+unknown"
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{_MODULES[name]}")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__():
    return __all__
