"""What the losses share: rewards in groups, whole-batch normalisers, log-ratios, argument checks.

Letters: P prompts, G completions of a prompt. All floats are float32, float64 under x64.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

Metrics = dict[str, jax.Array]

# exp() of a log-ratio is continued linearly from here on: exp(40)^2 = 5.5e34 still fits float32, so
# the squared norm of a gradient stays finite too, and the gradient keeps its direction.
_LINEAR_FROM = 40.0


class Normalisers(NamedTuple):
    """Normalisers of a whole batch, one row a prompt so that a part of the batch has its own."""

    kept_group_P: jax.Array  # 1 / number of kept groups; 0 for a dropped group
    kept_token_P: jax.Array  # 1 / number of completion tokens in kept groups; 0 for a dropped group
    group_P: jax.Array  # 1 / P
    token_P: jax.Array  # 1 / number of completion tokens


class Advantages(NamedTuple):
    """The scores of an algorithm that gives each completion an advantage."""

    advantages_PG: jax.Array
    kept_P: jax.Array  # bool, False where drop_all_failed_prompts took the prompt out
    spread_P: jax.Array  # bool, False where all rewards of the group count as equal


def scale_rewards(
    rewards_PG: jax.Array, scale: str, min_reward_std: float, eps: float, ddof: int = 1
) -> tuple[jax.Array, jax.Array]:
    """Rewards less their group's mean, over a standard deviation + eps.

    Args:
      rewards_PG: [P, G], the whole batch.
      scale: the rewards whose standard deviation divides: "group", "batch" or "none".
      min_reward_std: a group whose standard deviation is below it counts as all equal, and gets
        zeros. This standard deviation has ddof=1.
      ddof: 1 for the standard deviation of a sample, 0 for that of a population.

    Returns:
      The scaled rewards [P, G], and whether each group has a spread, [P] bool.
    """
    # Relative to the group's first reward, so that equal rewards give exactly 0: the float32 mean
    # of six times 0.9 is off by 6e-8, which would be a spread, in GRPO an advantage of -0.06.
    relative_PG = rewards_PG - rewards_PG[:, :1]
    centred_PG = relative_PG - relative_PG.mean(-1, keepdims=True)
    std_P = jnp.std(relative_PG, axis=-1, ddof=1)
    # What is no number stays none, so that the step is found out to be unsound.
    spread_P = ~((std_P <= 0) | (std_P < min_reward_std))
    centred_PG = jnp.where(spread_P[:, None], centred_PG, 0.0)
    if scale == "group":
        std_P = std_P if ddof == 1 else jnp.std(relative_PG, axis=-1, ddof=ddof)
        centred_PG = centred_PG / (std_P[:, None] + eps)
    elif scale == "batch":
        centred_PG = centred_PG / (jnp.std(rewards_PG, ddof=ddof) + eps)
    return centred_PG, spread_P


def decoupled_rewards(
    rewards_PGK: jax.Array, weights_K: jax.Array, min_reward_std: float, eps: float = 1e-6
) -> jax.Array:
    """The weighted sum of rewards that are each standardised within the group, [P, G].

    It is divided by its standard deviation over the batch + eps, which has ddof=1 as the others
    have. Its mean is 0 in each group but for rewards that were not given.

    Args:
      rewards_PGK: [P, G, K], NaN where a completion has none of a kind; it adds nothing then.
      min_reward_std: as for `scale_rewards`, of each kind of reward.

    Source: Liu et al. 2026, "GDPO", arXiv 2601.05242, as TRL 1.16 has it.
    """
    given_PGK = ~jnp.isnan(rewards_PGK)
    first_PGK = jnp.take_along_axis(rewards_PGK, jnp.argmax(given_PGK, 1, keepdims=True), axis=1)
    # Relative to the first one given, so that equal rewards give exactly 0.
    relative_PGK = jnp.where(given_PGK, rewards_PGK - first_PGK, 0.0)
    count_PGK = given_PGK.sum(1, keepdims=True)
    mean_PGK = relative_PGK.sum(1, keepdims=True) / jnp.maximum(count_PGK, 1)
    centred_PGK = jnp.where(given_PGK, relative_PGK - mean_PGK, 0.0)
    variance_PGK = jnp.square(centred_PGK).sum(1, keepdims=True) / jnp.maximum(count_PGK - 1, 1)
    std_PGK = jnp.sqrt(variance_PGK)
    has_spread = jnp.any(relative_PGK != 0, axis=1, keepdims=True) & ~(std_PGK < min_reward_std)
    z_PGK = jnp.where(has_spread, centred_PGK / (std_PGK + eps), 0.0)
    total_PG = (z_PGK * weights_K).sum(-1)
    return (total_PG - total_PG.mean()) / (jnp.std(total_PG, ddof=1) + eps)


def kept_prompts(rewards_PG: jax.Array, drop_all_failed_prompts: bool) -> jax.Array:
    """Which prompts stay in the loss, [P] bool; a prompt has failed if all its rewards are <= 0."""
    if not drop_all_failed_prompts:
        return jnp.ones(rewards_PG.shape[0], bool)
    return (rewards_PG > 0).any(-1)


def batch_normalisers(kept_P: jax.Array, tokens_P: jax.Array) -> Normalisers:
    """The normalisers of a batch from its kept prompts and its trained tokens, [P] each."""
    kept_P = kept_P.astype(tokens_P.dtype)
    ones_P = jnp.ones_like(kept_P)
    return Normalisers(
        kept_group_P=kept_P / jnp.maximum(kept_P.sum(), 1.0),
        kept_token_P=kept_P / jnp.maximum((kept_P * tokens_P).sum(), 1.0),
        group_P=ones_P / kept_P.shape[0],
        token_P=ones_P / jnp.maximum(tokens_P.sum(), 1.0),
    )


def lengths(tokens, least: int = 1) -> jax.Array:
    """The number of trained tokens of each completion, [P, G] float.

    Args:
      tokens: `losses.tokens.Tokens`.
      least: completions with fewer tokens count as having so many; 1, so that lengths can divide.
    """
    counted = tokens.sum(tokens.trained.astype(jnp.result_type(float)))
    return jnp.maximum(counted, least) if least else counted


def at_trained(log_probs: jax.Array, trained: jax.Array) -> jax.Array:
    """Log-probs in float32, without gradient; 0 where `trained` is False, whatever lies there."""
    masked = jnp.where(trained, jax.lax.stop_gradient(log_probs), 0.0)
    return masked.astype(jnp.result_type(float))


def whitened(values_PG: jax.Array, weights_PG: jax.Array) -> jax.Array:
    """Values less their weighted mean, over sqrt(weighted variance + 1e-8), [P, G].

    The weights count how often each value occurs; the variance has ddof=1 of those counts.
    """
    total = jnp.maximum(weights_PG.sum(), 1.0)
    values_PG = values_PG - values_PG.min()  # so that equal values give exactly 0
    centred_PG = values_PG - (weights_PG * values_PG).sum() / total
    variance = (weights_PG * centred_PG**2).sum() / jnp.maximum(total - 1.0, 1.0)
    return centred_PG * jax.lax.rsqrt(variance + 1e-8)


def log_ratios(log_probs: jax.Array, others: jax.Array, trained: jax.Array) -> jax.Array:
    """`log_probs` less `others` per token; 0 where `trained` is False, whatever lies there.

    The subtraction is done token by token in float32, since sums over 1,024 tokens in bf16 lose
    half a nat. No gradient flows into `others`.
    """
    # Both are masked before the subtraction too: -inf - -inf is NaN, and so would its gradient be.
    dtype = jnp.result_type(float)
    log_probs = jnp.where(trained, log_probs, 0.0).astype(dtype)
    others = jnp.where(trained, others, 0.0).astype(dtype)
    return log_probs - jax.lax.stop_gradient(others)


def expm1(x: jax.Array) -> jax.Array:
    """exp(x) - 1, exact near 0, linear from 40 nats on."""
    beyond = jnp.maximum(x - _LINEAR_FROM, 0.0)
    return jnp.expm1(jnp.minimum(x, _LINEAR_FROM)) + math.exp(_LINEAR_FROM) * beyond


def k3(log_ratio: jax.Array) -> jax.Array:
    """exp(d) - d - 1 with d = -log_ratio: an estimate of the KL, never negative.

    Source: Schulman 2020, joschu.net/blog/kl-approx.html.
    """
    return expm1(-log_ratio) + log_ratio


# Estimates of KL(policy || other) from a token's log-ratio x = log policy - log other.
KL_ESTIMATORS = {"k1": lambda x: x, "k2": lambda x: 0.5 * jnp.square(x), "k3": k3}


def ratio(log_ratio: jax.Array) -> jax.Array:
    """exp(log_ratio), linear from 40 nats on."""
    return 1.0 + expm1(log_ratio)


def entropy(q_PG: jax.Array) -> jax.Array:
    """The entropy of each distribution, [P] in nats."""
    return -jax.scipy.special.xlogy(q_PG, q_PG).sum(-1)


def as_groups(array: jax.Array) -> jax.Array:
    """The array as float [P, G], or ValueError."""
    array = jnp.asarray(array).astype(jnp.result_type(float))
    if array.ndim != 2 or array.shape[1] < 2:
        raise ValueError(
            "expected [P, G], a row a prompt and at least 2 completions in it, got shape "
            f"{array.shape}"
        )
    return array


def check_number(
    name: str,
    value: float,
    *,
    above: float = -math.inf,
    least: float = -math.inf,
    most: float = math.inf,
):
    """Raises ValueError unless `value` is a finite number > above, >= least and <= most."""
    texts = {"a finite number above": above, "at least": least, "at most": most}
    bounds = [f"{text} {bound:g}" for text, bound in texts.items() if math.isfinite(bound)]
    wanted = " and ".join(bounds) or "a finite number"
    try:
        number = math.nan if isinstance(value, str | bytes) else float(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must be {wanted}, fixed at trace time, got {value!r}") from error
    if not (math.isfinite(number) and above < number and least <= number <= most):
        raise ValueError(f"{name} must be {wanted}, got {value!r}")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raises ValueError unless `value` is among the choices."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}; got {value!r}")
