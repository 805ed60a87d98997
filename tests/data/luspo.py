"""LUSPO: the clipped surrogate with one ratio a completion, worth as much as it has tokens.

Letters: P prompts, G completions of a prompt.

Source: Liu et al. 2026, "Length-Unbiased Sequence Policy Optimization", arXiv 2602.05261.
"""

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp

from adpo_jax.losses import shared
from adpo_jax.losses.algorithm import Algorithm, Metric
from adpo_jax.losses.parameters import parameter, scale_rewards_parameter


@dataclass(frozen=True)
class Luspo(Algorithm):
    """Length-Unbiased Sequence Policy Optimization.

    r_i = exp(mean over the tokens of completion i of log_prob - anchor_log_prob)
    objective = mean over completions of -length min(r A, clip(r, 1 - clip_low, 1 + clip_high) A)
    """

    name: ClassVar[str] = "luspo"
    on_policy_anchor: ClassVar[bool] = True
    own_metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("clip_frac", "groups", "of completions whose gradient the clip stopped", "share"),
    )

    clip_low: float = parameter(3e-4, "ratios are clipped at 1 - clip_low", above=0.0, most=1.0)
    clip_high: float = parameter(4e-4, "ratios are clipped at 1 + clip_high", above=0.0)
    scale_rewards: str = scale_rewards_parameter()

    def score(self, rewards_PG, *, entropy_P=None, lengths_PG=None):
        return self.advantages(rewards_PG, self.scale_rewards, eps=1e-6)

    def objective(self, log_ratio, tokens, prepared, log_probs):
        A_PG, weights = prepared.scores.advantages_PG, prepared.weights
        lengths_PG = shared.lengths(tokens)
        r_PG = shared.ratio(tokens.sum(log_ratio) / lengths_PG)
        clipped_PG = jnp.clip(r_PG, 1.0 - self.clip_low, 1.0 + self.clip_high)
        surrogate_PG = lengths_PG * jnp.minimum(r_PG * A_PG, clipped_PG * A_PG)
        is_clipped_PG = (clipped_PG * A_PG < r_PG * A_PG).astype(r_PG.dtype)
        loss = -(weights.kept_group_P * surrogate_PG.mean(-1)).sum()
        return loss, {"clip_frac": (weights.group_P * is_clipped_PG.mean(-1)).sum()}
