"""Other uses of the ratio to the policy that sampled: one a completion, soft, masked or weighing.

Letters: P prompts, G completions of a prompt.
"""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from adpo_jax.losses import shared
from adpo_jax.losses.algorithm import Metric, Prepared
from adpo_jax.losses.grpo import Clipped
from adpo_jax.losses.parameters import parameter, with_default
from adpo_jax.losses.policy_gradient import GroupRelative, PolicyGradient
from adpo_jax.losses.tokens import Tokens

# Keeps the logarithm of the probability of all other tokens finite; the value is verl's.
_TINY = 1e-8


@dataclass(frozen=True)
class Gspo(GroupRelative, Clipped):
    """Group Sequence Policy Optimization: the clipped surrogate with one ratio a completion.

        r_i = exp(mean over the tokens of completion i of log_prob - anchor_log_prob)
        objective = mean over completions of -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A)

    Each token has the value r_i, and a gradient through its own log-prob alone, so that the other
    aggregations and weights for the sampler have a meaning too.

    Source: Zheng et al. 2025, "Group Sequence Policy Optimization", arXiv 2507.18071.
    """

    name: ClassVar[str] = "gspo"

    clip_low: float = with_default(Clipped, "clip_low", 3e-4)
    clip_high: float = with_default(Clipped, "clip_high", 4e-4)
    loss_aggregation: str = with_default(PolicyGradient, "loss_aggregation", "sequence-mean")

    def gain(self, log_ratio, advantages, tokens: Tokens, log_probs):
        """The clipped surrogate; arguments as of `PolicyGradient.gain`."""
        fixed = jax.lax.stop_gradient(log_ratio)
        mean = tokens.spread(tokens.sum(fixed) / shared.lengths(tokens))
        return super().gain(mean + (log_ratio - fixed), advantages, tokens, log_probs)


@dataclass(frozen=True)
class Gmpo(GroupRelative):
    """Geometric-Mean Policy Optimization: the geometric mean of a completion's clipped ratios.

        d = log_prob - anchor_log_prob per token
        c = min(d, clip_high) where A > 0, max(d, -clip_low) where A < 0
        objective = mean over completions of -A exp(mean over its tokens of c)

    Source: Zhao et al. 2025, "Geometric-Mean Policy Optimization", arXiv 2507.20673.
    """

    name: ClassVar[str] = "gmpo"

    clip_low: float = parameter(0.4, "log-ratios are clipped at -clip_low", above=0.0)
    clip_high: float = parameter(0.4, "log-ratios are clipped at clip_high", above=0.0)
    loss_aggregation: str = parameter(
        "sequence-mean",
        "the mean over completions",
        choices=("sequence-mean",),
    )

    def objective(self, log_ratio, tokens: Tokens, prepared: Prepared, log_probs):
        """The mean over completions; arguments as of `Algorithm.objective`."""
        A_PG, weights = prepared.scores.advantages_PG, prepared.weights
        advantages = tokens.spread(A_PG)
        rising = jnp.minimum(log_ratio, self.clip_high)
        falling = jnp.maximum(log_ratio, -self.clip_low)
        clipped = jnp.where(advantages > 0, rising, falling)
        mean_PG = tokens.sum(clipped) / shared.lengths(tokens)
        gain_P = (A_PG * shared.ratio(mean_PG)).mean(-1)
        is_clipped = (clipped != log_ratio) & (advantages != 0)
        clipped_P = tokens.sum(is_clipped.astype(clipped.dtype)).sum(-1)
        clip_frac = (weights.token_P * clipped_P).sum()
        return -(weights.kept_group_P * gain_P).sum(), {"clip_frac": clip_frac}


@dataclass(frozen=True)
class Cispo(GroupRelative):
    """Clipped importance sampling: a clipped ratio weighs each token, and none is left out.

        objective = mean of -stop_gradient(clip(r, 1 - clip_low, 1 + clip_high)) A log_prob

    The value has log_prob - anchor_log_prob in place of log_prob, which has the same gradient.

    Source: MiniMax 2025, "MiniMax-M1", arXiv 2506.13585, which clips from above alone.
    """

    name: ClassVar[str] = "cispo"

    clip_low: float = parameter(
        1.0, "weights are at least 1 - clip_low; 1 for no floor", above=0.0, most=1.0
    )
    clip_high: float = parameter(4.0, "weights are at most 1 + clip_high", above=0.0)

    def gain(self, log_ratio, advantages, tokens: Tokens, log_probs):
        """The weighted log-ratio; arguments as of `PolicyGradient.gain`."""
        ratio = shared.ratio(jax.lax.stop_gradient(log_ratio))
        weight = jnp.clip(ratio, 1.0 - self.clip_low, 1.0 + self.clip_high)
        return weight * advantages * log_ratio, weight != ratio


@dataclass(frozen=True)
class Sapo(GroupRelative):
    """Soft Adaptive Policy Optimization: a soft gate on the ratio in place of a clip.

        gain = 4 / tau * sigmoid(tau (r - 1)) A,   tau = tau_pos where A > 0, else tau_neg

    Source: Gao et al. 2025, "Soft Adaptive Policy Optimization", arXiv 2511.20347.
    """

    name: ClassVar[str] = "sapo"
    own_metrics: ClassVar[tuple[Metric, ...]] = (
        Metric(
            "loss",
            "kept tokens",
            "the gated surrogate alone; unless loss_aggregation is token-mean a mean over groups",
        ),
        Metric("clip_frac", "tokens", "of tokens whose gate lets less than half through", "share"),
    )

    tau_pos: float = parameter(
        1.0, "sharpness of the gate where the advantage is above 0", above=0.0
    )
    tau_neg: float = parameter(
        1.05, "sharpness of the gate where the advantage is not above 0", above=0.0
    )
    loss_aggregation: str = with_default(PolicyGradient, "loss_aggregation", "sequence-mean")

    def gain(self, log_ratio, advantages, tokens: Tokens, log_probs):
        """The gated surrogate; arguments as of `PolicyGradient.gain`."""
        tau = jnp.where(advantages > 0, self.tau_pos, self.tau_neg).astype(log_ratio.dtype)
        open_ = jax.nn.sigmoid(tau * (shared.ratio(log_ratio) - 1.0))
        # The gradient is let through by 4 s (1 - s), 1 at r = 1.
        return 4.0 / tau * open_ * advantages, 4.0 * open_ * (1.0 - open_) < 0.5


@dataclass(frozen=True)
class Dppo(GroupRelative):
    """Divergence PPO: tokens whose probability has moved too far from the sampler's are left out.

        objective = mean of -m stop_gradient(min(r, ratio_cap)) A log_prob
        m = 0 where p has risen (A > 0) or fallen (A < 0) so far that D(p_anchor, p) > its clip
        D = |p - p_anchor|, or the KL between coins that fall on the token with p_anchor and p

    The value has log_prob - anchor_log_prob in place of log_prob, which has the same gradient.

    Source: Qi et al. 2026, arXiv 2602.04879.
    """

    name: ClassVar[str] = "dppo"
    reads_absolute_log_probs: ClassVar[bool] = True

    clip_low: float = parameter(0.2, "divergence of tokens that have become rarer", above=0.0)
    clip_high: float = parameter(0.2, "divergence of tokens that have become likelier", above=0.0)
    mask_divergence: str = parameter(
        "tv", "total variation, or KL(anchor || policy), of a token", choices=("tv", "kl")
    )
    ratio_cap: float = parameter(20.0, "the largest ratio", above=1.0)

    def gain(self, log_ratio, advantages, tokens: Tokens, log_probs):
        """The masked log-ratio; arguments as of `PolicyGradient.gain`."""
        fixed = jax.lax.stop_gradient(log_ratio)
        old = shared.at_trained(log_probs["anchor"], tokens.trained)
        new = old + fixed
        p, p_old = jnp.exp(new), jnp.exp(old)
        if self.mask_divergence == "tv":
            apart = jnp.abs(p - p_old)
        else:
            rest = jnp.log((1.0 - p_old + _TINY) / (1.0 - p + _TINY))
            apart = -p_old * fixed + (1.0 - p_old) * rest
        risen = (p > p_old) & (apart > self.clip_high)
        fallen = (p < p_old) & (apart > self.clip_low)
        is_masked = jnp.where(advantages > 0, risen, fallen)
        weight = jnp.minimum(shared.ratio(fixed), self.ratio_cap)
        return jnp.where(is_masked, 0.0, weight * advantages * log_ratio), is_masked
