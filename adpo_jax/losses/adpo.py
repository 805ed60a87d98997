"""ADPO: a listwise loss over the completions of a prompt.

Letters: P prompts, G completions of a prompt.

Source: Wang 2025, "ADPO: Anchored Direct Preference Optimization", arXiv 2510.18913.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from adpo_jax.losses import shared
from adpo_jax.losses.algorithm import Algorithm, Metric, Prepared, Tokens
from adpo_jax.losses.parameters import parameter, scale_rewards_parameter

# Added to the standard deviation that rewards are divided by; the reference has it so.
_EPS = 1e-8


class AdpoScores(NamedTuple):
    """What the rewards decide in ADPO."""

    q_PG: jax.Array  # target distribution, rows sum to 1
    tau_P: jax.Array  # temperature of the policy's distribution
    kept_P: jax.Array  # bool, False where drop_all_failed_prompts took the prompt out
    spread_P: jax.Array  # bool, False where all rewards of the group count as equal


@dataclass(frozen=True)
class Adpo(Algorithm):
    """Anchored Direct Preference Optimization: a listwise loss over the completions of a prompt.

    With s_i the sum of the token log-probabilities of completion i and z the scaled rewards,

        q = softmax(z / beta_reward),   p = softmax((s - s_anchor) / tau_x)
        objective = mean over groups of -sum_i q_i log p_i

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
            "the listwise term, dropped prompts included; log G on one optimizer step under the "
            "on-policy anchor, whatever is learned",
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
        "whose entropy adapts tau, that of the target distribution or the policy's",
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

    def score(self, rewards_PG: jax.Array, *, entropy_P: jax.Array | None = None) -> AdpoScores:
        """Targets and temperatures from the rewards of the whole iteration."""
        rewards_PG = shared.as_groups(rewards_PG)
        z_PG, spread_P = shared.scale_rewards(
            rewards_PG, self.scale_rewards, self.min_reward_std, _EPS
        )
        q_PG = jax.nn.softmax(z_PG / self.beta_reward, axis=-1)
        tau_P = self._tau(q_PG, entropy_P)
        kept_P = shared.kept_prompts(rewards_PG, self.drop_all_failed_prompts)
        return jax.lax.stop_gradient(AdpoScores(q_PG, tau_P, kept_P, spread_P))

    def objective(self, log_ratio: jax.Array, tokens: Tokens, prepared: Prepared):
        """The cross-entropy between q and p; arguments as of `Algorithm.objective`."""
        scores, weights = prepared
        s_PG = tokens.sum(log_ratio)
        log_p_PG = jax.nn.log_softmax(s_PG * self._inverse_tau(tokens, prepared), axis=-1)
        cross_entropy_P = -(scores.q_PG * log_p_PG).sum(-1)
        metrics = {
            "loss": (weights.group_P * cross_entropy_P).sum(),
            "mean_tau": (weights.group_P * scores.tau_P).sum(),
            "target_entropy": (weights.group_P * shared.entropy(scores.q_PG)).sum(),
        }
        return (weights.kept_group_P * cross_entropy_P).sum(), metrics

    def sequence_weights(
        self, log_ratio_PG: jax.Array, tokens: Tokens, prepared: Prepared
    ) -> jax.Array:
        """dL/ds in closed form: (p - q) / (N tau_x) for each completion, N the kept groups.

        `sum(stop_gradient(weights) * s)` has the gradient of the listwise term however the rows are
        split, so a group need not fit in a micro-batch. (A k3 penalty is a sum over tokens.)

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
