"""GRPO, the baseline: the pieces of its loss, as `losses.Adpo` has them.

Letters: P prompts, G completions of a prompt, T tokens.

Source: Shao et al. 2024, "DeepSeekMath", arXiv 2402.03300.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from adpo_jax import groups
from adpo_jax.groups import Metrics, Weights

# Added to the standard deviation that rewards are divided by: verl's; TRL adds 1e-4.
_EPS = 1e-6


class GrpoScores(NamedTuple):
    """What the rewards decide in GRPO."""

    advantages_PG: jax.Array
    kept_P: jax.Array  # bool
    spread_P: jax.Array  # bool


class GrpoPrepared(NamedTuple):
    """`GrpoScores` and the normalisers: all that `Grpo.loss` needs besides log-probabilities."""

    scores: GrpoScores
    weights: Weights
    token_weight_PG: jax.Array  # what one token of this completion weighs in the loss


@dataclass(frozen=True)
class Grpo:
    """Group Relative Policy Optimization: the clipped surrogate over group-standardised rewards.

        A_i = (R_i - group mean) / (std + 1e-6),   r = exp(log_prob - anchor_log_prob) per token
        loss = mean of -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) + beta_anchor_kl * k3

    The anchor stands for the policy that sampled, so the anchor to train with is the on-policy one;
    the k3 penalty is to the same anchor.

    Parameters:
      clip_low, clip_high: how far the ratio may fall and rise before the gradient stops, > 0.
      beta_anchor_kl: coefficient of the k3 penalty, >= 0.
      scale_rewards: divide by the "group" or "batch" standard deviation (ddof=1), or "none".
      loss_aggregation: "token-mean" over all tokens of the batch, or "sequence-mean", the mean over
        completions of the mean over their tokens (as in DeepSeekMath).
      drop_all_failed_prompts, min_reward_std: as in `Adpo`.

    Raises ValueError for a parameter that cannot work.
    """

    clip_low: float = 0.2
    clip_high: float = 0.2
    beta_anchor_kl: float = 0.0
    scale_rewards: str = "group"
    loss_aggregation: str = "token-mean"
    drop_all_failed_prompts: bool = False
    min_reward_std: float = 0.0

    def __post_init__(self):
        groups.check_number("clip_low", self.clip_low, above=0.0)
        groups.check_number("clip_high", self.clip_high, above=0.0)
        if self.clip_low > 1.0:
            raise ValueError(f"clip_low must be at most 1, got {self.clip_low}")
        groups.check_number("beta_anchor_kl", self.beta_anchor_kl, least=0.0)
        groups.check_number("min_reward_std", self.min_reward_std, least=0.0)
        groups.check_choice("scale_rewards", self.scale_rewards, ("group", "batch", "none"))
        groups.check_choice(
            "loss_aggregation", self.loss_aggregation, ("token-mean", "sequence-mean")
        )

    def score(self, rewards_PG: jax.Array) -> GrpoScores:
        """Advantages from the rewards, [P, G], of the whole iteration."""
        rewards_PG = groups.as_groups(rewards_PG)
        advantages_PG, spread_P = groups.scale_rewards(
            rewards_PG, self.scale_rewards, self.min_reward_std, _EPS
        )
        kept_P = groups.kept_prompts(rewards_PG, self.drop_all_failed_prompts)
        return jax.lax.stop_gradient(GrpoScores(advantages_PG, kept_P, spread_P))

    def normalise(self, scores: GrpoScores, mask_PGT: jax.Array) -> GrpoPrepared:
        """Fold in the normalisers of the batch of one optimizer step, [P, G, T] its mask."""
        shape = scores.advantages_PG.shape
        groups.check_mask(mask_PGT, shape)
        weights = groups.batch_weights(scores.kept_P, mask_PGT)
        if self.loss_aggregation == "token-mean":
            token_weight_PG = jnp.broadcast_to(weights.kept_token_P[:, None], shape)
        else:
            token_weight_PG = weights.kept_group_P[:, None] / (shape[1] * groups.lengths(mask_PGT))
        return GrpoPrepared(scores, weights, token_weight_PG)

    def prepare(self, rewards_PG: jax.Array, mask_PGT: jax.Array) -> GrpoPrepared:
        """`score` and `normalise` at once, where the iteration is one optimizer step."""
        return self.normalise(self.score(rewards_PG), mask_PGT)

    def loss(
        self,
        log_probs_PGT: jax.Array,
        anchor_log_probs_PGT: jax.Array,
        mask_PGT: jax.Array,
        prepared: GrpoPrepared,
    ) -> tuple[jax.Array, Metrics]:
        """The loss of a micro-batch: sums over its completions. Arguments as in `Adpo.loss`."""
        scores, weights, token_weight_PG = prepared
        log_ratio_PGT = groups.log_ratios(log_probs_PGT, anchor_log_probs_PGT, mask_PGT)
        ratio_PGT = 1.0 + groups.expm1(log_ratio_PGT)
        clipped_PGT = jnp.clip(ratio_PGT, 1.0 - self.clip_low, 1.0 + self.clip_high)
        advantages_PG1 = scores.advantages_PG[..., None]
        surrogate_PGT = jnp.minimum(ratio_PGT * advantages_PG1, clipped_PGT * advantages_PG1)
        is_clipped_PGT = clipped_PGT * advantages_PG1 < ratio_PGT * advantages_PG1
        k3_PGT = groups.k3(log_ratio_PGT)
        surrogate_PG = jnp.where(mask_PGT.astype(bool), surrogate_PGT, 0.0).sum(-1)
        kl_penalty = (token_weight_PG * k3_PGT.sum(-1)).sum()

        loss = surrogate_loss = -(token_weight_PG * surrogate_PG).sum()
        if self.beta_anchor_kl:
            loss = loss + self.beta_anchor_kl * kl_penalty
        metrics = {
            "grpo/loss": surrogate_loss,
            # A masked token has ratio 1, so it is never counted as clipped.
            "grpo/clip_frac": (
                weights.token_P * is_clipped_PGT.sum((1, 2), dtype=weights.token_P.dtype)
            ).sum(),
            "grpo/kl_penalty": kl_penalty,
            **groups.shared_metrics(
                "grpo", log_ratio_PGT.sum(-1), k3_PGT.sum((1, 2)), scores, weights
            ),
        }
        return loss, metrics
