"""The listwise losses over the completions of a prompt: ADPO, and its relatives TPO and LPO.

All three fit a distribution over the group to a target made of the rewards. They differ in where
the target starts from: evenly (ADPO) or at the group's probabilities under the policy that sampled.

Letters: P prompts, G completions of a prompt.

Source: Wang 2025, "ADPO: Anchored Direct Preference Optimization", arXiv 2510.18913.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from adpo_jax.losses import shared
from adpo_jax.losses.algorithm import Algorithm, Metric, Prepared
from adpo_jax.losses.parameters import parameter, scale_rewards_parameter, with_default
from adpo_jax.losses.tokens import Tokens

# The log-prob of what has no probability; finite, so that 0 times it is 0.
_IMPOSSIBLE = -1e9
# Added to the standard deviation that rewards are divided by; the reference has it so.
_EPS = 1e-8


class AdpoScores(NamedTuple):
    """What the rewards decide in ADPO."""

    q_PG: jax.Array  # target distribution of anchor_weight 0, rows sum to 1
    logits_PG: jax.Array  # z / beta_reward, whose softmax it is
    tau_P: jax.Array  # temperature of the policy's distribution
    kept_P: jax.Array  # bool, False where drop_all_failed_prompts took the prompt out
    spread_P: jax.Array  # bool, False where all rewards of the group count as equal


@dataclass(frozen=True)
class Adpo(Algorithm):
    """Anchored Direct Preference Optimization: a listwise loss over the completions of a prompt.

    With s_i the sum of the token log-probabilities of completion i and z the scaled rewards,

        q = softmax(z / beta_reward),   p = softmax((s - s_anchor) / tau_x)
        objective = mean over groups of -sum_i q_i log p_i

    `anchor_weight`, w, moves target and policy towards the probabilities of the group under the
    anchor, p_anchor = softmax(s_anchor):

        q = softmax(z / beta_reward + w log p_anchor)
        p = softmax((s - s_anchor) / tau_x + w log p_anchor)

    At w = 0 the anchor's probabilities play no part, which is ADPO. At w = 1 and tau = 1 p is the
    policy's own distribution over the group, which is TPO (`Tpo`). `divergence` "reverse" has
    KL(p || q) in place of the cross-entropy.

    The penalties of `Algorithm` are added, as means over tokens. tau_x is `tau`, or with
    `use_adaptive_tau` a temperature for each prompt: under "target_entropy" it falls with the
    entropy of q (`adaptive_tau`), under "policy_entropy" it rises with the policy's entropy,
    tau * (1 + alpha * Hbar).

    Raises ValueError for a parameter that cannot work.
    """

    name: ClassVar[str] = "adpo"
    own_metrics: ClassVar[tuple[Metric, ...]] = (
        Metric(
            "loss",
            "groups",
            "the listwise term, dropped prompts included; with anchor_weight 0 it is log G on one "
            "optimizer step under the on-policy anchor, whatever is learned",
            unit="nats",
        ),
        Metric("mean_tau", "groups", "the temperature of a prompt", title="Temperature"),
        Metric("target_entropy", "groups", "entropy of the target distribution", unit="nats"),
    )

    tau: float = parameter(0.8, "temperature of the anchored policy distribution", above=0.0)
    beta_reward: float = parameter(0.5, "temperature of the target distribution", above=0.0)
    use_adaptive_tau: bool = parameter(True, "another tau for each prompt")
    adaptive_tau_alpha: float = parameter(
        0.5, "how far tau adapts; 0 for not at all", least=0.0, needs={"use_adaptive_tau": True}
    )
    adaptive_tau_min: float = parameter(
        0.05, "floor of the adapted tau", above=0.0, needs={"use_adaptive_tau": True}
    )
    adaptive_tau_mode: str = parameter(
        "target_entropy",
        "whose entropy adapts tau, that of the target distribution or the policy's (the anchor's, "
        "where anchor.mode is fixed, ema or kl_triggered)",
        choices=("target_entropy", "policy_entropy"),
        needs={"use_adaptive_tau": True},
    )
    adaptive_tau_max: float | None = parameter(
        None,
        "ceiling of the adapted tau; None for no ceiling",
        above=0.0,
        needs={"use_adaptive_tau": True, "adaptive_tau_mode": "policy_entropy"},
    )
    scale_rewards: str = scale_rewards_parameter()
    length_normalize: bool = parameter(
        False, "divide a completion's log-prob by its number of tokens"
    )
    anchor_weight: float = parameter(
        0.0,
        "how much target and policy start from the anchor's probabilities of the group, 0 to 1",
        least=0.0,
        most=1.0,
    )
    divergence: str = parameter(
        "forward",
        "forward is the cross-entropy from target to policy, reverse is KL(policy || target)",
        choices=("forward", "reverse"),
    )
    # Degrees of freedom of the standard deviation that scales rewards.
    reward_ddof: ClassVar[int] = 1

    def __post_init__(self):
        super().__post_init__()
        if self.adaptive_tau_max is not None:
            shared.check_number(
                "adaptive_tau_max", self.adaptive_tau_max, least=self.adaptive_tau_min
            )
            if self.adaptive_tau_mode == "target_entropy":
                raise ValueError(
                    f"adaptive_tau_max={self.adaptive_tau_max} has no effect with "
                    "adaptive_tau_mode='target_entropy', where tau is the ceiling: lower tau or "
                    "set adaptive_tau_max=None"
                )

    @property
    def needs_entropy(self) -> bool:
        return self.use_adaptive_tau and self.adaptive_tau_mode == "policy_entropy"

    @property
    def reads_absolute_log_probs(self) -> bool:
        return bool(self.anchor_weight)

    def score(
        self,
        rewards_PG: jax.Array,
        *,
        entropy_P: jax.Array | None = None,
        lengths_PG: jax.Array | None = None,
    ) -> AdpoScores:
        """Targets and temperatures from the rewards of the whole iteration."""
        rewards_PG = shared.as_groups(rewards_PG)
        z_PG, spread_P = shared.scale_rewards(
            rewards_PG, self.scale_rewards, self.min_reward_std, _EPS, self.reward_ddof
        )
        logits_PG = z_PG / self.beta_reward
        q_PG = jax.nn.softmax(logits_PG, axis=-1)
        tau_P = self._tau(q_PG, entropy_P)
        kept_P = shared.kept_prompts(rewards_PG, self.drop_all_failed_prompts)
        return jax.lax.stop_gradient(AdpoScores(q_PG, logits_PG, tau_P, kept_P, spread_P))

    def objective(
        self,
        log_ratio: jax.Array,
        tokens: Tokens,
        prepared: Prepared,
        log_probs: Mapping[str, jax.Array],
    ):
        """The divergence between q and p; arguments as of `Algorithm.objective`."""
        scores, weights = prepared
        u_PG = tokens.sum(log_ratio) * self._inverse_tau(tokens, prepared)
        q_PG, logits_PG = scores.q_PG, scores.logits_PG
        if self.anchor_weight:
            start_PG = self.anchor_weight * self._log_p_anchor(log_probs["anchor"], tokens)
            u_PG, logits_PG = u_PG + start_PG, logits_PG + start_PG
            q_PG = jax.nn.softmax(logits_PG, axis=-1)
        log_p_PG = jax.nn.log_softmax(u_PG, axis=-1)
        if self.divergence == "forward":
            term_P = -(q_PG * log_p_PG).sum(-1)
        else:
            log_q_PG = jax.nn.log_softmax(logits_PG, axis=-1)
            term_P = (jnp.exp(log_p_PG) * (log_p_PG - log_q_PG)).sum(-1)
        metrics = {
            "loss": (weights.group_P * term_P).sum(),
            "mean_tau": (weights.group_P * scores.tau_P).sum(),
            "target_entropy": (weights.group_P * shared.entropy(q_PG)).sum(),
        }
        return (weights.kept_group_P * term_P).sum(), metrics

    def _log_p_anchor(self, anchor: jax.Array, tokens: Tokens) -> jax.Array:
        """[P, G] log-probs of a group's completions among themselves, under the anchor.

        A completion without a trained token, whose probability is not known, has none: the others
        are compared among themselves. (Its sum would be 0, more than that of any other.)
        """
        s_PG = tokens.sum(shared.at_trained(anchor, tokens.trained))
        if self.length_normalize:
            s_PG = s_PG / shared.lengths(tokens)
        s_PG = jnp.where(shared.lengths(tokens, least=0) > 0, s_PG, _IMPOSSIBLE)
        return jax.nn.log_softmax(s_PG, axis=-1)

    def sequence_weights(
        self, log_ratio_PG: jax.Array, tokens: Tokens, prepared: Prepared
    ) -> jax.Array:
        """dL/ds in closed form: (p - q) / (N tau_x) for each completion, N the kept groups.

        `sum(stop_gradient(weights) * s)` has the gradient of the listwise term however the rows are
        split, so a group need not fit in a micro-batch. (A k3 penalty is a sum over tokens.) This
        is the form for anchor_weight 0 and the forward divergence.

        Args:
          log_ratio_PG: [P, G] s - s_anchor of whole groups, summed over tokens.
          tokens, prepared: as for `objective`, of the same groups.

        Returns:
          [P, G] float32 (float64 under x64), no gradient.
        """
        inverse_tau_PG = self._inverse_tau(tokens, prepared)
        p_PG = jax.nn.softmax(log_ratio_PG * inverse_tau_PG, axis=-1)
        weights_PG = (p_PG - prepared.scores.q_PG) * inverse_tau_PG
        return jax.lax.stop_gradient(weights_PG * prepared.weights.kept_group_P[:, None])

    def _inverse_tau(self, tokens: Tokens, prepared: Prepared) -> jax.Array:
        """[P, G] 1 / tau, divided by the completion's length under length_normalize."""
        inverse_tau_PG = jnp.broadcast_to(
            1.0 / prepared.scores.tau_P[:, None], prepared.scores.q_PG.shape
        )
        return inverse_tau_PG / shared.lengths(tokens) if self.length_normalize else inverse_tau_PG

    def _tau(self, q_PG: jax.Array, entropy_P: jax.Array | None) -> jax.Array:
        if not self.use_adaptive_tau:
            return jnp.full(q_PG.shape[0], self.tau, q_PG.dtype)
        if self.adaptive_tau_mode == "target_entropy":
            return adaptive_tau(
                q_PG,
                tau=self.tau,
                adaptive_tau_alpha=self.adaptive_tau_alpha,
                adaptive_tau_min=self.adaptive_tau_min,
            )
        if entropy_P is None:
            raise ValueError(
                "adaptive_tau_mode='policy_entropy' needs entropy_P, [P]: the mean token "
                "entropy on each prompt over log(vocabulary size)"
            )
        entropy_P = jnp.asarray(entropy_P, q_PG.dtype)
        if entropy_P.shape != q_PG.shape[:1]:
            raise ValueError(
                f"entropy_P must be one number a prompt, shape {q_PG.shape[:1]}, "
                f"got {entropy_P.shape}"
            )
        tau_P = self.tau * (1.0 + self.adaptive_tau_alpha * entropy_P)
        return jnp.clip(tau_P, self.adaptive_tau_min, self.adaptive_tau_max)


@dataclass(frozen=True)
class Tpo(Adpo):
    """Target Policy Optimization: cross-entropy to the sampler's distribution, tilted by rewards.

        q proportional to p_anchor exp(z / beta_reward),   p = softmax(s)
        objective = mean over groups of -sum_i q_i log p_i,   d objective / d s = (p - q) / groups

    z has the population's standard deviation, and beta_reward is the paper's eta.

    Source: Kaddour 2026, "Target Policy Optimization", arXiv 2604.06159.
    """

    name: ClassVar[str] = "tpo"
    reward_ddof: ClassVar[int] = 0

    tau: float = with_default(Adpo, "tau", 1.0)
    beta_reward: float = with_default(Adpo, "beta_reward", 1.0)
    use_adaptive_tau: bool = with_default(Adpo, "use_adaptive_tau", False)
    anchor_weight: float = with_default(Adpo, "anchor_weight", 1.0)


@dataclass(frozen=True)
class Lpo(Adpo):
    """Listwise Policy Optimization: projection onto a target on the simplex of the responses.

        q = argmax over the simplex of sum_i q_i z_i - beta_reward KL(q || p_anchor)
        objective = mean over groups of KL(p || q), or of the cross-entropy; p = softmax(s)

    That the rewards are standardised within the group, and by the standard deviation of a sample,
    is our reading, and so is the reverse divergence as the default: it is what tells LPO from TPO.

    Source: Qu et al. 2026, "Listwise Policy Optimization", arXiv 2605.06139.
    """

    name: ClassVar[str] = "lpo"

    tau: float = with_default(Adpo, "tau", 1.0)
    beta_reward: float = with_default(Adpo, "beta_reward", 1.0)
    use_adaptive_tau: bool = with_default(Adpo, "use_adaptive_tau", False)
    anchor_weight: float = with_default(Adpo, "anchor_weight", 1.0)
    divergence: str = with_default(Adpo, "divergence", "reverse")


def target_distribution(
    rewards: jax.Array,
    *,
    beta_reward: float = 0.5,
    scale_rewards: str = "group",
    min_reward_std: float = 0.0,
) -> jax.Array:
    """The listwise target q over each group, softmax(z / beta_reward); parameters as in `Adpo`.

    Args:
      rewards: [P, G], one a completion.

    Returns:
      [P, G] float32 (float64 under x64), rows sum to 1; uniform where a group's rewards are equal.

    Source: Wang 2025, arXiv 2510.18913, section 3.
    """
    algorithm = Adpo(
        beta_reward=beta_reward, scale_rewards=scale_rewards, min_reward_std=min_reward_std
    )
    return algorithm.score(rewards).q_PG


def adaptive_tau(
    q: jax.Array,
    *,
    tau: float = 0.8,
    adaptive_tau_alpha: float = 0.5,
    adaptive_tau_min: float = 0.05,
) -> jax.Array:
    """The temperature of each group: max(adaptive_tau_min, tau * (1 - alpha * H(q) / log G)).

    H(q) is high where most completions are right, so an easy prompt gets a low (sharp) temperature
    and a hard one a high temperature.

    Args:
      q: [P, G], the target distributions.

    Returns:
      [P] float32 (float64 under x64), no gradient.
    """
    q_PG = jax.lax.stop_gradient(shared.as_groups(q))
    tau_P = tau * (1.0 - adaptive_tau_alpha * shared.entropy(q_PG) / math.log(q_PG.shape[1]))
    return jnp.maximum(adaptive_tau_min, tau_P)
