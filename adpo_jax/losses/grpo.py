"""GRPO, a baseline: the clipped surrogate over group-standardised rewards.

Letters: P prompts, G completions of a prompt.

Source: Shao et al. 2024, "DeepSeekMath", arXiv 2402.03300.
"""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from adpo_jax.losses import shared
from adpo_jax.losses.algorithm import Algorithm, Metric, Prepared, Tokens
from adpo_jax.losses.parameters import parameter, scale_rewards_parameter

# Added to the standard deviation that rewards are divided by. The value is verl's; TRL adds 1e-4.
_EPS = 1e-6


@dataclass(frozen=True)
class Grpo(Algorithm):
    """Group Relative Policy Optimization: the clipped surrogate over group-standardised rewards.

        A_i = (R_i - group mean) / (std + 1e-6),   r = exp(log_prob - anchor_log_prob) per token
        objective = mean of -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A)

    The penalties of `Algorithm` are added, averaged like the objective. The ratio compares with the
    policy before the iteration's updates, so the trainer needs the on-policy anchor. The policy to
    stay near is the reference.

    Raises ValueError for a parameter that cannot work.
    """

    name: ClassVar[str] = "grpo"
    on_policy_anchor: ClassVar[bool] = True
    own_metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("loss", "groups", "the clipped surrogate alone"),
        Metric(
            "clip_frac",
            "tokens",
            "of tokens whose gradient the clip stopped",
            unit="share",
            title="Clipped tokens",
        ),
    )

    clip_low: float = parameter(0.2, "ratios are clipped at 1 - clip_low", above=0.0, most=1.0)
    clip_high: float = parameter(0.2, "ratios are clipped at 1 + clip_high", above=0.0)
    scale_rewards: str = scale_rewards_parameter()
    loss_aggregation: str = parameter(
        "token-mean",
        "the mean over all tokens of the batch, or over completions of the mean over their tokens",
        choices=("token-mean", "sequence-mean"),
    )

    def score(
        self, rewards_PG: jax.Array, *, entropy_P: jax.Array | None = None
    ) -> shared.Advantages:
        """Advantages from the rewards, [P, G], of the whole iteration."""
        return self.advantages(rewards_PG, self.scale_rewards, _EPS)

    def objective(self, log_ratio: jax.Array, tokens: Tokens, prepared: Prepared):
        """The clipped surrogate; arguments as of `Algorithm.objective`."""
        scores, weights = prepared
        ratio = 1.0 + shared.expm1(log_ratio)
        clipped = jnp.clip(ratio, 1.0 - self.clip_low, 1.0 + self.clip_high)
        advantages = tokens.spread(scores.advantages_PG)
        surrogate_PG = tokens.sum(jnp.minimum(ratio * advantages, clipped * advantages))
        is_clipped = (clipped * advantages < ratio * advantages).astype(ratio.dtype)
        loss = -(self.token_weights(tokens, prepared) * surrogate_PG).sum()
        clip_frac = (weights.token_P * tokens.sum(is_clipped).sum(-1)).sum()
        return loss, {"clip_frac": clip_frac}

    def token_weights(self, tokens: Tokens, prepared: Prepared) -> jax.Array:
        """The weight of a token of each completion, [P, G], by `loss_aggregation`."""
        if self.loss_aggregation == "token-mean":
            return super().token_weights(tokens, prepared)
        lengths_PG = shared.lengths(tokens)
        return prepared.weights.kept_group_P[:, None] / (lengths_PG.shape[1] * lengths_PG)
