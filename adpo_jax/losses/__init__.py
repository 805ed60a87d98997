"""The losses: ADPO, and GRPO and RLOO as baselines to compare with.

There are two ways in. `adpo_loss`, `grpo_loss` and `rloo_loss` are pure functions over a flat
batch, for people with a training loop of their own. The algorithms `Adpo`, `Grpo` and `Rloo`
(`algorithm`) lie underneath, and the update calls their pieces.

Letters: B rows (P * G), P prompts, G completions of a prompt, T tokens.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from adpo_jax.losses.adpo import Adpo, adaptive_tau, target_distribution
from adpo_jax.losses.algorithm import Algorithm, Metric, PaddedTokens, Tokens
from adpo_jax.losses.grpo import Grpo
from adpo_jax.losses.rloo import Rloo
from adpo_jax.losses.shared import Metrics

# The algorithms of the trainer, by the name that `algorithm.adv_estimator` gives.
ALGORITHMS: dict[str, type[Algorithm]] = {
    algorithm.name: algorithm
    for algorithm in (
        Adpo,
        Grpo,
        Rloo,
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


__all__ = [
    "ALGORITHMS",
    "Adpo",
    "Algorithm",
    "Grpo",
    "Metric",
    "PaddedTokens",
    "Rloo",
    "Tokens",
    "adaptive_tau",
    "adpo_loss",
    "grpo_loss",
    "make_algorithm",
    "rloo_loss",
    "target_distribution",
]


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
    reference_log_probs: jax.Array | None = None,
    beta_reference_kl: float = 0.0,
    drop_all_failed_prompts: bool = False,
    scale_rewards: str = "group",
    length_normalize: bool = False,
    min_reward_std: float = 0.0,
) -> tuple[jax.Array, Metrics]:
    """The ADPO loss of a flat batch; `Adpo` has the equation and the parameters.

    B = prompts * num_generations, the rows of a prompt adjacent. Rows past the last whole group are
    ignored. Differentiable with respect to `log_probs` alone.

    Args:
      log_probs: [B, T] any float dtype, per token, anything under the mask.
      anchor_log_probs: [B, T], the same under the anchor.
      rewards: [B], one a completion.
      completion_mask: [B, T] bool or 0/1.
      reference_log_probs: [B, T], the same under the reference, where beta_reference_kl is above 0.

    Returns:
      Scalar float32 loss (float64 under x64) and a flat dict of scalars:
        adpo/loss            the listwise term alone, dropped prompts included; log G on policy
        adpo/anchor_kl       k3 estimate of the KL to the anchor, nats a token
        adpo/abs_log_ratio   mean over completions of |s - s_anchor|, nats
        adpo/mean_tau        mean temperature over prompts
        adpo/target_entropy  mean entropy of q, nats
        adpo/kl_penalty      k3 over the kept prompts, before beta_anchor_kl
        adpo/reference_kl    the same to the reference, where beta_reference_kl is above 0
        adpo/dropped_prompts how many prompts drop_all_failed_prompts took out
        adpo/zero_std_frac   fraction of prompts whose rewards count as all equal

    Raises:
      ValueError: B < num_generations, mismatched shapes, a parameter that cannot work, a
        beta_reference_kl above 0 without reference_log_probs.
    """
    algorithm = Adpo(
        tau=tau,
        beta_reward=beta_reward,
        use_adaptive_tau=use_adaptive_tau,
        adaptive_tau_alpha=adaptive_tau_alpha,
        adaptive_tau_min=adaptive_tau_min,
        beta_anchor_kl=beta_anchor_kl,
        beta_reference_kl=beta_reference_kl,
        drop_all_failed_prompts=drop_all_failed_prompts,
        scale_rewards=scale_rewards,
        length_normalize=length_normalize,
        min_reward_std=min_reward_std,
    )
    found = {"policy": log_probs, "anchor": anchor_log_probs, "reference": reference_log_probs}
    return _flat_loss(algorithm, found, rewards, completion_mask, num_generations)


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
    reference_log_probs: jax.Array | None = None,
    beta_reference_kl: float = 0.0,
    scale_rewards: str = "group",
    loss_aggregation: str = "token-mean",
    drop_all_failed_prompts: bool = False,
    min_reward_std: float = 0.0,
) -> tuple[jax.Array, Metrics]:
    """The GRPO loss of a flat batch; `Grpo` has the equation and the parameters.

    Arguments, trailing rows and errors are as in `adpo_loss`. The metrics are grpo/loss (the
    surrogate alone), grpo/clip_frac (fraction of tokens whose gradient the clip stopped), and
    anchor_kl, kl_penalty, reference_kl, abs_log_ratio, dropped_prompts, zero_std_frac as there.
    """
    algorithm = Grpo(
        clip_low=clip_low,
        clip_high=clip_high,
        beta_anchor_kl=beta_anchor_kl,
        beta_reference_kl=beta_reference_kl,
        scale_rewards=scale_rewards,
        loss_aggregation=loss_aggregation,
        drop_all_failed_prompts=drop_all_failed_prompts,
        min_reward_std=min_reward_std,
    )
    found = {"policy": log_probs, "anchor": anchor_log_probs, "reference": reference_log_probs}
    return _flat_loss(algorithm, found, rewards, completion_mask, num_generations)


def rloo_loss(
    log_probs: jax.Array,
    anchor_log_probs: jax.Array,
    rewards: jax.Array,
    completion_mask: jax.Array,
    *,
    num_generations: int = 8,
    beta_anchor_kl: float = 0.0,
    reference_log_probs: jax.Array | None = None,
    beta_reference_kl: float = 0.0,
    drop_all_failed_prompts: bool = False,
    min_reward_std: float = 0.0,
) -> tuple[jax.Array, Metrics]:
    """The RLOO loss of a flat batch; `Rloo` has the equation and the parameters.

    Arguments, trailing rows and errors are as in `adpo_loss`. The metrics are rloo/loss (the
    REINFORCE term alone), and anchor_kl, kl_penalty, reference_kl, abs_log_ratio, dropped_prompts,
    zero_std_frac as there.
    """
    algorithm = Rloo(
        beta_anchor_kl=beta_anchor_kl,
        beta_reference_kl=beta_reference_kl,
        drop_all_failed_prompts=drop_all_failed_prompts,
        min_reward_std=min_reward_std,
    )
    found = {"policy": log_probs, "anchor": anchor_log_probs, "reference": reference_log_probs}
    return _flat_loss(algorithm, found, rewards, completion_mask, num_generations)


def _flat_loss(
    algorithm: Algorithm,
    log_probs: Mapping[str, jax.Array | None],
    rewards: jax.Array,
    completion_mask: jax.Array,
    num_generations: int,
) -> tuple[jax.Array, Metrics]:
    """Folds [B, T] into [P, G, T], trailing rows dropped, and applies `algorithm` to it.

    Args:
      log_probs: as for `Algorithm.loss`, but [B, T] each, and None for those that are not given.
    """
    log_probs = {whose: jnp.asarray(x) for whose, x in log_probs.items() if x is not None}
    if algorithm.beta_reference_kl and "reference" not in log_probs:
        raise ValueError(
            f"beta_reference_kl={algorithm.beta_reference_kl} needs reference_log_probs, the "
            "log-probs of the completions under the reference: pass them too"
        )
    rewards, completion_mask = jnp.asarray(rewards), jnp.asarray(completion_mask)
    shape = log_probs["policy"].shape
    if len(shape) != 2:
        raise ValueError(f"log_probs must be [B, T], one number a token, got {shape}")
    for name, array, wanted in (
        *((f"{whose}_log_probs", x, shape) for whose, x in log_probs.items() if whose != "policy"),
        ("completion_mask", completion_mask, shape),
        ("rewards", rewards, shape[:1]),
    ):
        if array.shape != wanted:
            raise ValueError(
                f"{name} must have shape {wanted} to go with log_probs {shape}, got {array.shape}"
            )
    if int(num_generations) != num_generations or num_generations < 2:
        raise ValueError(
            f"num_generations must be a whole number of at least 2, got {num_generations!r}: "
            "completions are compared within their group"
        )
    num_groups, group = shape[0] // num_generations, num_generations
    if num_groups == 0:
        raise ValueError(
            f"the batch has {shape[0]} rows, fewer than one group of "
            f"num_generations={num_generations}: pass whole groups or lower num_generations"
        )

    def fold(array):
        return array[: num_groups * group].reshape(num_groups, group, *array.shape[1:])

    tokens = PaddedTokens(fold(completion_mask).astype(bool))
    prepared = algorithm.prepare(fold(rewards), tokens)
    folded = {whose: fold(array) for whose, array in log_probs.items()}
    return algorithm.loss(folded, tokens, prepared)
