"""REINFORCE leave-one-out, a baseline: the pieces of its loss, as `losses.Adpo` has them.

Letters: P prompts, G completions of a prompt, T tokens.

Source: Ahmadian et al. 2024, "Back to Basics", arXiv 2402.14740, section 3.2, after Kool, van Hoof
and Welling 2019, "Buy 4 REINFORCE Samples, Get a Baseline for Free!".
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax

from adpo_jax import groups
from adpo_jax.groups import Metrics, Weights


class RlooScores(NamedTuple):
    """What the rewards decide in RLOO."""

    advantages_PG: jax.Array
    kept_P: jax.Array  # bool
    spread_P: jax.Array  # bool


class RlooPrepared(NamedTuple):
    """`RlooScores` and the normalisers: all that `Rloo.loss` needs besides log-probabilities."""

    scores: RlooScores
    weights: Weights


@dataclass(frozen=True)
class Rloo:
    """REINFORCE with the mean reward of the other completions of the prompt as its baseline.

        A_i = R_i - mean of R_j over j != i  =  G / (G - 1) * (R_i - group mean)
        loss = mean over completions of -A_i (s_i - s_anchor_i) + beta_anchor_kl * k3

    s_i is the log-probability of the whole completion. The anchor shifts the value of the first
    term, 0 on policy, and not its gradient, -A_i grad s_i; it is what the k3 penalty (a mean over
    tokens, as in `Adpo`) measures from. Later optimizer steps on the same completions are not
    corrected for having left the policy that sampled.

    Parameters:
      beta_anchor_kl: coefficient of the k3 penalty, >= 0.
      drop_all_failed_prompts, min_reward_std: as in `Adpo`.

    Raises ValueError for a parameter that cannot work.
    """

    beta_anchor_kl: float = 0.0
    drop_all_failed_prompts: bool = False
    min_reward_std: float = 0.0

    def __post_init__(self):
        groups.check_number("beta_anchor_kl", self.beta_anchor_kl, least=0.0)
        groups.check_number("min_reward_std", self.min_reward_std, least=0.0)

    def score(self, rewards_PG: jax.Array) -> RlooScores:
        """Advantages from the rewards, [P, G], of the whole iteration."""
        rewards_PG = groups.as_groups(rewards_PG)
        G = rewards_PG.shape[1]
        centred_PG, spread_P = groups.scale_rewards(rewards_PG, "none", self.min_reward_std, 0.0)
        kept_P = groups.kept_prompts(rewards_PG, self.drop_all_failed_prompts)
        return jax.lax.stop_gradient(RlooScores(centred_PG * (G / (G - 1)), kept_P, spread_P))

    def normalise(self, scores: RlooScores, mask_PGT: jax.Array) -> RlooPrepared:
        """Fold in the normalisers of the batch of one optimizer step, [P, G, T] its mask."""
        groups.check_mask(mask_PGT, scores.advantages_PG.shape)
        return RlooPrepared(scores, groups.batch_weights(scores.kept_P, mask_PGT))

    def prepare(self, rewards_PG: jax.Array, mask_PGT: jax.Array) -> RlooPrepared:
        """`score` and `normalise` at once, where the iteration is one optimizer step."""
        return self.normalise(self.score(rewards_PG), mask_PGT)

    def loss(
        self,
        log_probs_PGT: jax.Array,
        anchor_log_probs_PGT: jax.Array,
        mask_PGT: jax.Array,
        prepared: RlooPrepared,
    ) -> tuple[jax.Array, Metrics]:
        """The loss of a micro-batch: sums over its completions. Arguments as in `Adpo.loss`."""
        scores, weights = prepared
        log_ratio_PGT = groups.log_ratios(log_probs_PGT, anchor_log_probs_PGT, mask_PGT)
        log_ratio_PG = log_ratio_PGT.sum(-1)
        k3_P = groups.k3(log_ratio_PGT).sum((1, 2))
        kl_penalty = (weights.kept_token_P * k3_P).sum()

        reinforce_P = (scores.advantages_PG * log_ratio_PG).mean(-1)
        loss = reinforce_loss = -(weights.kept_group_P * reinforce_P).sum()
        if self.beta_anchor_kl:
            loss = loss + self.beta_anchor_kl * kl_penalty
        metrics = {
            "rloo/loss": reinforce_loss,
            "rloo/kl_penalty": kl_penalty,
            **groups.shared_metrics("rloo", log_ratio_PG, k3_P, scores, weights),
        }
        return loss, metrics
