"""The losses: ADPO, and GRPO (`grpo`) and RLOO (`rloo`) as baselines to compare with.

Two ways in. `adpo_loss` and `grpo_loss` are pure functions over a flat batch, for people with their
own training loop. Underneath lie `Adpo`, `Grpo` and `Rloo`, which an update step uses by pieces:

    score      what the rewards alone decide (targets, temperatures, advantages), over the batch of
               the whole iteration
    normalise  the normalisers (1 / kept groups, 1 / kept tokens), over the batch of one optimizer
               step
    loss       a sum over any micro-batch of whole groups; the micro-batches' sums are the loss and
               metrics of the batch, exactly, since every normaliser is already folded in

Everything that `loss` takes has the leading axis P, so a micro-batch is a slice of each leaf.

Letters: B rows (P * G), P prompts, G completions of a prompt, T tokens.

Source: Wang 2025, "ADPO: Anchored Direct Preference Optimization", arXiv 2510.18913.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from adpo_jax import groups
from adpo_jax.groups import Metrics, Weights
from adpo_jax.grpo import Grpo
from adpo_jax.rloo import Rloo

# Added to the standard deviation that rewards are divided by; the reference has it so.
_EPS = 1e-8


class AdpoScores(NamedTuple):
    """What the rewards decide in ADPO."""

    q_PG: jax.Array  # target distribution, rows sum to 1
    tau_P: jax.Array  # temperature of the policy's distribution
    kept_P: jax.Array  # bool, False where drop_all_failed_prompts took the prompt out
    spread_P: jax.Array  # bool, False where all rewards of the group count as equal


class AdpoPrepared(NamedTuple):
    """`AdpoScores` and the normalisers: all that `Adpo.loss` needs besides log-probabilities."""

    scores: AdpoScores
    weights: Weights
    inverse_tau_PG: jax.Array  # 1 / tau, divided by the completion's length under length_normalize


@dataclass(frozen=True)
class Adpo:
    """Anchored Direct Preference Optimization: a listwise loss over the completions of a prompt.

    With s_i the sum of the token log-probabilities of completion i and z the scaled rewards,

        q = softmax(z / beta_reward),   p = softmax((s - s_anchor) / tau_x)
        loss = mean over groups of -sum_i q_i log p_i  +  beta_anchor_kl * mean over tokens of k3
        k3 = exp(d) - d - 1,   d = anchor_log_prob - log_prob

    Parameters:
      tau: temperature of p, > 0. Small: larger first steps, an optimum close to the anchor.
      beta_reward: temperature of q, > 0. Small: all the mass on the best completion.
      use_adaptive_tau: choose tau_x for each prompt, see `adaptive_tau`; otherwise tau_x = tau.
      adaptive_tau_alpha: strength of the adaptation, >= 0.
      adaptive_tau_min: floor of the adapted tau, > 0.
      beta_anchor_kl: coefficient of the k3 penalty, >= 0.
      drop_all_failed_prompts: prompts whose rewards are all <= 0 leave both means.
      scale_rewards: z = reward - group mean, divided by the standard deviation (ddof=1) of the
        "group" or the "batch", or by nothing ("none").
      length_normalize: divide each s by its number of tokens.
      min_reward_std: a group whose reward standard deviation is below it counts as all equal.
      adaptive_tau_mode: "target_entropy": tau_x falls with the entropy of q; "policy_entropy": it
        rises with the policy's entropy, tau * (1 + alpha * Hbar), which `score` is then given.
      adaptive_tau_max: ceiling of tau_x in the mode "policy_entropy"; None for no ceiling.

    Raises ValueError for a parameter that cannot work.
    """

    tau: float = 0.8
    beta_reward: float = 0.5
    use_adaptive_tau: bool = True
    adaptive_tau_alpha: float = 0.5
    adaptive_tau_min: float = 0.05
    beta_anchor_kl: float = 0.0
    drop_all_failed_prompts: bool = False
    scale_rewards: str = "group"
    length_normalize: bool = False
    min_reward_std: float = 0.0
    adaptive_tau_mode: str = "target_entropy"
    adaptive_tau_max: float | None = None

    def __post_init__(self):
        groups.check_number("tau", self.tau, above=0.0)
        groups.check_number("beta_reward", self.beta_reward, above=0.0)
        groups.check_number("adaptive_tau_alpha", self.adaptive_tau_alpha, least=0.0)
        groups.check_number("adaptive_tau_min", self.adaptive_tau_min, above=0.0)
        groups.check_number("beta_anchor_kl", self.beta_anchor_kl, least=0.0)
        groups.check_number("min_reward_std", self.min_reward_std, least=0.0)
        groups.check_choice("scale_rewards", self.scale_rewards, ("group", "batch", "none"))
        groups.check_choice(
            "adaptive_tau_mode", self.adaptive_tau_mode, ("target_entropy", "policy_entropy")
        )
        if self.adaptive_tau_max is not None:
            groups.check_number(
                "adaptive_tau_max", self.adaptive_tau_max, least=self.adaptive_tau_min
            )
            if self.adaptive_tau_mode == "target_entropy":
                raise ValueError(
                    f"adaptive_tau_max={self.adaptive_tau_max} has no effect with "
                    "adaptive_tau_mode='target_entropy', where tau is the ceiling: lower tau or "
                    "set adaptive_tau_max=None"
                )

    def score(
        self, rewards_PG: jax.Array, *, policy_entropy_P: jax.Array | None = None
    ) -> AdpoScores:
        """Targets and temperatures from the rewards of the whole iteration.

        Args:
          rewards_PG: [P, G], one a completion; G >= 2.
          policy_entropy_P: [P] in [0, 1], for adaptive_tau_mode "policy_entropy": the mean token
            entropy of the anchor policy on this prompt over log(vocabulary size).
        """
        rewards_PG = groups.as_groups(rewards_PG)
        z_PG, spread_P = groups.scale_rewards(
            rewards_PG, self.scale_rewards, self.min_reward_std, _EPS
        )
        q_PG = jax.nn.softmax(z_PG / self.beta_reward, axis=-1)
        tau_P = self._tau(q_PG, policy_entropy_P)
        kept_P = groups.kept_prompts(rewards_PG, self.drop_all_failed_prompts)
        return jax.lax.stop_gradient(AdpoScores(q_PG, tau_P, kept_P, spread_P))

    def normalise(self, scores: AdpoScores, mask_PGT: jax.Array) -> AdpoPrepared:
        """Fold in the normalisers of the batch of one optimizer step, [P, G, T] its mask."""
        groups.check_mask(mask_PGT, scores.q_PG.shape)
        inverse_tau_PG = jnp.broadcast_to(1.0 / scores.tau_P[:, None], scores.q_PG.shape)
        if self.length_normalize:
            inverse_tau_PG = inverse_tau_PG / groups.lengths(mask_PGT)
        return AdpoPrepared(scores, groups.batch_weights(scores.kept_P, mask_PGT), inverse_tau_PG)

    def prepare(
        self,
        rewards_PG: jax.Array,
        mask_PGT: jax.Array,
        *,
        policy_entropy_P: jax.Array | None = None,
    ) -> AdpoPrepared:
        """`score` and `normalise` at once, where the iteration is one optimizer step."""
        return self.normalise(self.score(rewards_PG, policy_entropy_P=policy_entropy_P), mask_PGT)

    def loss(
        self,
        log_probs_PGT: jax.Array,
        anchor_log_probs_PGT: jax.Array,
        mask_PGT: jax.Array,
        prepared: AdpoPrepared,
    ) -> tuple[jax.Array, Metrics]:
        """The loss of a micro-batch of whole groups: sums, to be added over the micro-batches.

        Args:
          log_probs_PGT: [P, G, T] any float dtype, per token, anything under the mask.
          anchor_log_probs_PGT: the same under the anchor; no gradient flows into it.
          mask_PGT: [P, G, T] bool or 0/1, the completions' tokens.
          prepared: the rows of `prepare` or `normalise` that belong to these groups.

        Returns:
          Scalar float32 loss (float64 under x64) and a dict of scalars, see `adpo_loss`.
        """
        scores, weights, inverse_tau_PG = prepared
        log_ratio_PGT = groups.log_ratios(log_probs_PGT, anchor_log_probs_PGT, mask_PGT)
        log_ratio_PG = log_ratio_PGT.sum(-1)
        log_p_PG = jax.nn.log_softmax(log_ratio_PG * inverse_tau_PG, axis=-1)
        cross_entropy_P = -(scores.q_PG * log_p_PG).sum(-1)
        k3_P = groups.k3(log_ratio_PGT).sum((1, 2))
        kl_penalty = (weights.kept_token_P * k3_P).sum()

        loss = (weights.kept_group_P * cross_entropy_P).sum()
        if self.beta_anchor_kl:
            loss = loss + self.beta_anchor_kl * kl_penalty
        metrics = {
            "adpo/loss": (weights.group_P * cross_entropy_P).sum(),
            "adpo/mean_tau": (weights.group_P * scores.tau_P).sum(),
            "adpo/target_entropy": (weights.group_P * groups.entropy(scores.q_PG)).sum(),
            "adpo/kl_penalty": kl_penalty,
            **groups.shared_metrics("adpo", log_ratio_PG, k3_P, scores, weights),
        }
        return loss, metrics

    def sequence_weights(self, log_ratio_PG: jax.Array, prepared: AdpoPrepared) -> jax.Array:
        """dL/ds in closed form: (p - q) / (N tau_x) for each completion, N the kept groups.

        `sum(stop_gradient(weights) * s)` has the gradient of the listwise term however the rows are
        split, so a group need not fit in a micro-batch. (The k3 penalty is a sum over tokens.)

        Args:
          log_ratio_PG: [P, G] s - s_anchor, summed over tokens, whole groups.
          prepared: the rows of `prepare` that belong to these groups.

        Returns:
          [P, G] float32 (float64 under x64), no gradient.
        """
        p_PG = jax.nn.softmax(log_ratio_PG * prepared.inverse_tau_PG, axis=-1)
        weights_PG = (p_PG - prepared.scores.q_PG) * prepared.inverse_tau_PG
        return jax.lax.stop_gradient(weights_PG * prepared.weights.kept_group_P[:, None])

    def _tau(self, q_PG: jax.Array, policy_entropy_P: jax.Array | None) -> jax.Array:
        if not self.use_adaptive_tau:
            return jnp.full(q_PG.shape[0], self.tau, q_PG.dtype)
        if self.adaptive_tau_mode == "target_entropy":
            return adaptive_tau(
                q_PG,
                tau=self.tau,
                adaptive_tau_alpha=self.adaptive_tau_alpha,
                adaptive_tau_min=self.adaptive_tau_min,
            )
        if policy_entropy_P is None:
            raise ValueError(
                "adaptive_tau_mode='policy_entropy' needs policy_entropy_P, [P]: the mean token "
                "entropy on each prompt over log(vocabulary size)"
            )
        entropy_P = jnp.asarray(policy_entropy_P, q_PG.dtype)
        if entropy_P.shape != q_PG.shape[:1]:
            raise ValueError(
                f"policy_entropy_P must be one number a prompt, shape {q_PG.shape[:1]}, "
                f"got {entropy_P.shape}"
            )
        tau_P = self.tau * (1.0 + self.adaptive_tau_alpha * entropy_P)
        return jnp.clip(tau_P, self.adaptive_tau_min, self.adaptive_tau_max)


Algorithm = Adpo | Grpo | Rloo


def adpo_loss(
    log_probs: jax.Array,
    anchor_log_probs: jax.Array,
    rewards: jax.Array,
    completion_mask: jax.Array,
    *,
    num_generations: int = 8,
    tau: float = 0.8,
    beta_reward: float = 0.5,
    use_adaptive_tau: bool = True,
    adaptive_tau_alpha: float = 0.5,
    adaptive_tau_min: float = 0.05,
    beta_anchor_kl: float = 0.0,
    drop_all_failed_prompts: bool = False,
    scale_rewards: str = "group",
    length_normalize: bool = False,
    min_reward_std: float = 0.0,
) -> tuple[jax.Array, Metrics]:
    """The ADPO loss of a flat batch; equation and parameters in `Adpo`.

    B = prompts * num_generations, the rows of a prompt adjacent. Rows past the last whole group are
    ignored. Differentiable with respect to `log_probs` alone.

    Args:
      log_probs: [B, T] any float dtype, per token, anything under the mask.
      anchor_log_probs: [B, T], the same under the anchor.
      rewards: [B], one a completion.
      completion_mask: [B, T] bool or 0/1.

    Returns:
      Scalar float32 loss (float64 under x64) and a flat dict of scalars:
        adpo/loss            the listwise term alone, dropped prompts included; log G on policy
        adpo/anchor_kl       k3 estimate of the KL to the anchor, nats a token
        adpo/abs_log_ratio   mean over completions of |s - s_anchor|, nats
        adpo/mean_tau        mean temperature over prompts
        adpo/target_entropy  mean entropy of q, nats
        adpo/kl_penalty      k3 over the kept prompts, before beta_anchor_kl
        adpo/dropped_prompts how many prompts drop_all_failed_prompts took out
        adpo/zero_std_frac   fraction of prompts whose rewards count as all equal

    Raises:
      ValueError: B < num_generations, mismatched shapes, a parameter that cannot work.
    """
    algorithm = Adpo(
        tau=tau,
        beta_reward=beta_reward,
        use_adaptive_tau=use_adaptive_tau,
        adaptive_tau_alpha=adaptive_tau_alpha,
        adaptive_tau_min=adaptive_tau_min,
        beta_anchor_kl=beta_anchor_kl,
        drop_all_failed_prompts=drop_all_failed_prompts,
        scale_rewards=scale_rewards,
        length_normalize=length_normalize,
        min_reward_std=min_reward_std,
    )
    return _flat_loss(
        algorithm, log_probs, anchor_log_probs, rewards, completion_mask, num_generations
    )


def grpo_loss(
    log_probs: jax.Array,
    anchor_log_probs: jax.Array,
    rewards: jax.Array,
    completion_mask: jax.Array,
    *,
    num_generations: int = 8,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    beta_anchor_kl: float = 0.0,
    scale_rewards: str = "group",
    loss_aggregation: str = "token-mean",
    drop_all_failed_prompts: bool = False,
    min_reward_std: float = 0.0,
) -> tuple[jax.Array, Metrics]:
    """The GRPO loss of a flat batch; equation and parameters in `Grpo`.

    Arguments, trailing rows and errors as in `adpo_loss`. Metrics: grpo/loss (the surrogate alone),
    grpo/clip_frac (fraction of tokens whose gradient the clip stopped), and anchor_kl, kl_penalty,
    abs_log_ratio, dropped_prompts, zero_std_frac as there.
    """
    algorithm = Grpo(
        clip_low=clip_low,
        clip_high=clip_high,
        beta_anchor_kl=beta_anchor_kl,
        scale_rewards=scale_rewards,
        loss_aggregation=loss_aggregation,
        drop_all_failed_prompts=drop_all_failed_prompts,
        min_reward_std=min_reward_std,
    )
    return _flat_loss(
        algorithm, log_probs, anchor_log_probs, rewards, completion_mask, num_generations
    )


def target_distribution(
    rewards: jax.Array,
    *,
    beta_reward: float = 0.5,
    scale_rewards: str = "group",
    min_reward_std: float = 0.0,
) -> jax.Array:
    """The listwise target q over each group: softmax(z / beta_reward), parameters as in `Adpo`.

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
    q_PG = jax.lax.stop_gradient(groups.as_groups(q))
    tau_P = tau * (1.0 - adaptive_tau_alpha * groups.entropy(q_PG) / math.log(q_PG.shape[1]))
    return jnp.maximum(adaptive_tau_min, tau_P)


def _flat_loss(algorithm, log_probs, anchor_log_probs, rewards, completion_mask, num_generations):
    """Fold [B, T] into [P, G, T], trailing rows dropped, and apply `algorithm` to it."""
    log_probs, anchor_log_probs, rewards, completion_mask = map(
        jnp.asarray, (log_probs, anchor_log_probs, rewards, completion_mask)
    )
    if log_probs.ndim != 2:
        raise ValueError(f"log_probs must be [B, T], one number a token, got {log_probs.shape}")
    for name, array, shape in (
        ("anchor_log_probs", anchor_log_probs, log_probs.shape),
        ("completion_mask", completion_mask, log_probs.shape),
        ("rewards", rewards, log_probs.shape[:1]),
    ):
        if array.shape != shape:
            raise ValueError(
                f"{name} must have shape {shape} to go with log_probs {log_probs.shape}, "
                f"got {array.shape}"
            )
    if int(num_generations) != num_generations or num_generations < 2:
        raise ValueError(
            f"num_generations must be a whole number of at least 2, got {num_generations!r}: "
            "completions are compared within their group"
        )
    num_groups, group = log_probs.shape[0] // num_generations, num_generations
    if num_groups == 0:
        raise ValueError(
            f"the batch has {log_probs.shape[0]} rows, fewer than one group of "
            f"num_generations={num_generations}: pass whole groups or lower num_generations"
        )

    def fold(array):
        return array[: num_groups * group].reshape(num_groups, group, *array.shape[1:])

    mask_PGT = fold(completion_mask)
    prepared = algorithm.prepare(fold(rewards), mask_PGT)
    return algorithm.loss(fold(log_probs), fold(anchor_log_probs), mask_PGT, prepared)
