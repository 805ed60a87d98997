"""GRPO and what its critics made of it: DAPO and Dr. GRPO.

Source: Shao et al. 2024, "DeepSeekMath", arXiv 2402.03300.
"""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from adpo_jax.losses import shared
from adpo_jax.losses.parameters import parameter, with_default
from adpo_jax.losses.policy_gradient import GroupRelative, PolicyGradient
from adpo_jax.losses.tokens import Tokens


@dataclass(frozen=True)
class Clipped(PolicyGradient):
    """The clipped surrogate of PPO, with a second clip for tokens of bad completions.

        r = exp(log_prob - anchor_log_prob) per token
        gain = min(r A, clip(r, 1 - clip_low, 1 + clip_high) A)
        gain = max(gain, dual_clip * A)   where A < 0 and dual_clip is set

    Sources: Schulman et al. 2017, "Proximal Policy Optimization Algorithms", arXiv 1707.06347; the
    second clip: Ye et al. 2019, arXiv 1912.09729.
    """

    clip_low: float = parameter(0.2, "ratios are clipped at 1 - clip_low", above=0.0, most=1.0)
    clip_high: float = parameter(0.2, "ratios are clipped at 1 + clip_high", above=0.0)
    dual_clip: float | None = parameter(
        None, "ratios of completions with a negative advantage are clipped here too", above=1.0
    )

    def gain(self, log_ratio, advantages, tokens: Tokens, log_probs):
        """The clipped surrogate; arguments as of `PolicyGradient.gain`."""
        ratio = shared.ratio(log_ratio)
        free = ratio * advantages
        clipped = jnp.clip(ratio, 1.0 - self.clip_low, 1.0 + self.clip_high) * advantages
        gain, is_clipped = jnp.minimum(free, clipped), clipped < free
        if self.dual_clip is None:
            return gain, is_clipped
        floor = self.dual_clip * advantages
        beyond = (advantages < 0) & (gain < floor)
        return jnp.where(beyond, floor, gain), is_clipped | beyond


@dataclass(frozen=True)
class Grpo(GroupRelative, Clipped):
    """Group Relative Policy Optimization: the clipped surrogate over group-standardised rewards.

        A_i = (R_i - group mean) / (std + 1e-6),   r = exp(log_prob - anchor_log_prob) per token
        objective = mean of -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A)

    The penalties of `Algorithm` are added, averaged like the objective. The ratio compares with the
    policy before the iteration's updates, so the trainer needs the on-policy anchor. The policy to
    stay near is the reference.

    Raises ValueError for a parameter that cannot work.
    """

    name: ClassVar[str] = "grpo"


@dataclass(frozen=True)
class Dapo(Grpo):
    """Decoupled clip: GRPO whose ratios may rise further than they may fall.

    The paper's other parts are settings of the trainer: `algorithm.filter_groups` for its dynamic
    sampling, `length_penalty` for its overlong rewards.

    Source: Yu et al. 2025, "DAPO", arXiv 2503.14476.
    """

    name: ClassVar[str] = "dapo"

    clip_high: float = with_default(Clipped, "clip_high", 0.28)


@dataclass(frozen=True)
class DrGrpo(Grpo):
    """GRPO done right: no division by the group's standard deviation or a completion's length.

    Source: Liu et al. 2025, "Understanding R1-Zero-Like Training", arXiv 2503.20783.
    """

    name: ClassVar[str] = "dr_grpo"

    scale_rewards: str = with_default(GroupRelative, "scale_rewards", "none")
    loss_aggregation: str = with_default(PolicyGradient, "loss_aggregation", "constant")


@dataclass(frozen=True)
class ReinforcePp(Clipped):
    """REINFORCE++: the clipped surrogate with advantages standardised over the whole iteration.

        A = R                       baseline "none"
        A = R - group mean          baseline "group"
        A_i = (A_i - mean A) / sqrt(var A + 1e-8),   over all tokens of the iteration

    A group whose rewards count as all equal has its mean reward in place of each.

    Source: Hu 2025, "REINFORCE++", arXiv 2501.03262.
    """

    name: ClassVar[str] = "reinforce_pp"

    baseline: str = parameter(
        "none", "what is taken off a reward before it is standardised", choices=("none", "group")
    )

    def score(
        self,
        rewards_PG: jax.Array,
        *,
        entropy_P: jax.Array | None = None,
        lengths_PG: jax.Array | None = None,
    ) -> shared.Advantages:
        """Advantages from the rewards, [P, G], of the whole iteration."""
        scores = self.advantages(rewards_PG, "none", eps=0.0)
        rewards_PG = shared.as_groups(rewards_PG)
        raw_PG = scores.advantages_PG
        if self.baseline == "none":
            first_PG = rewards_PG[:, :1]
            mean_PG = first_PG + (rewards_PG - first_PG).mean(-1, keepdims=True)
            raw_PG = jnp.where(scores.spread_P[:, None], rewards_PG, mean_PG)
        weights_PG = jnp.ones_like(raw_PG) if lengths_PG is None else lengths_PG
        whitened_PG = shared.whitened(raw_PG, weights_PG)
        return jax.lax.stop_gradient(scores._replace(advantages_PG=whitened_PG))
