"""The losses: the listwise family around ADPO, and the policy gradients to compare with.

There are two ways in. `adpo_loss`, `grpo_loss` and their like are pure functions over a flat batch
(`flat`), for people with a training loop of their own. The algorithms `Adpo`, `Grpo` and their like
(`algorithm`) lie underneath, and the update calls their pieces. docs/losses.md has them side by
side.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from adpo_jax.losses.adpo import Adpo, Lpo, Tpo, adaptive_tau, target_distribution
from adpo_jax.losses.algorithm import Algorithm, Metric
from adpo_jax.losses.flat import LossFunction, loss_function
from adpo_jax.losses.grpo import Dapo, DrGrpo, Grpo, ReinforcePp
from adpo_jax.losses.opd import Opd
from adpo_jax.losses.ratios import Cispo, Dppo, Gmpo, Gspo, Sapo
from adpo_jax.losses.rloo import Rloo
from adpo_jax.losses.tokens import PaddedTokens, Tokens

# The algorithms of the trainer, by the name that `algorithm.adv_estimator` gives.
ALGORITHMS: dict[str, type[Algorithm]] = {
    algorithm.name: algorithm
    for algorithm in (
        Adpo,
        Tpo,
        Lpo,
        Grpo,
        Dapo,
        DrGrpo,
        Gspo,
        Gmpo,
        Cispo,
        Sapo,
        Dppo,
        ReinforcePp,
        Rloo,
        Opd,
    )
}


def make_algorithm(name: str, values: Mapping[str, Any]) -> Algorithm:
    """The algorithm of this name.

    Args:
      values: values by the names of parameters. A name that is no parameter of the algorithm and a
        value None have no effect.

    Raises:
      ValueError: for a value that cannot work.
    """
    kind = ALGORITHMS[name]
    own = {field.name for field in dataclasses.fields(kind)}
    return kind(**{k: v for k, v in values.items() if k in own and v is not None})


adpo_loss = loss_function(Adpo)
tpo_loss = loss_function(Tpo)
lpo_loss = loss_function(Lpo)
grpo_loss = loss_function(Grpo)
dapo_loss = loss_function(Dapo)
dr_grpo_loss = loss_function(DrGrpo)
gspo_loss = loss_function(Gspo)
gmpo_loss = loss_function(Gmpo)
cispo_loss = loss_function(Cispo)
sapo_loss = loss_function(Sapo)
dppo_loss = loss_function(Dppo)
reinforce_pp_loss = loss_function(ReinforcePp)
rloo_loss = loss_function(Rloo)
opd_loss = loss_function(Opd)

__all__ = [
    "ALGORITHMS",
    "Adpo",
    "Algorithm",
    "Cispo",
    "Dapo",
    "Dppo",
    "DrGrpo",
    "Gmpo",
    "Grpo",
    "Gspo",
    "LossFunction",
    "Lpo",
    "Metric",
    "Opd",
    "PaddedTokens",
    "ReinforcePp",
    "Rloo",
    "Sapo",
    "Tokens",
    "Tpo",
    "adaptive_tau",
    "adpo_loss",
    "cispo_loss",
    "dapo_loss",
    "dppo_loss",
    "dr_grpo_loss",
    "gmpo_loss",
    "grpo_loss",
    "gspo_loss",
    "loss_function",
    "lpo_loss",
    "make_algorithm",
    "opd_loss",
    "reinforce_pp_loss",
    "rloo_loss",
    "sapo_loss",
    "target_distribution",
    "tpo_loss",
]
